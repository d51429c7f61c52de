"""Checkpoints: damaged, unreadable, on a full disk, of two trainings at once."""

import errno
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import python

from conftest import SCRIPT, copied, history, outcome, run, single
from dan_dist import train as story
from dan_dist.config import load_config
from dan_dist.run import checkpoint
from dan_dist.run import folder as folders
from dan_dist.run.folder import (
    CheckpointWriter,
    checkpoint_to_resume,
    locked_run_folder,
    restore_best,
    step_path,
    steps_saved,
)
from dan_dist.tracking.journal import Journal

Write = Callable[[str], Path]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a bit", "cut off"])
def test_a_damaged_checkpoint_is_passed_over(
    baseline_run: Path, tiny: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """The run goes on from the one before, and ends as the undisturbed one."""
    copied(baseline_run, tmp_path / "whole")
    whole = single(tiny("whole"), "train.max_steps=13").metrics
    path = step_path(copied(baseline_run, tmp_path / "run"), 10)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # torch.load would not notice
    path.unlink()
    path.write_bytes(content if fault == "a bit" else content[:1000])
    line = "does not have its checksum" if fault == "a bit" else "not a readable checkpoint"
    with pytest.raises(ValueError, match=rf"step-00000010\.pt: .*{line}"):
        checkpoint.load(path)
    assert single(tiny("run"), "train.max_steps=13").metrics == whole
    assert f"{path}: not a readable checkpoint" in caplog.text
    assert "trying the one before" in caplog.text


def test_checkpoints_that_cannot_be_read_are_kept(
    tiny: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    options = ["train.checkpoint_every=2", "train.keep_checkpoints=9"]
    single(tiny("run"), *options, "train.max_steps=6")
    (folder / "step-00000009.pt.partial").write_text("of a killed run")
    lacking = checkpoint.load(step_path(folder, 6))
    del lacking["config"]
    torch.save(lacking, step_path(folder, 6))
    step_path(folder, 8).mkdir()
    os.mkfifo(step_path(folder, 9))  # into which nobody may ever write
    with pytest.raises(ValueError, match=r"not a readable checkpoint .it lacks config"):
        checkpoint.load(step_path(folder, 6))
    assert single(tiny("run"), *options, "train.max_steps=5").status == "finished"
    for number in (8, 9):
        line = f"step-0000000{number}.pt: not a readable checkpoint (no regular file); trying the"
        assert line in caplog.text
    names = {p.name for p in folder.iterdir()}
    assert {"step-00000006.pt.damaged", "step-00000008.pt.damaged"} <= names
    assert outcome(folder)["step"] == 5 and not list(folder.glob("*.partial"))
    assert not list(folder.glob("outcome.json.*"))
    for path in steps_saved(folder)[1:]:
        path.unlink()
    own = step_path(folder, 5)
    foreign = {**checkpoint.load(own), "format": "dan_dist checkpoint, version 2"}
    torch.save(foreign, own)
    with pytest.raises(ValueError, match="not a checkpoint of this project, expected"):
        single(tiny("run"), *options)
    own.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"none of its checkpoints can be read .step-00000005\.pt"):
        single(tiny("run"), *options)
    assert own.read_bytes() == b"PK"


def test_all_ranks_go_on_from_what_one_has_chosen(
    baseline_run: Path, tiny: Write, tmp_path: Path
) -> None:
    """A node that sees other files, or older ones, must not resume from them."""
    run, config = copied(baseline_run, tmp_path / "run"), load_config(tiny("run"), [])
    newest, older = steps_saved(run)
    chosen = checkpoint_to_resume(run, "auto")
    assert chosen == str(newest)
    newest.unlink()
    with pytest.raises(OSError, match=r"step-00000010\.pt cannot be read: No such file"):
        story.read_checkpoint(chosen, config, None)  # type: ignore[arg-type]
    os.link(older, newest)
    with pytest.raises(ValueError, match=r"step-00000010\.pt is of step 5"):
        story.read_checkpoint(chosen, config, None)  # type: ignore[arg-type]


def test_the_best_checkpoint_is_there_whenever_another_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    written, save = list[str](), checkpoint.save

    def dying(path: Path, content: Any) -> None:
        if content["step"] == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, content)
        written.append(f"{path.name} {content['best']}")

    monkeypatch.setattr(folders, "save", dying)
    with CheckpointWriter(tmp_path, keep=2, stop_on_error=False) as writer:
        writer.write(5, {"step": 5, "best": 1, "optimizer": {}}, is_best=True)
        writer.write(10, {"step": 10, "best": 2, "optimizer": {}}, is_best=True)
        writer.wait()
        assert writer.saved == 5 and "the one before stays" in caplog.text
        monkeypatch.setattr(folders, "save", lambda p, c: written.append(f"{p.name} {c['best']}"))
        writer.write(15, {"step": 15, "best": 2, "optimizer": {}}, is_best=False)
    assert written == [
        "best.pt 1", "step-00000005.pt 1", "best.pt 2", "step-00000015.pt 2"
    ]  # fmt: skip
    assert writer.saved == 15


def test_a_failure_of_the_run_hides_no_failure_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(folders, "save", full)
    with (
        pytest.raises(FloatingPointError),
        CheckpointWriter(tmp_path, keep=2, stop_on_error=True) as writer,
    ):
        writer.write(5, {"step": 5, "optimizer": {}}, is_best=False)
        raise FloatingPointError("the loss is not finite")
    assert f"no checkpoint could be written into {tmp_path}: " in caplog.text


