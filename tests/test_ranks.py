"""Forked ranks find each other, fail, hang and leave nothing behind."""

import os
import threading
import time
from multiprocessing import get_start_method
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from interpreter import python
from ranks import ranks, run_ranks

from dan_dist.distributed.world import close_world, init_world


def add_up(number: int) -> tuple[int, int, int]:
    world = init_world("cpu")
    total = int(world.sum(torch.tensor(number + world.rank)))
    close_world(world)
    return world.rank, total, threading.active_count()


def fail_on(rank: str) -> str:
    print("begun")
    if os.environ["RANK"] == rank:
        raise ValueError(f"bad {rank}")
    time.sleep(60)
    return ""


def hang(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def look_around() -> tuple[Path, str, bool, int]:
    return Path.cwd(), os.environ.get("WORLD_SIZE", ""), dist.is_initialized(), os.getppid()


def test_ranks_join_and_add_up() -> None:
    found = ranks(3, add_up, 10)
    assert [(rank, total) for rank, total, _ in found] == [(0, 33), (1, 33), (2, 33)]
    assert [tuple(r)[:3] for r in ranks(1, look_around)] == [(Path.cwd(), "", False)]


def test_the_first_failure_ends_all(tmp_path: Path) -> None:
    began_s = time.monotonic()
    with pytest.raises(ValueError, match="bad 1") as caught:
        ranks(2, fail_on, "1")
    assert time.monotonic() - began_s < 30 and "begun" in "".join(caught.value.__notes__)
    ended = run_ranks(2, fail_on, "0")
    assert [rank.code for rank in ended] == [1, -15]


def test_ranks_that_hang_are_killed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] took more than 5 s"):
        ranks(2, hang, tmp_path, timeout_s=5)
    pids = [path.name for path in tmp_path.iterdir()]
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_the_server_forks_and_runs_one_thread() -> None:
    """A fork copies the thread that forks, and no other: locks of others would stay locked.

    jemalloc, which pyarrow brings, takes care of its own.
    """
    ((*_, parent),) = ranks(1, look_around)
    pid = Path(python()).with_name("pid").read_text()
    assert parent == int(pid)
    names = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/comm")]
    assert len([name for name in names if name != "jemalloc_bg_thd\n"]) == 1


def start_method() -> str | None:
    return get_start_method(allow_none=True)


def test_a_rank_starts_processes_as_by_default() -> None:
    """As its server does, tqdm's lock would be a named semaphore, left by a rank that is killed."""
    assert ranks(1, start_method) == [None]
