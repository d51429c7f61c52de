"""The reason of a failure reaches whoever started the command: the place, and what is wrong."""

import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision

from conftest import REPOSITORY
from dan_dist.ending import require_checkpoint
from dan_dist.evaluation import evaluate
from dan_dist.inference import explain
from dan_dist.model.backbone import load_backbone
from dan_dist.model.dan import DAN
from dan_dist.options import EvaluateOptions, ExplainOptions
from dan_dist.run.checkpoint import disk_error, save
from dan_dist.run.folder import step_path
from shards.command import words
from shards.files import replacing, write_atomically
from shards.format import ShardSet
from shards.packing import pool


def test_a_full_disk_under_a_checkpoint_is_told_as_one(tmp_path: Path) -> None:
    content = {"weights": torch.zeros(300_000)}
    with (
        suppress(OSError),  # of closing the file
        Path("/dev/full").open("wb") as full,
        pytest.raises(RuntimeError, match="unexpected pos") as torchs,
    ):
        torch.save(content, full)
    line = f"{tmp_path}: No space left on device"
    assert words(disk_error(torchs.value, tmp_path)) == line
    (tmp_path / "step.pt").mkdir()  # cannot be replaced by a file
    with pytest.raises(OSError) as caught:
        save(tmp_path / "step.pt", content)
    assert words(caught.value) == f"{tmp_path / 'step.pt'}: Is a directory"
    assert [path.name for path in tmp_path.iterdir()] == ["step.pt"]


def test_an_error_of_the_disk_names_the_file_that_was_to_be(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with pytest.raises(OSError) as caught, replacing(path) as file:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, file.fileno())
        os.close(full)
        file.write(b"half")
    assert words(caught.value) == f"{path}: No space left on device"
    with pytest.raises(FileNotFoundError) as missing:
        write_atomically(tmp_path / "gone" / "file", "x")
    assert words(missing.value) == f"{tmp_path / 'gone' / 'file'}: No such file or directory"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (URLError(ConnectionRefusedError(111, "Connection refused")), "Connection refused"),
        (TimeoutError("timed out"), "timed out"),
        (RuntimeError("invalid hash value"), "invalid hash value"),
    ],
)
def test_imagenets_weights_without_internet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    with pytest.raises(OSError) as caught:
        load_backbone(DAN(8, 0), "imagenet")
    line = words(caught.value)
    assert line.startswith("model.backbone imagenet: https://download.pytorch.org/models/resnet18-")
    assert f"({reason})" in line and f"{tmp_path}/hub/checkpoints/resnet18-" in line


def test_a_run_does_not_promise_to_go_on_from_a_checkpoint_that_has_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(OSError, match=r"does not hold the checkpoint of step 8; .+ starts anew"):
        require_checkpoint(run, done=8, saved=8)
    step_path(run, 4).touch()
    with pytest.raises(OSError, match=r"step 8; the same command resumes from step-00000004\.pt"):
        require_checkpoint(run, done=8, saved=8)
    step_path(run, 8).touch()
    require_checkpoint(run, done=8, saved=8)
    with pytest.raises(OSError, match="starts anew"):  # nor is the folder made again
        require_checkpoint(tmp_path / "gone", done=8, saved=8)
    assert not (tmp_path / "gone").exists()


def test_output_is_tried_before_anything_is_computed(
    dan_run: Path, faces: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(evaluate, "predict", compute)
    monkeypatch.setattr(explain, "examine", compute)
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/figures")):
        where = {"output": output, "device": "cpu", "no_tracking": True}
        with pytest.raises(OSError, match=re.escape(f"--output {output} cannot be written: ")):
            evaluate.main(EvaluateOptions(checkpoint=dan_run, data=str(faces.root), **where))
        with pytest.raises(OSError, match=re.escape(f"--output {output} cannot be written: ")):
            explain.main(ExplainOptions(checkpoint=dan_run, data=str(faces.root), **where))


DIVIDED = """
from shards.packing.pool import in_processes
with in_processes(divmod, [(7, 2), (9, 5)], 2) as found:
    print(sorted(found))
"""


def test_a_shared_memory_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(pool.ForkServerContext, "Lock", missing)
    with pytest.raises(OSError) as caught, pool.in_processes(divmod, [(1, 1)], 2):
        pass
    assert words(caught.value).startswith("/dev/shm: No such file or directory; ")


@pytest.mark.parametrize("length", [90, 200])
def test_worker_processes_meet_below_a_long_tmpdir_too(tmp_path: Path, length: int) -> None:
    folder = tmp_path / ("t" * length)
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY),
                   "TMPDIR": str(folder)}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", DIVIDED], env=environment, cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "[(0, (3, 1)), (1, (1, 4))]\n", done.stderr


def test_a_tmpdir_that_takes_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pool.util, "get_temp_dir", full)
    with pytest.raises(OSError) as caught, pool.in_processes(divmod, [(1, 1)], 2):
        pass
    assert words(caught.value).startswith(f"{tempfile.gettempdir()}: No space left on device")
