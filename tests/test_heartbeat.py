"""Heartbeats of ranks that hang, die or wait for each other."""

import _thread
import errno
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from dan_dist.distributed import heartbeat
from dan_dist.distributed.heartbeat import Heartbeat
from dan_dist.distributed.rendezvous import Patience, meet
from dan_dist.distributed.world import World
from dan_dist.run.signals import Stopped


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collects the lines of hearts that end their process, which here goes on."""
    lines: list[str] = []
    for name, value in {"BEAT_S": 0.02, "SILENT_S": 0.3, "YIELD_S": 0.0}.items():
        monkeypatch.setattr(heartbeat, name, value)
    monkeypatch.setattr(heartbeat.os, "_exit", lambda code: _thread.exit())
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    yield lines
    for own in HEARTS:  # whose end would be that of the next test
        own._ended.set()
        own._threads[1].join(5)  # the other may stand in a store that hangs
    HEARTS.clear()


HEARTS: list[Heartbeat] = []  # those of the test that runs


def hearts_of(store: Any, size: int, ended: list[str], timeout_s: float = 1.0) -> list[Heartbeat]:
    """The heartbeats of all ranks, past their first and patient steps."""
    hearts = [
        Heartbeat(store, r, size, timeout_s=timeout_s, on_loss=ended.append) for r in range(size)
    ]
    for own in hearts:
        own._kinds |= {"reading", "step", "evaluation"}
    HEARTS.extend(hearts)
    return hearts


def test_a_rank_that_does_not_go_on_is_named(ended: list[str]) -> None:
    """All give signs of life, but one never gets its images of step 3."""
    hearts = hearts_of(HashStore(), 3, ended)
    for step in (1, 2, 3):
        for own in hearts:
            own.beat("reading", step)
        for rank, own in enumerate(hearts):
            if (rank, step) != (1, 3):
                own.beat("step", step)
        time.sleep(0.1)
    time.sleep(2.0)
    assert len(ended) == 1
    assert ended[0].startswith("rank 1 on ") and "(step 3, reading) does not go on" in ended[0]


def test_slow_but_steady_ranks_are_left_alone(ended: list[str]) -> None:
    hearts = hearts_of(HashStore(), 2, ended, timeout_s=0.5)
    time.sleep(0.8)  # before the first step there is no deadline
    hearts[0]._kinds.clear()
    for own in hearts:
        own.beat("step", 1)
    time.sleep(0.8)  # one of them compiles
    for step in range(5):
        for own in hearts:
            own.beat("step", step)
        time.sleep(0.3)
    for step in range(4):  # rank 0 is through with its part of the evaluation and waits
        hearts[1].beat("evaluation", step)
        time.sleep(0.3)
    hearts[1].close()  # from here on nothing is done together
    time.sleep(1.0)
    for own in hearts:
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
    ended: list[str], fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And leaves what its threads stand at."""
    gone, store = threading.Event(), HangingStore()
    monkeypatch.setattr(heartbeat.os, "_exit", lambda code: (gone.set(), _thread.exit()))

    def fail(line: str) -> None:
        ended.append(line)
        raise OSError(errno.ENOSPC, "full")

    hearts = hearts_of(store, 2, ended)
    hearts[0]._on_loss = fail if fault == "disk fails" else ended.append
    for own in hearts:
        own._stacks = tmp_path / "best.pt"  # beside which they are left
        if fault == "silent while compiling":
            own._kinds.clear()
        own.beat("step", 1)
    time.sleep(0.2)
    if fault == "store hangs":
        store.hangs = True
    else:
        hearts[1]._ended.set()  # dies without a word
        for thread in hearts[1]._threads:
            thread.join()
        hearts[1]._state = "works"
    assert gone.wait(5)
    expected = "the store of the job" if fault == "store hangs" else "rank 1 on "
    assert ended[0].startswith(expected), ended
    texts = [path.read_text() for path in tmp_path.glob("stacks-rank*.txt")]
    left = [text for text in texts if text]  # the other rank may have just begun to write
    assert left and all("test_heartbeat.py" in text for text in left)


@pytest.mark.parametrize("way", ["stopped", "failed", "silent"])
def test_ranks_that_wait_notice_one_that_has_left(ended: list[str], way: str) -> None:
    """Rank 0 is at something long that it does for all."""
    store = HashStore()
    hearts = hearts_of(store, 2, ended)
    time.sleep(0.2)
    if way == "silent":
        hearts[0]._ended.set()
        for thread in hearts[0]._threads:
            thread.join()
    elif way == "failed":
        hearts[0].abort("failed", "rank 0 on here: no space")
    else:
        hearts[0].abort("stopped", "SIGUSR1")
    device = torch.device("cpu")
    worlds = [World(1, 1, 2, 2, device, store, check=hearts[1].check) for _ in range(2)]
    kind: type[BaseException] = Stopped if way == "stopped" else ConnectionError
    words = {"stopped": "SIGUSR1", "failed": "no space", "silent": "rank 0 on "}[way]
    with pytest.raises(kind, match=words):
        worlds[0].run_once(lambda: None)
    with pytest.raises(kind, match=words):
        worlds[1].run_on_all(lambda: None)
    hearts[1].close()
    # The heartbeat itself may be the first to name a silent rank.
    assert way == "silent" or not ended
    assert all("rank 0 on " in line for line in ended)


def test_a_failure_of_one_rank_is_that_of_all() -> None:
    store, found = HashStore(), dict[int, str]()

    def work(rank: int, failing: tuple[int, ...]) -> None:
        def task() -> None:
            if rank in failing:
                raise ValueError(f"bad {rank}")

        try:
            worlds[rank].run_on_all(task)
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
            found[rank] = meet(store, rank, size, Patience(("127.0.0.1", 1), lambda: None))

        threads = [threading.Thread(target=join, args=(rank,)) for rank in order]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join(20)
        assert len(found) == size and len(set(found.values())) == 1
        names += set(found.values())
    assert len(set(names)) == 3
