"""Ranks that hang, die or wait for each other."""

import _thread
import errno
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.distributed import HashStore

from conftest import SCRIPT, outcome, run, start, until
from dan_dist.distributed import heartbeat as pulse
from dan_dist.distributed.heartbeat import Heartbeat
from dan_dist.distributed.rendezvous import _meet
from dan_dist.distributed.world import World
from dan_dist.run.signals import Stopped

Write = Callable[[str], Path]


def test_a_rank_that_hangs_ends_the_job_and_is_named(tiny: Write, tmp_path: Path) -> None:
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT,
                    tiny("run"), "train.epochs=500", "train.timeout_s=8", cwd=tmp_path)  # fmt: skip
    try:
        until(process, "step 3 ")
        own = psutil.Process(process.pid).children(recursive=True)
        victim = next(p for p in own if p.environ().get("RANK") == "1")
        victim.suspend()
        began = time.monotonic()
        said = until(process, "error: ")
        assert "rank 1 on " in said.splitlines()[-1] and "is silent for 8 s" in said
        assert time.monotonic() - began < 60
        assert outcome(tmp_path / "run")["status"] == "failed"
        victim.resume()  # as torchrun would after 30 s, by SIGKILL
        process.communicate(timeout=60)
        assert process.returncode != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


FAULTY = """
import os, runpy, signal, sys, time
from dan_dist import data, engine

def hang(): time.sleep(600)
def die():
    time.sleep(3)  # signs of life are a second apart: so that the last one tells where it was
    os.kill(os.getpid(), signal.SIGKILL)
def fail(): raise data.TooMuchDamageError("train-00.tar: broken")

following, count = data.Loader.__next__, 0
def faulty(self):
    global count
    count += self.augment is None
    if count == AT:
        FAULT()
    return following(self)

if os.environ["RANK"] == "1":
    data.Loader.__next__ = faulty
sys.argv[:1] = [SCRIPT]
runpy.run_path(SCRIPT, run_name="__main__")
"""


@pytest.mark.parametrize("fault", ["hang", "die", "fail"])
def test_a_rank_is_lost_in_evaluation(tiny: Write, tmp_path: Path, fault: str) -> None:
    """In the second one: the first may take its time, as it may compile."""
    script = tmp_path / "faulty.py"
    text = FAULTY.replace("AT", "2").replace("FAULT()", f"{fault}()")
    script.write_text(text.replace("SCRIPT", repr(SCRIPT)))
    done = run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               script, tiny("run"), "train.timeout_s=8", cwd=tmp_path)  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and len(ours) == 1, done.stderr
    words = {
        "hang": r"rank 1 on \S+ \(evaluation step 1\) does not go on for 8 s",
        "die": r"rank 1 on \S+ \(evaluation step 1\) has ended or hangs",
        "fail": r"train-00\.tar: broken",
    }[fault]
    assert re.search(words, ours[0]), ours
    assert "Stopped" not in done.stderr
    found = outcome(tmp_path / "run")
    assert found["status"] == "failed" and found["step"] == 20
    assert re.search(words, found["reason"]), found


