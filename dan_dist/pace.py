"""The ranks' pace: what each does by itself before the others are needed, and who holds them up.

A step takes all ranks the same time, as each waits for the slowest. What differs is how long a rank
is busy before it meets them: it waits for its batch, and computes up to the first collective.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dan_dist.distributed.world import World

FIFTH = 0.2  # of a step's time, by which a rank has to be later than the others to be named
STEADY = 0.5  # of an epoch
WINDOW = 8  # steps that are judged together: where several threads read, batches come in bursts


class Pace:
    """Each rank's times since the last log line, and those of the epoch's steps."""

    def __init__(self, world: World) -> None:
        self._size = world.size
        self.restart()
        self._begin_epoch()

    def restart(self) -> None:
        """The times of the next log line begin."""
        self._waits_s, self._owns_s, self._timed = np.zeros(self._size), np.zeros(self._size), 0

    def _begin_epoch(self) -> None:
        self._epoch: list[NDArray[np.float32]] = []  # of each step, (ranks + 1,): owns_s, step_s

    def add(self, times: Sequence[float], step_s: float | None) -> None:
        """Takes a step. times: each rank's wait_s, then each one's own_s.

        step_s: that the whole step took; None where something else happened in between.
        """
        waits_s, owns_s = np.array(times).reshape(2, self._size)
        self._waits_s += waits_s
        self._owns_s += owns_s
        self._timed += 1
        if step_s is not None and self._size > 1:
            self._epoch.append(np.array([*owns_s, step_s], np.float32))

    def slowest(self) -> int:
        """The rank that has waited longest for its batches since the last log line."""
        return int(self._waits_s.argmax())

    def metrics(self, elapsed_s: float) -> dict[str, float]:
        """The spread since the last log line: least, mean, most and which rank, seconds a step."""
        owns_s = self._owns_s / max(1, self._timed)
        return {
            "train/wait_share_max": float(self._waits_s.max()) / elapsed_s,
            "train/own_s_least": float(owns_s.min()),
            "train/own_s_mean": float(owns_s.mean()),
            "train/own_s_most": float(owns_s.max()),
            "train/slowest_rank": float(owns_s.argmax()),
        }

    def late_ranks(self) -> list[tuple[int, float, int]]:
        """The ranks that were late in most of the epoch, which ends: rank, seconds a step, steps.

        Judged by the sums of WINDOW steps, or of a third of a short epoch's.
        """
        steps = np.array(self._epoch).reshape(-1, self._size + 1)
        self._begin_epoch()
        if not len(steps):
            return []
        starts = np.arange(0, len(steps), max(1, min(WINDOW, len(steps) // 3)))
        lengths = np.diff(starts, append=len(steps))
        sums = np.add.reduceat(steps, starts)
        owns_s, took_s = sums[:, :-1], sums[:, -1:]
        later_s = owns_s - np.sort(owns_s)[:, [(self._size - 1) // 2]]
        is_late = later_s > FIFTH * took_s
        found = []
        for rank in np.flatnonzero(is_late.mean(axis=0) > STEADY):
            own = is_late[:, rank]
            late_s, count = later_s[own, rank].sum(), int(lengths[own].sum())
            found.append((int(rank), float(late_s / count), count))
        return found
