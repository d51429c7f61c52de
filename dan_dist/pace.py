"""The ranks' pace: what each does by itself before the others are needed, and who holds them up.

A step takes all ranks the same time, as each waits for the slowest. What differs is how long a rank
is busy before it meets them: it waits for its batch, and computes up to the first collective.
"""

from collections.abc import Sequence

import numpy as np

from dan_dist.distributed.world import World

FIFTH = 0.2  # of a step's time, by which a rank has to be later than the others to be named
STEADY = 0.5  # of an epoch's steps


class Pace:
    """Each rank's times since the last log line, and how often it was late this epoch."""

    def __init__(self, world: World) -> None:
        self._size = world.size
        self.restart()
        self._begin_epoch()

    def restart(self) -> None:
        """The times of the next log line begin."""
        self._waits_s, self._owns_s, self._timed = np.zeros(self._size), np.zeros(self._size), 0

    def _begin_epoch(self) -> None:
        self._late, self._late_s, self._steps = np.zeros(self._size), np.zeros(self._size), 0

    def add(self, times: Sequence[float], step_s: float | None) -> None:
        """Takes a step. times: each rank's wait_s, then each one's own_s.

        step_s: that the whole step took; None where something else happened in between.
        """
        waits_s, owns_s = np.array(times).reshape(2, self._size)
        self._waits_s += waits_s
        self._owns_s += owns_s
        self._timed += 1
        if step_s is None or self._size == 1:
            return
        usual_s = np.sort(owns_s)[(self._size - 1) // 2]
        is_late = owns_s - usual_s > FIFTH * step_s
        self._steps += 1
        self._late += is_late
        self._late_s += is_late * (owns_s - usual_s)

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
        """The ranks that were late in most steps of the epoch, which ends: rank, seconds, steps."""
        found = [
            (int(rank), float(self._late_s[rank] / self._late[rank]), int(self._late[rank]))
            for rank in np.flatnonzero(self._late > STEADY * self._steps)
        ]
        self._begin_epoch()
        return found
