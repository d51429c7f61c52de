"""The certificate: what a training computes on is the same at every world and after a resume."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import ranks

from conftest import DAN, REPOSITORY, run
from dan_dist import certificate
from dan_dist.certificate import CERTIFICATE, HASHED, compare, differences, main
from dan_dist.options import CertifyOptions

Write = Callable[[str], Path]


@pytest.mark.slow
def test_hashes_are_equal_at_worlds_1_2_and_3_and_after_a_resume(
    tiny: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        certificate, "launch", lambda options, world: ranks(world, main, options, timeout_s=250)
    )
    words = (str(tiny("run")), *DAN, "data.sampling={power: 0.5}", "train.global_batch=7")
    assert main(CertifyOptions(words=words, steps=4, worlds="1,2,3")) == []
    path = tmp_path / "run" / "certificate" / CERTIFICATE
    content = json.loads(path.read_text())
    runs = content["runs"]
    assert [(run["world"], run["start"]) for run in runs] == [(1, 0), (2, 0), (3, 0), (1, 2)]
    first = runs[0]
    for part in HASHED:
        assert len(set(first[part])) == 4 and {len(value) for value in first[part]} == {64}
        assert first[part] == runs[1][part] == runs[2][part] == first[part][:2] + runs[3][part]
    assert first["loss"][2:] == runs[3]["loss"]
    for other in runs[1:3]:
        assert other["loss"] == pytest.approx(first["loss"], abs=1e-9, rel=0)
    assert content["torch"] == torch.__version__ and content["class_names"][0] == "neutral"
    # Two files
    assert compare(path, path) == []
    first["pixels"][3], first["loss"][1] = "other", first["loss"][1] + 1e-12
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content | {"decoder": "nvJPEG"}))
    assert main(CertifyOptions(words=(str(path), str(other)))) == [
        "world 1 and world 1: pixels part at step 3", "world 1 and world 1: loss part at step 1"
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_runs_each_world(tiny: Write, tmp_path: Path) -> None:
    command = [sys.executable, REPOSITORY / "launch" / "certify.py"]
    done = run(*command, tiny("run"), "--steps", "2", "--worlds", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "run" / "certificate" / CERTIFICATE
    assert "equal up to step 2: ids, augmentation, pixels, loss" in done.stdout
    changed = path.read_text().replace('"ids": [\n    "', '"ids": [\n    "x', 1)
    (tmp_path / "other.json").write_text(changed)
    done = run(*command, path, tmp_path / "other.json", cwd=tmp_path)
    assert done.returncode == 1 and "ids part at step 0" in done.stdout


def test_losses_of_two_worlds_may_differ_by_a_billionth() -> None:
    one = {"world": 1, "start": 0, **{part: ["x"] * 3 for part in HASHED}, "loss": [1.0, 2.0, 3.0]}
    near = {**one, "world": 2, "loss": [1.0, 2.0 + 9e-10, 3.0]}
    assert differences(one, near) == []
    assert differences(one, {**near, "world": 1}) == [("loss", 1)]
    assert differences(one, {**near, "loss": [1.0, 2.0, 3.0 + 2e-9]}) == [("loss", 2)]
    assert differences(one, {**near, "loss": [1.0, float("nan"), 3.0]}) == [("loss", 1)]


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (("demo",), {}, "expected a configuration and --steps N of 2 or more, or two certificates"),
        (("demo",), {"steps": 1}, "--steps N of 2 or more"),
        (("a.json",), {"steps": 3}, "or two certificates"),
        (("demo",), {"steps": 3, "worlds": "1,x"}, "--worlds is '1,x', expected numbers from 1 to"),
        (
            ("demo",),
            {"steps": 3, "worlds": "65"},
            "--worlds is '65', expected numbers from 1 to 64",
        ),
    ],
)
def test_a_wrong_command_line_is_refused(
    words: tuple[str, ...], options: dict, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        main(CertifyOptions(words=words, **options))
    assert message in str(caught.value)


def test_what_is_no_certificate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a\.json: not a certificate, expected 'dan_dist cert"):
        compare(tmp_path / "a.json", tmp_path / "a.json")
