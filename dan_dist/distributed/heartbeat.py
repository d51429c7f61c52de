"""A heartbeat of every rank, and the end of the job when one stops.

A collective does not name the rank that it waits for, and on a GPU it cannot be interrupted. So
every rank writes once a second what it is doing into the store that all share, and looks at the
others.
"""

import faulthandler
import math
import os
import socket
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, cast

from torch.distributed.distributed_c10d import Store

from dan_dist.distributed.rendezvous import Signalled
from dan_dist.distributed.world import World, abandon_world, close_world, init_world
from dan_dist.redaction import redact
from dan_dist.run.environment import report_failure
from dan_dist.run.signals import SIGNALS, Stopped

BEAT_S = 1.0
SILENT_S = 10.0  # without a beat, a process is stopped or its machine gone
YIELD_S = 5.0  # the rank that prints goes first, and the main thread before this one
PATIENT_S = 1800.0  # where compiling, or a slow disk, may take its time

# What a rank does: prepare, work with the others, the same with patience, nothing that the others
# wait for any more; or it has left.
State = Literal["starts", "works", "patient", "rests", "failed", "stopped"]
Kind = Literal["reading", "step", "evaluation", "checkpoint", "image", "rows"]
DOING: dict[Kind, str] = {
    "reading": "step {}, reading",
    "step": "step {}",
    "evaluation": "evaluation step {}",
    "checkpoint": "checkpoint of step {}",
    "image": "reading image {}",
    "rows": "writing rows up to image {}",
}


class Beat(NamedTuple):
    """A rank's last heartbeat."""

    number: int
    progress: int  # how often `beat` was called: in step with the other ranks
    state: State
    host: str
    doing: str  # where it has left: why


