"""This process among the ranks: its rank and device, work that one rank does for all, sums."""

import atexit
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import PrefixStore, Store, _abort_process_group

from dan_dist.distributed.cores import stay_beside
from dan_dist.distributed.device import choose_device
from dan_dist.distributed.rendezvous import Patience, Signalled, meet, open_store
from dan_dist.run.environment import read_address, read_launch
from shards.command import words
from shards.limits import core_count, core_quota

T = TypeVar("T")
POLL_S = 0.05
COLLECTIVE_S = 3600.0  # a hanging rank is found by its heartbeat, long before
LEAVE_S = 60.0  # that rank 0 waits at the end for ranks that have nothing to do but to end too
ABORT_S = 5.0  # that a process which has nothing else to do waits for its group to be aborted


@dataclass(frozen=True)
class World:
    """Rank, sizes and device of this process; passed to whoever needs to know."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    store: Store | None = None  # where ranks leave word for each other; None when alone
    check: Callable[[], None] = lambda: None  # raises where another rank has left the job
    neighbours: int | None = None  # ranks on the same cores, this one too; None: all of the node
    _calls: Iterator[int] = field(default_factory=itertools.count)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def cores(self) -> int:
        """This rank's share of the node's cores, or of those beside its GPU, and of a quota."""
        beside = core_count() // (self.neighbours or self.local_size)
        quota = core_quota()
        return max(1, beside if quota is None else min(beside, quota // self.local_size))

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`, summed over ranks in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def run_on_all(self, task: Callable[[], T]) -> T:
        """Runs `task` on every rank; if it fails on any, all raise the first rank's error.

        So bad input that one node alone sees ends the job with one line that names the rank.
        """
        if self.store is None:
            return task()
        name, results, failure = f"all/{next(self._calls)}", list[T](), None
        try:
            results.append(task())
        except (ValueError, OSError) as error:
            failure = error
            report = [isinstance(error, ValueError), words(error), socket.gethostname()]
            self.store.set(f"{name}/{self.rank}", json.dumps(report))
        self.store.add(f"{name}/{'failed' if failure else 'done'}", 1)
        while self.store.add(f"{name}/done", 0) + self.store.add(f"{name}/failed", 0) < self.size:
            self.check()
            time.sleep(POLL_S)
        if not self.store.add(f"{name}/failed", 0):
            return results[0]
        rank = next(r for r in range(self.size) if self.store.check([f"{name}/{r}"]))
        is_value, text, host = json.loads(self.store.get(f"{name}/{rank}"))
        where = f"rank {rank} on {host}: " if self.store.add(f"{name}/done", 0) else ""
        raise (ValueError if is_value else OSError)(where + text) from failure

    def run_once(self, task: Callable[[], str | None], *, per_node: bool = False) -> str:
        """Runs `task` on rank 0, or on one rank of each node, and gives all ranks its result.

        The others wait however long it takes: they poll the store instead of standing in a
        collective, which would time out, and look whether the rank is still there. If `task` fails
        anywhere, every rank raises.
        """
        if self.store is None:
            return task() or ""
        name, leads, ranks = f"once/{next(self._calls)}", self.is_main, self.size
        place = f"{name}/result"
        if per_node:
            leads, ranks = self.local_rank == 0, self.local_size
            place = f"{name}/result/{socket.gethostname()}"
        if leads:
            try:
                result = task()
            except (ValueError, OSError) as error:
                self.store.set(f"{name}/failed", f"rank {self.rank}: {words(error)}")
                raise
            self.store.set(place, result or "")
            self.store.add(f"{name}/done", ranks)
        while self.store.add(f"{name}/done", 0) < self.size:
            if self.store.check([f"{name}/failed"]):
                raise ValueError(self.store.get(f"{name}/failed").decode())
            self.check()
            time.sleep(POLL_S)
        return self.store.get(place).decode()

    def check_equal(self, name: str, value: str) -> None:
        """Compares a value over all ranks; where one's is not rank 0's, all ranks raise.

        Raises:
            ValueError: names the first rank that differs, and both values.
        """
        first = self.run_once(lambda: value)

        def compare() -> None:
            if value != first:
                raise ValueError(f"{name} is {value}, on rank 0 it is {first}")

        self.run_on_all(compare)

    def count_unique(self, name: str, item: int) -> int:
        """How many items the ranks have named, `item` now among them, each counted once."""
        assert self.store is not None
        is_new = self.store.add(f"{name}/{item}", 1) == 1
        return int(self.store.add(name, int(is_new)))


def init_world(device: str = "auto", signalled: Signalled = lambda: None) -> World:
    """Reads torchrun's environment (alone: world size 1) and joins the process group.

    device: see `choose_device`. nccl on GPUs, gloo on CPUs. signalled: the stop signal that ends
    the wait for other ranks, where it is not raised.

    Raises:
        ValueError: "cuda" without a usable GPU, or more ranks on this node than GPUs.
        OSError: the other ranks cannot be reached, or do not start; names them.
        Stopped: a stop signal, of this rank or another one, has come meanwhile.
    """
    rank, local_rank, size, local_size = read_launch()
    place = choose_device(device, local_rank, local_size)
    neighbours = stay_beside(place, local_size)
    # torchrun gives each of several ranks one thread; share the cores instead. One rank alone has
    # as many threads as the machine has cores, whatever its quota.
    threads = max(1, core_count() // local_size)
    is_limited = core_quota() is not None and threads < torch.get_num_threads()
    if place.type == "cpu" and (local_size > 1 or is_limited):
        torch.set_num_threads(threads)
    os.environ["DS_ACCELERATOR"] = place.type  # DeepSpeed reads it when it is imported
    store = None
    if size > 1:
        # On one node nobody else needs to reach what ranks listen on.
        if size == local_size and "lo" in [name for _, name in socket.if_nameindex()]:
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, "lo")
        patience = Patience(read_address(), signalled)
        shared = open_store(rank, size, patience)
        store = PrefixStore(meet(shared, rank, size, patience), shared)
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=COLLECTIVE_S),
            device_id=place if place.type == "cuda" else None,
        )
    return World(rank, local_rank, size, local_size, place, store, neighbours=neighbours)


def group_of_one(world: World) -> None:
    """Gives one rank alone what launchers give many: DeepSpeed would ask MPI who it is."""
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it


def close_world(world: World) -> None:
    """Leaves the process group; that of one rank alone, which DeepSpeed holds on to, stays.

    Rank 0 goes last: without torchrun the store is its process's, from which others may yet read.
    """
    if world.store is not None:
        with suppress(RuntimeError):  # the store has gone, with a launcher that has given up
            left = world.store.add("left", 1)
            until_s = time.monotonic() + LEAVE_S
            while world.is_main and left < world.size and time.monotonic() < until_s:
                time.sleep(POLL_S)
                left = world.store.add("left", 0)
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def abandon_world(world: World, code: int) -> None:
    """Leaves the process group after a failure, while other ranks may stand in a collective.

    Destroying it would wait for them, with nccl without end. Aborting should not, and may end the
    process at once: it begins when the process ends, which has then reported the failure. One that
    the abort keeps from ending ends with `code`.
    """
    if world.size == 1 or not dist.is_initialized():
        return
    is_reported = threading.Event()

    def abort() -> None:
        is_reported.wait()
        _abort_process_group()

    aborting = threading.Thread(target=abort, name="abort", daemon=True)
    aborting.start()  # now: a process that ends starts no thread any more

    def end() -> None:
        is_reported.set()
        aborting.join(ABORT_S)
        if aborting.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    atexit.register(end)