def test_a_signal_to_the_rank_that_works_for_all_ends_all(tiny: Write, tmp_path: Path) -> None:
    faces = "data.synthetic={train: 200000, val: 8, size: 64}"
    process = start(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT, tiny("run"),
        faces, f"data.shards={tmp_path / 'new'}", cwd=tmp_path,
    )  # fmt: skip
    try:
        until(process, "drawing 200008 faces")
        own = psutil.Process(process.pid).children()
        next(p for p in own if p.environ().get("RANK") == "0").send_signal(signal.SIGUSR1)
        began = time.monotonic()
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 0 and time.monotonic() - began < 30, said
        assert "SIGUSR1: stopped before or after the work" in said and "Traceback" not in said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collects the lines of pulses that end their process, which here goes on."""
    lines: list[str] = []
    for name, value in {"BEAT_S": 0.02, "SILENT_S": 0.3, "YIELD_S": 0.0}.items():
        monkeypatch.setattr(pulse, name, value)
    monkeypatch.setattr(pulse.os, "_exit", lambda code: _thread.exit())
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    yield lines
    for own in PULSES:  # whose end would be that of the next test
        own._ended.set()
        own._threads[1].join(5)  # the other may stand in a store that hangs
    PULSES.clear()


PULSES: list[Heartbeat] = []  # those of the test that runs


def pulses_of(store: Any, size: int, ended: list[str], timeout_s: float = 1.0) -> list[Heartbeat]:
    pulses = [
        Heartbeat(store, r, size, timeout_s=timeout_s, on_loss=ended.append) for r in range(size)
    ]
    PULSES.extend(pulses)
    return pulses


def test_a_rank_that_does_not_go_on_is_named(ended: list[str]) -> None:
    """All give signs of life, but one never gets its images of step 3."""
    pulses = pulses_of(HashStore(), 3, ended)
    for step in (1, 2, 3):
        for own in pulses:
            own.advance(f"step {step}, reading")
        for rank, own in enumerate(pulses):
            if (rank, step) != (1, 3):
                own.advance(f"step {step}")
        time.sleep(0.1)
    time.sleep(2.0)
    assert len(ended) == 1
    assert ended[0].startswith("rank 1 on ") and "(step 3, reading) does not go on" in ended[0]


def test_slow_but_steady_ranks_are_left_alone(ended: list[str]) -> None:
    pulses = pulses_of(HashStore(), 2, ended, timeout_s=0.5)
    time.sleep(0.8)  # before the first step there is no deadline
    pulses[0].advance("step 1", patient=True)
    pulses[1].advance("step 1")
    time.sleep(0.8)  # one of them compiles
    for step in range(5):
        for own in pulses:
            own.advance(f"step {step}")
        time.sleep(0.3)
    for step in range(4):  # rank 0 is through with its part of the evaluation and waits
        pulses[1].advance(f"evaluation step {step}")
        time.sleep(0.3)
    pulses[1].close()  # from here on nothing is done together
    time.sleep(1.0)
    for own in pulses:
        own.close()
    assert not ended


class HangingStore:
    """That of a process that is stopped: it neither answers nor fails."""

    def __init__(self) -> None:
        self.store, self.hangs = HashStore(), False

    def __getattr__(self, name: str) -> Any:
        if self.hangs:
            time.sleep(3600)
        return getattr(self.store, name)


@pytest.mark.parametrize("fault", ["store hangs", "silent while compiling", "disk fails"])
def test_what_has_no_step_to_wait_for_ends_as_well(
    ended: list[str], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, store = threading.Event(), HangingStore()
    monkeypatch.setattr(pulse.os, "_exit", lambda code: (gone.set(), _thread.exit()))

    def fail(line: str) -> None:
        ended.append(line)
        raise OSError(errno.ENOSPC, "full")

    pulses = pulses_of(store, 2, ended)
    pulses[0]._on_loss = fail if fault == "disk fails" else ended.append
    for own in pulses:
        own.advance("step 1", patient=fault == "silent while compiling")
    time.sleep(0.2)
    if fault == "store hangs":
        store.hangs = True
    else:
        pulses[1]._ended.set()  # dies without a word
        for thread in pulses[1]._threads:
            thread.join()
        pulses[1]._state = "works"
    assert gone.wait(5)
    expected = "the store of the job" if fault == "store hangs" else "rank 1 on "
    assert ended[0].startswith(expected), ended


@pytest.mark.parametrize("way", ["stopped", "failed", "silent"])
def test_ranks_that_wait_notice_one_that_has_left(ended: list[str], way: str) -> None:
    """Rank 0 is at something long that it does for all."""
    store = HashStore()
    pulses = pulses_of(store, 2, ended)
    time.sleep(0.2)
    if way == "silent":
        pulses[0]._ended.set()
        for thread in pulses[0]._threads:
            thread.join()
    elif way == "failed":
        pulses[0].leave("failed", "rank 0 on here: no space")
    else:
        pulses[0].leave("stopped", "SIGUSR1")
    device = torch.device("cpu")
    worlds = [World(1, 1, 2, 2, device, store, check=pulses[1].check) for _ in range(2)]
    kind: type[BaseException] = Stopped if way == "stopped" else ConnectionError
    words = {"stopped": "SIGUSR1", "failed": "no space", "silent": "rank 0 on "}[way]
    with pytest.raises(kind, match=words):
        worlds[0].once(lambda: None)
    with pytest.raises(kind, match=words):
        worlds[1].together(lambda: None)
    pulses[1].close()
    # Of a rank that is silent the pulse itself may be the first to tell.
    assert way == "silent" or not ended
    assert all("rank 0 on " in line for line in ended)


def test_a_failure_of_one_rank_is_that_of_all() -> None:
    store, found = HashStore(), dict[int, str]()

    def work(rank: int, failing: tuple[int, ...]) -> None:
        def task() -> None:
            if rank in failing:
                raise ValueError(f"bad {rank}")

        try:
            worlds[rank].together(task)
        except ValueError as error:
            found[rank] = str(error)

    worlds = [World(r, r, 3, 3, torch.device("cpu"), store) for r in range(3)]
    for failing, expected in (((), []), ((1,), ["rank 1 on "] * 3), ((0, 1, 2), ["bad 0"] * 3)):
        found.clear()
        threads = [threading.Thread(target=work, args=(r, failing)) for r in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(found) == len(expected)
        assert all(found[r].startswith(text) for r, text in enumerate(expected)), found
    assert [worlds[r].count_unique("damaged", i) for r, i in ((0, 5), (1, 5), (2, 6))] == [1, 1, 2]


def test_ranks_meet_whatever_an_earlier_gathering_left(ended: list[str]) -> None:
    store = HashStore()
    names: list[str] = []
    for size in (3, 2, 3):
        found: dict[int, str] = {}
        order = random.sample(range(size), size)

        def join(rank: int, size: int = size, found: dict[int, str] = found) -> None:
            found[rank] = _meet(store, rank, size)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in order]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join(20)
        assert len(found) == size and len(set(found.values())) == 1
        names += set(found.values())
    assert len(set(names)) == 3
