"""A sign of life from every rank, and the end of the job when one fails to give it.

A collective does not say for whom it waits, and on a GPU it cannot be interrupted. So every rank
writes once a second what it is doing into the store that all share, and looks at the others.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch.distributed.distributed_c10d import Store

from dan_dist.world import World, close_world, init_world

BEAT_S = 1.0
SILENT_S = 10.0  # without a beat, a process is stopped or its machine gone
YIELD_S = 5.0  # the rank that speaks goes first


class Beat(NamedTuple):
    """What a rank last said of itself."""

    number: int
    progress: int  # how often `advance` was called: in step with the other ranks
    host: str
    doing: str


class Pulse:
    """One rank's sign of life; `advance` is to be called at every step of work done together.

    on_loss is called with the line that names a lost rank, on one rank, before the process ends.
    """

    def __init__(
        self,
        store: Store | None,
        rank: int,
        size: int,
        *,
        timeout_s: float,
        on_loss: Callable[[str], None],
    ) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._timeout_s, self._on_loss = timeout_s, on_loss
        self._silent_s = min(SILENT_S, timeout_s / 2)
        self._number = self._progress = 0
        self._doing, self._advanced_s = "starting", time.monotonic()
        self._seen: dict[int, tuple[Beat, float]] = {}  # rank → its last beat, since when
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        if store is not None:
            self._thread.start()

    def advance(self, doing: str) -> None:
        """Says that this rank goes on, and with what."""
        self._progress += 1
        self._doing, self._advanced_s = doing, time.monotonic()

    def close(self) -> None:
        self._ended.set()
        if self._store is not None:
            self._thread.join()

    def lost(self) -> str | None:
        """After a failed collective: the line that names the ranks that have fallen silent."""
        if self._store is None:
            return None
        deadline_s = time.monotonic() + self._silent_s + 2 * BEAT_S
        while time.monotonic() < deadline_s:
            if silent := self._silent():
                return self._name(silent, "has ended or hangs")
            time.sleep(BEAT_S / 2)
        return None

    def _run(self) -> None:
        last_s = time.monotonic()
        while not self._ended.wait(BEAT_S):
            now = time.monotonic()
            if now - last_s > self._silent_s:  # it was this process that was stopped
                self._advanced_s = now
                self._seen = {rank: (beat, now) for rank, (beat, _) in self._seen.items()}
            last_s = now
            try:
                self._beat()
            except Exception:  # the store has gone, with rank 0 or its launcher
                if time.monotonic() - self._advanced_s > self._timeout_s:
                    self._end("the store of the job, on rank 0's node, does not answer", True)
                continue
            if self._progress and time.monotonic() - self._advanced_s > self._timeout_s:
                self._give_up()

    def _beat(self) -> None:
        assert self._store is not None
        self._number += 1
        own = f"{self._number} {self._progress} {socket.gethostname()} {self._doing}"
        self._store.set(f"pulse/{self._rank}", own)
        for rank in range(self._size):
            if rank == self._rank or not self._store.check([f"pulse/{rank}"]):
                continue
            number, progress, host, doing = self._store.get(f"pulse/{rank}").decode().split(" ", 3)
            beat = Beat(int(number), int(progress), host, doing)
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = beat, time.monotonic()

    def _silent(self) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, since_s) in self._seen.items() if now - since_s > self._silent_s]

    def _give_up(self) -> None:
        """No step for too long: says which rank the others wait for, and ends this process."""
        silent = self._silent()
        least = min([beat.progress for beat, _ in self._seen.values()] + [self._progress])
        behind = [rank for rank, (beat, _) in self._seen.items() if beat.progress == least]
        if self._progress == least:
            behind.append(self._rank)
        culprits = silent or sorted(behind)
        speaks = self._rank == min(set(range(self._size)) - set(culprits) or {min(culprits)})
        what = "is silent" if silent else "does not go on"
        self._end(self._name(culprits, f"{what} for {self._timeout_s:.0f} s"), speaks)

    def _name(self, ranks: list[int], what: str) -> str:
        names = []
        for rank in ranks:
            if rank in self._seen:
                beat = self._seen[rank][0]
                names.append(f"rank {rank} on {beat.host} ({beat.doing})")
            else:
                names.append(f"rank {rank} on {socket.gethostname()} ({self._doing})")
        return f"{', '.join(names)} {what}"

    def _end(self, line: str, speaks: bool) -> None:
        if speaks:
            self._on_loss(line)
            print(f"error: {line}; train.timeout_s is {self._timeout_s:.0f}", file=sys.stderr,
                  flush=True)  # fmt: skip
        else:
            time.sleep(YIELD_S)
        os._exit(1)  # the main thread stands in a collective that cannot be interrupted


@contextmanager
def joined(
    device: str, *, timeout_s: float, on_loss: Callable[[str], None]
) -> Iterator[tuple[World, Pulse]]:
    """The ranks' world and this rank's pulse, for work done together; both end with it.

    device, timeout_s, on_loss: see `init_world` and `Pulse`.

    Raises:
        ConnectionError: a collective failed because a rank was lost; names it.
    """
    world = init_world(device)
    pulse = Pulse(world.store, world.rank, world.size, timeout_s=timeout_s, on_loss=on_loss)
    try:
        yield world, pulse
    except RuntimeError as error:
        if world.size > 1 and (line := pulse.lost()):
            raise ConnectionError(line) from error
        raise
    finally:
        pulse.close()
        close_world(world)
