"""A rank that fails while its process group hangs: the line and outcome.json come all the same."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed import HashStore, distributed_c10d

from conftest import outcome
from dan_dist import programs
from dan_dist.data.loader import Batch, Loader
from dan_dist.distributed import world as worlds
from dan_dist.distributed.heartbeat import Heartbeat


class CountingStore(HashStore):
    """Counts the requests that a store on another node would get."""

    requests = 0

    def __getattribute__(self, name: str) -> object:
        if name in ("set", "get", "check", "multi_get", "add"):
            self.requests += 1
        return super().__getattribute__(name)


REASON = "the disk of this rank is gone"


def hang(*_: object) -> None:
    """In C, deaf to signals, as nccl does where other ranks stand in a collective."""
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    for _ in range(2):
        libc.pthread_mutex_lock(mutex)


def fail_at_step_3(bad: int, end: Callable[..., object], config: str) -> None:
    """One rank of a training; rank `bad` fails, and does `end` in place of leaving its group."""
    following = Loader.__next__

    def broken(loader: Loader) -> Batch:
        if loader.augment is not None and loader.step >= 3:
            raise OSError(REASON)
        return following(loader)

    if os.environ["RANK"] == str(bad):
        dist.destroy_process_group = distributed_c10d._abort_process_group = end
        worlds._abort_process_group = end
        Loader.__next__ = broken  # type: ignore[method-assign]
    sys.argv = ["train.py", config]
    programs.train()


@pytest.mark.slow
@pytest.mark.parametrize(("bad", "end"), [(0, hang), (1, hang), (0, os.abort)])
def test_the_failure_is_reported_first(
    tiny, tmp_path: Path, bad: int, end: Callable[..., object]
) -> None:
    began = time.monotonic()
    found = run_ranks(2, fail_at_step_3, bad, end, str(tiny("run")), timeout_s=90)
    took = time.monotonic() - began
    errors = [x for e in found for x in e.stderr.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1 and errors[0].endswith(REASON), found
    assert all(ended.code for ended in found)
    state = outcome(tmp_path / "run")
    assert state["status"] == "failed" and state["reason"].endswith(REASON), state
    assert not (tmp_path / "run" / "outcome.json.reserve").exists()
    assert took < 60, took


@pytest.mark.parametrize("size", [2, 64, 200])
def test_a_heartbeat_costs_two_requests_whatever_the_number_of_ranks(size: int) -> None:
    store = CountingStore()
    for rank in range(1, size):
        store.set(f"beat/{rank}", f"1 0 works host step {rank}")
    heart = Heartbeat(None, 0, size, timeout_s=60, on_loss=print)
    heart._store = store
    for expected in (3, 2, 2):  # the first one looks for the others
        store.requests = 0
        heart._beat()
        assert store.requests == expected
    assert {rank: beat.doing for rank, (beat, _) in heart._seen.items()} == {
        rank: f"step {rank}" for rank in range(1, size)
    }


def test_a_heartbeat_does_not_wait_for_ranks_that_have_none_yet() -> None:
    store = CountingStore()
    store.set("beat/2", "1 0 failed host no space")
    heart = Heartbeat(None, 0, 4, timeout_s=60, on_loss=print)
    heart._store = store
    heart._beat()
    assert list(heart._seen) == [2]
    with pytest.raises(ConnectionError, match="no space"):
        heart.check()


def leave_while_it_hangs() -> None:
    """The end of a process that nothing but its group keeps."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the rank that ends later may get
    worlds.ABORT_S, worlds._abort_process_group = 0.2, hang
    dist.init_process_group("gloo")
    worlds.abandon_world(worlds.World(0, 0, 2, 2, worlds.torch.device("cpu")), code=3)
    print("reported")
    worlds.atexit._run_exitfuncs()


def test_an_abort_that_hangs_does_not_keep_the_process() -> None:
    for ended in run_ranks(2, leave_while_it_hangs, timeout_s=60):
        assert (ended.code, ended.stdout) == (3, "reported\n"), ended
