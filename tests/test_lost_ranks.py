"""Jobs of two ranks of which one hangs, dies, fails or is told to stop."""

import functools
import itertools
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from interpreter import forked

from conftest import SCRIPT, call_program, children, errors, launch, outcome, start, torchrun, until
from dan_dist.data.loader import Batch, Loader
from dan_dist.data.reader import TooMuchDamageError

Write = Callable[[str], Path]


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_and_is_named(tiny: Write, tmp_path: Path) -> None:
    options = [tiny("run"), "train.epochs=500", "train.timeout_s=8"]
    process = start(*torchrun(2)[1:], SCRIPT, *options, cwd=tmp_path)
    try:
        until(process, "step 3 ")
        rank = next(p for p in children(process) if p.environ().get("RANK") == "1")
        victim = psutil.Process(forked(rank.pid))
        victim.suspend()
        began = time.monotonic()
        printed = until(process, "error: ")
        assert "rank 1 on " in printed.splitlines()[-1] and "is silent for 8 s" in printed
        assert time.monotonic() - began < 60
        assert outcome(tmp_path / "run")["status"] == "failed"
        victim.resume()  # as torchrun would after 30 s, by SIGKILL
        process.communicate(timeout=60)
        assert process.returncode != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def hang() -> None:
    time.sleep(600)


def die() -> None:
    time.sleep(3)  # heartbeats are a second apart: so that the last one tells where it was
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise TooMuchDamageError("train-00.tar: broken", None)  # type: ignore[arg-type]


def train_with_fault(fault: Callable[[], None], program: str, words: list[str]) -> None:
    """Trains; on rank 1 the second evaluation after that of the start has the fault."""
    read, evaluations = Loader.__next__, itertools.count(1)

    def faulty(loader: Loader) -> Batch:
        if loader.augment is None and next(evaluations) == 3:
            fault()
        return read(loader)

    if os.environ["RANK"] == "1":
        Loader.__next__ = faulty  # type: ignore[method-assign]
    call_program(program, words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (hang, r"rank 1 on \S+ \(evaluation step 1\) does not go on for 8 s"),
        (die, r"rank 1 on \S+ \(evaluation step 1\) has ended or hangs"),
        (fail, r"train-00\.tar: broken"),
    ],
    ids=["hang", "die", "fail"],
)
def test_a_rank_is_lost_in_evaluation(
    tiny: Write, tmp_path: Path, fault: Callable[[], None], line: str
) -> None:
    """In the second one: the first may take its time, as it may compile."""
    inside = functools.partial(train_with_fault, fault)
    options = [tiny("run"), "train.timeout_s=8"]
    done = launch("train", 2, *options, cwd=tmp_path, inside=inside)
    ours = errors(done)
    assert done.returncode and len(ours) == 1, done.stderr
    assert re.search(line, ours[0]), ours
    assert "Stopped" not in done.stderr
    found = outcome(tmp_path / "run")
    assert found["status"] == "failed" and found["step"] == 20
    stacks = {path.name for path in (tmp_path / "run").glob("stacks-rank*.txt")}
    if fault is hang:
        assert stacks == {"stacks-rank0.txt", "stacks-rank1.txt"}
        assert "in hang" in (tmp_path / "run" / "stacks-rank1.txt").read_text()
    else:
        assert not stacks
    assert re.search(line, found["reason"]), found


@pytest.mark.slow
def test_a_signal_to_the_rank_that_works_for_all_ends_all(tiny: Write, tmp_path: Path) -> None:
    faces = "data.synthetic={train: 200000, val: 8, size: 64}"
    options = [tiny("run"), faces, f"data.shards={tmp_path / 'new'}"]
    process = start(*torchrun(2)[1:], SCRIPT, *options, cwd=tmp_path)
    try:
        until(process, "drawing 200008 faces")
        rank = next(p for p in children(process) if p.environ().get("RANK") == "0")
        rank.send_signal(signal.SIGUSR1)
        began = time.monotonic()
        printed = process.communicate(timeout=60)[0]
        assert process.returncode == 0 and time.monotonic() - began < 30, printed
        assert "SIGUSR1: stopped before training" in printed and "Traceback" not in printed
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
