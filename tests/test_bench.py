"""The benchmark runs and writes its figures, which are nobody's test."""

import json
import logging
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ALONE, DAN, REPOSITORY, run
from dan_dist.run.signals import StopRequest

Write = Callable[[str], Path]
pytestmark = pytest.mark.slow
BENCH = REPOSITORY / "launch" / "bench.py"


def test_it_measures_and_writes_what_it_measured(tiny: Write, tmp_path: Path) -> None:
    found = tmp_path / "figures.json"
    done = run(
        sys.executable, BENCH, "--images", "64", "loader", "step", "train", tiny("run"), *DAN,
        "--batch", "8", "--repeats", "2", "--steps", "2", "--json", found, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(found.read_text())
    loader, step, train = figures["loader"], figures["step"], figures["train"]
    assert list(loader["warm"])[:3] == [
        "dan_dist", "the same graph, fed from memory", "ImageFolder, PIL"
    ]  # fmt: skip
    from_memory = ("the same graph, fed from memory", "dan_dist, data.decoded=host")
    assert set(loader["warm"]) - set(loader["cold"]) == set(from_memory)
    tables = [*loader.values(), step["table"], train["table"]]
    for rows in (rows for table in tables for rows in table.values()):
        assert len(rows) == 2 and all(row["images/s"] > 0 for row in rows)
    assert step["roofline"]["share"] > 0 and step["roofline"]["gflop"] > 0
    whole = [row["images/s"] for row in train["table"]["end to end"]]
    slower = [min(a["images/s"], b["images/s"]) for a, b in
              zip(train["table"]["loader"], train["table"]["step"], strict=True)]  # fmt: skip
    assert train["efficiency"] in [a / b for a, b in zip(whole, slower, strict=True)]
    assert "| dan_dist |" in done.stdout and "efficiency" in done.stdout


def test_it_starts_trainings_and_projects_beyond_this_machine(tiny: Write, tmp_path: Path) -> None:
    found = tmp_path / "figures.json"
    done = run(
        sys.executable, BENCH, "--images", "64", "start", "scaling", tiny("run"), *DAN, "--batch",
        "8", "--repeats", "1", "--steps", "1", "--ranks", "1", "2", "--json", found, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(found.read_text())
    start, scaling = figures["start"], figures["scaling"]
    assert 0 < start["of that: import torch"][0]["s"] < start["torchrun launch/train.py"][0]["s"]
    assert {ranks: len(rates) for ranks, rates in scaling["images_per_s"].items()} == {
        "1": 1, "2": 1
    }  # fmt: skip
    assert scaling["projected"] and "| of linear |" in done.stdout


def test_a_visit_without_time_names_what_it_left_out(tmp_path: Path) -> None:
    done = run(
        sys.executable, BENCH, "--visit", "visit", "--minutes", "0.05", "configs/demo.yaml",
        "--images", "64", "data.shards=drawn", "model.image_size=32", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    results = {name: part["result"] for name, part in
               json.loads((tmp_path / "visit" / "visit.json").read_text()).items()}  # fmt: skip
    assert {"checks", "step 256", "train", "loader", "start"} < {*results}
    assert all(result.startswith(("stopped after", "no time")) for result in results.values())


# As where only what training needs was brought
BARE = """
import runpy, sys
sys.modules |= dict.fromkeys(("webdataset", "mlflow", "deepspeed", "statsmodels"))
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]  # as for a script
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_it_needs_no_optional_package_and_no_rotation(tmp_path: Path) -> None:
    done = run(
        sys.executable, "-c", BARE, BENCH, "--images", "64", "loader", "step", "configs/demo.yaml",
        "model.image_size=32", "tracking.enabled=false", "--batch", "8", "--repeats", "1",
        "--steps", "1", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "webdataset is not installed: left out" in done.stdout
    assert "| DALI's readers.webdataset |" in done.stdout and "times as fast" in done.stdout


def test_an_unknown_part_is_one_line(tmp_path: Path) -> None:
    done = run(sys.executable, BENCH, "loaders", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: no such part, known are loader, step, train, scaling, start, order; loaders: no "
        "such configuration; there are affectnet7, "
    ) and done.stderr.count("\n") == 1  # fmt: skip


@pytest.mark.parametrize("words", ["rafdb loader", "order configs/sfew a=b.yaml step",
                                   "train --config ferplus"])  # fmt: skip
def test_a_recipe_is_given_by_its_name(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    bench = runpy.run_path(str(BENCH))
    seen: list[object] = []
    known = bench["main"].__globals__
    monkeypatch.setitem(known, "_part", lambda *own: seen.append(own[:3]))
    for name in ("init_world", "_machine", "close_world"):
        monkeypatch.setitem(known, name, lambda *_: ALONE)
    monkeypatch.setattr(logging.getLogger("dan_dist"), "level", logging.INFO)
    assert bench["main"](words.split(), StopRequest()) == 0
    expected = {
        "rafdb loader": [("loader", "rafdb", [])],
        "order configs/sfew a=b.yaml step": [("order", "configs/sfew", ["a=b.yaml"]),
                                             ("step", "configs/sfew", ["a=b.yaml"])],
        "train --config ferplus": [("train", "ferplus", [])],
    }  # fmt: skip
    assert seen == expected[words]