class Heartbeat:
    """One rank's heartbeat; `beat` is to be called at every step of work done together.

    on_loss is called with the line that names a lost rank, on one rank, before the process ends.
    stacks: the folder, or a file in it, where every rank then leaves what its threads stood at.
    """

    def __init__(
        self,
        store: Store | None,
        rank: int,
        size: int,
        *,
        timeout_s: float,
        on_loss: Callable[[str], None],
        stacks: Path | None = None,
    ) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._timeout_s, self._on_loss, self._stacks = timeout_s, on_loss, stacks
        self._silent_s = min(SILENT_S, timeout_s / 2)
        self._number = self._progress = 0
        self._state: State = "starts"
        self._doing, self._kinds = "starting", set[Kind]()
        # since any rank last went on; since the store last answered; since a rank has left
        self._moved_s = self._beaten_s = time.monotonic()
        self._left_s: float | None = None
        self._heard: list[int] = []  # the others that have a beat in the store
        self._seen: dict[int, tuple[Beat, float]] = {}  # rank → its last beat, since when
        self._ended = threading.Event()
        # Two threads: the store may hang along with rank 0, whose process can be what holds it.
        self._threads = [
            threading.Thread(target=work, name="heartbeat", daemon=True)
            for work in (self._beat_on, self._watch_on)
        ]
        for thread in self._threads if store is not None else ():
            thread.start()

    def beat(self, kind: Kind, number: int) -> None:
        """This rank goes on, with work of this kind, at step `number`.

        The first beat of a kind is patient, as it may compile, and so is each that writes, as the
        disk may be slow.
        """
        is_patient = kind in ("checkpoint", "rows") or kind not in self._kinds
        self._kinds.add(kind)
        self._progress += 1
        self._state, self._doing = "patient" if is_patient else "works", DOING[kind].format(number)
        self._moved_s = time.monotonic()

    def finish(self) -> None:
        """Nothing more is done together: no deadline from here on."""
        self._state, self._doing = "rests", "ending"

    def abort(self, state: Literal["failed", "stopped"], why: str) -> None:
        """This rank ends before the others, who are to end as well."""
        self._state, self._doing = state, " ".join(why.split())
        self.close()

    def close(self) -> None:
        if self._state not in ("failed", "stopped"):
            self.finish()
        self._ended.set()
        for thread in self._threads if self._store is not None else ():
            thread.join(self._silent_s)

    def check(self) -> None:
        """Looks at the other ranks before more is done together.

        Raises:
            Stopped: one got a stop signal. ConnectionError: one has failed, or fallen silent.
        """
        self._raise_if_left(self._timeout_s)

    def find_lost(self) -> None:
        """After a failed collective: raises as `check` does, once the others' states are known."""
        deadline_s = time.monotonic() + self._silent_s + 2 * BEAT_S
        while self._size > 1 and time.monotonic() < deadline_s:
            self._raise_if_left(self._silent_s)
            time.sleep(BEAT_S / 2)

    def _raise_if_left(self, silent_s: float) -> None:
        if (left := self._left()) is not None:
            raise Stopped(left.doing) if left.state == "stopped" else ConnectionError(left.doing)
        if silent := self._silent(silent_s):
            raise ConnectionError(self._name(silent, "has ended or hangs"))

    def _beat_on(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(BEAT_S)
            try:
                self._beat()
            except Exception:  # the store has gone, with rank 0 or its launcher
                continue
            self._beaten_s = time.monotonic()

    def _beat(self) -> None:
        assert self._store is not None
        self._number += 1
        own = Beat(self._number, self._progress, self._state, socket.gethostname(), self._doing)
        self._store.set(f"beat/{self._rank}", " ".join(map(str, own)))
        self._find_unheard()
        texts = self._store.multi_get([f"beat/{rank}" for rank in self._heard])
        for rank, text in zip(self._heard, texts, strict=True):
            number, progress, state, host, doing = text.decode().split(" ", 4)
            beat = Beat(int(number), int(progress), cast(State, state), host, doing)
            last, _ = self._seen.get(rank, (None, 0.0))
            if last is None or last[1:] != beat[1:]:
                self._moved_s = time.monotonic()
            if last != beat:
                self._seen[rank] = beat, time.monotonic()

    def _find_unheard(self) -> None:
        """Looks for the first beats of others; asking for one that is not there would wait for it.

        Once all are there nothing is asked: with a request for each rank, hundreds of them would
        keep the store from answering.
        """
        assert self._store is not None
        unheard = sorted(set(range(self._size)) - {self._rank, *self._heard})
        if unheard and self._store.check([f"beat/{rank}" for rank in unheard]):
            self._heard += unheard
        elif len(unheard) > 1:
            self._heard += [rank for rank in unheard if self._store.check([f"beat/{rank}"])]

    def _watch_on(self) -> None:
        last_s = time.monotonic()
        while not self._ended.wait(BEAT_S):
            now = time.monotonic()
            if now - last_s > self._silent_s:  # it was this process that was stopped
                self._moved_s = self._beaten_s = now
                self._seen = {rank: (beat, now) for rank, (beat, _) in list(self._seen.items())}
            last_s = now
            self._watch(now)

    def _watch(self, now: float) -> None:
        """Ends this process where it cannot go on with the others."""
        seen = list(self._seen.items())
        if self._state == "rests":
            return
        stands = now - self._moved_s > self._patience_s()
        if now - self._beaten_s > (self._silent_s if stands else self._timeout_s):
            if now - self._moved_s > self._timeout_s:  # what is known of the others is old
                self._leave_stacks()
                self._end("the store of the job, on rank 0's node, does not answer", True)
        elif (left := self._left()) is not None:
            self._left_s = self._left_s or now
            if left.state == "stopped" and now - self._left_s < YIELD_S:
                if BEAT_S < now - self._left_s < 3 * BEAT_S:
                    interrupt_main(SIGNALS[0])  # it may be at something long of its own
            elif now - self._left_s > 2 * BEAT_S:
                self._end(left.doing, self._rank == 0, code=int(left.state == "failed"))
        elif silent := self._silent(self._silent_s if stands else self._timeout_s):
            self._give_up(silent, "is silent")
        elif stands:
            least = min([beat.progress for _, (beat, _) in seen] + [self._progress])
            behind = [rank for rank, (beat, _) in seen if beat.progress == least]
            self._give_up(behind + [self._rank] * (self._progress == least), "does not go on")

    def _patience_s(self) -> float:
        """How long all may stand still: as long as the most patient of them asks for."""
        states = {self._state, *(beat.state for beat, _ in list(self._seen.values()))}
        if states & {"starts", "rests"}:
            return math.inf
        return max(PATIENT_S, self._timeout_s) if "patient" in states else self._timeout_s

    def _left(self) -> Beat | None:
        """The word of a rank that has left; a stop before a failure, which may follow from it."""
        left = [b for b, _ in list(self._seen.values()) if b.state in ("failed", "stopped")]
        return max(left, key=lambda beat: beat.state, default=None)

    def _silent(self, silent_s: float) -> list[int]:
        now, seen = time.monotonic(), list(self._seen.items())
        return [
            rank for rank, (beat, since_s) in seen
            if now - since_s > silent_s and beat.state != "rests"
        ]  # fmt: skip

    def _give_up(self, culprits: list[int], what: str) -> None:
        """No step for too long: names the rank that the others wait for, and ends this process."""
        self._leave_stacks()  # first: the launcher ends the others once one has ended
        others = set(range(self._size)) - set(culprits)
        line = self._name(sorted(culprits), f"{what} for {self._timeout_s:.0f} s")
        self._end(
            f"{line}; train.timeout_s is {self._timeout_s:.0f}",
            self._rank == min(others or culprits),
        )

    def _leave_stacks(self) -> None:
        if self._stacks is not None:
            _within(SILENT_S, partial(write_stacks, self._stacks, self._rank))

    def _name(self, ranks: list[int], what: str) -> str:
        names = []
        for rank in ranks:
            host, doing = socket.gethostname(), self._doing
            if rank in self._seen:
                _, _, _, host, doing = self._seen[rank][0]
            names.append(f"rank {rank} on {host} ({doing})")
        return f"{', '.join(names)} {what}"

    def _end(self, line: str, prints: bool, *, code: int = 1) -> None:
        """The main thread may stand in a collective that cannot be interrupted."""
        try:
            if prints and code:
                _within(SILENT_S, partial(self._on_loss, line))
                print(f"error: {redact(line)}", file=sys.stderr, flush=True)
                report_failure(redact(line))
            elif code:
                time.sleep(YIELD_S)
        finally:
            os._exit(code)


def _within(most_s: float, task: Callable[[], object]) -> None:
    """Does a task that writes, while that ends: a disk, too, may fail or hang."""
    thread = threading.Thread(target=task, daemon=True)
    thread.start()
    thread.join(most_s)


def write_stacks(place: Path, rank: int) -> None:
    """Leaves what every thread of this process stands at as stacks-rank<r>.txt, where it can.

    place: a folder, or a file in it.
    """
    folder = place if place.is_dir() else place.parent
    with suppress(OSError), (folder / f"stacks-rank{rank}.txt").open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)