@pytest.mark.slow
def test_a_longer_run_can_be_ended_at_its_checkpoint(tiny: Write, tmp_path: Path) -> None:
    """In mid-epoch, without evaluation: as one that was to end there from the start."""
    whole = single(tiny("whole"), "train.max_steps=7").metrics
    single(tiny("run"), "train.checkpoint_every=7", "train.keep_checkpoints=9")
    for path in steps_saved(tmp_path / "run")[:-1]:
        path.unlink()
    assert single(tiny("run"), "train.max_steps=7").metrics == whole
    assert outcome(tmp_path / "run")["step"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("step", [10, 15])
def test_a_best_checkpoint_of_later_is_forgotten(
    tiny: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture, step: int
) -> None:
    """As after damage: the run goes on from the end of an epoch, or from its midst."""
    folder, options = tmp_path / "run", ["train.keep_checkpoints=9", "train.checkpoint_every=5"]
    single(tiny("run"), *options)
    content = checkpoint.load(step_path(folder, step))
    best = checkpoint.load(folder / "best.pt")
    torch.save({**best, "step": 20, "of": "damage"}, folder / "best.pt")
    for later in [path for path in steps_saved(folder) if path > step_path(folder, step)]:
        later.unlink()
    content["best"] = {**content["best"], "accuracy": 2.0}  # which no epoch reaches
    torch.save(content, step_path(folder, step))
    became = "this" if step == 10 else "none"
    again = "" if step == 10 else "none"
    assert [restore_best(folder, step, 1) for _ in range(2)] == [became, again]
    assert checkpoint.load(folder / "best.pt.damaged")["of"] == "damage"
    (folder / "best.pt").unlink(missing_ok=True)  # killed between
    caplog.clear()
    single(tiny("run"), *options)
    found, last = checkpoint.load(folder / "best.pt"), checkpoint.load(step_path(folder, 20))
    assert "optimizer" not in found and found["step"] == 10 * last["best"]["epoch"]
    assert last["best"] == found["best"] and found["best"]["accuracy"] < 2
    words = "takes its place" if step == 10 else "it is chosen anew"
    assert words in caplog.text and (step == 10 or found["step"] == 20)


@pytest.mark.parametrize("fault", ["a bit", "cut off", "empty", "of no step"])
def test_a_damaged_best_checkpoint_is_chosen_anew(
    baseline_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    folder = copied(baseline_run, tmp_path / "run")
    step, path = checkpoint.load(steps_saved(folder)[0])["step"], folder / "best.pt"
    content = bytearray(path.read_bytes())
    path.unlink()
    content[len(content) // 2] ^= 1
    path.write_bytes(content if fault == "a bit" else content[: 999 * (fault == "cut off")])
    if fault == "of no step":
        torch.save({"format": checkpoint.FORMAT}, path)
    assert restore_best(folder, step, 1) == "this"
    assert checkpoint.load(path)["step"] == step and "it is set aside" in caplog.text
    assert (folder / "best.pt.damaged").is_file() and restore_best(folder, step, 1) == ""


class Executes:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch executed",))


def test_loading_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": Executes()}, tmp_path / "own.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Executes()))
    for name in ("own.pt", "plain.pt"):
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_full_disk_costs_a_checkpoint_and_no_more(
    tiny: Write, tmp_path: Path, policy: str
) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    options = (
        f"train.output={disk}/run train.checkpoint_every=4 train.checkpoint_errors={policy} "
        f"tracking.enabled={policy == 'continue'}"
    )
    train = f"{python()} {SCRIPT} {tiny('run')}"
    # Room for the first checkpoint and the best one; then a file takes what is left.
    command = (
        f"mount -t tmpfs -o size=64m tmpfs {disk}; {train} {options} train.max_steps=4; "
        f"head -c 1G /dev/zero > {disk}/filler; "
        f"{train} {options} train.max_steps=14; echo code $?; "
        f"ls {disk}/run; cat {disk}/run/outcome.json; rm {disk}/filler; {train} {options}"
    )
    done = run("unshare", "-m", "sh", "-c", command, cwd=tmp_path, timeout_s=200)
    between = done.stdout.split("code ")[1].split("resumed")[0]
    assert "step-00000004.pt" in between and "partial" not in between, done.stdout + done.stderr
    assert "resumed after step 4" in done.stdout.split("code ")[1]
    assert "finished after 20 steps" in done.stdout
    assert between.startswith("2") and '"status": "failed"' in between, between
    if policy == "stop":
        assert "error: no checkpoint could be written" in done.stderr
        return
    assert "the one before stays, training goes on" in done.stdout and "step 14 loss" in done.stdout
    assert '"failed", "step": 4, "reason": "all 14 steps' in between, between
    assert "error: all 14 steps are done, but the last checkpoint" in done.stderr
    assert "journal.jsonl: No space left on device; its records wait in memory" in done.stdout
    points = history(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [step for step, _ in points] == list(range(1, 21))


def test_two_trainings_do_not_write_into_one_folder(tiny: Write, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run")
    with pytest.raises(OSError, match="run is in use by another process"):
        single(tiny("run"), "tracking.enabled=true", "train.max_steps=1")
    journal.close()
    with (
        locked_run_folder(tmp_path / "other"),
        pytest.raises(OSError, match="other is in use by another process"),
    ):
        single(tiny("other"), "train.max_steps=1")
    assert not (tmp_path / "other" / "outcome.json").exists()


@pytest.mark.slow
def test_checkpoints_by_the_clock(tiny: Write, tmp_path: Path) -> None:
    single(tiny("run"), "train.checkpoint_minutes=1e-6", "train.keep_checkpoints=99")
    steps = [int(p.stem[5:]) for p in steps_saved(tmp_path / "run")]
    assert len(steps) > 8 and steps[0] == 20  # every other step: ranks agree one step late