@contextmanager
def session(
    device: str,
    *,
    timeout_s: float,
    on_loss: Callable[[str], None],
    signalled: Signalled = lambda: None,
    stacks: Path | None = None,
) -> Iterator[tuple[World, Heartbeat]]:
    """The ranks' world and this rank's heartbeat, for work done together; both end with it.

    After a failure nothing here waits for the other ranks: its line has yet to be written.

    device, signalled, timeout_s, on_loss, stacks: see `init_world` and `Heartbeat`.

    Raises:
        ConnectionError: a rank was lost, or has failed; names it. Stopped: one got a stop signal.
    """
    world = init_world(device, signalled)
    heart = Heartbeat(
        world.store, world.rank, world.size, timeout_s=timeout_s, on_loss=on_loss, stacks=stacks
    )
    try:
        try:
            yield replace(world, check=heart.check), heart
        except RuntimeError:
            heart.find_lost()
            raise
    except Stopped as stopped:
        heart.abort("stopped", str(stopped))
        abandon_world(world, code=0)
        raise
    except Exception as error:
        line = str(error).split("\n")[0]
        named = isinstance(error, ConnectionError)
        where = f"rank {world.rank} on {socket.gethostname()}: "
        heart.abort("failed", line if named else where + line)
        abandon_world(world, code=1)
        raise
    else:
        heart.close()
        close_world(world)
    finally:
        heart.close()
