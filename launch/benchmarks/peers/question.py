"""What every peer is asked, by a script of its own in its own environment: numpy alone.

A data set of seven classes of very different sizes is to be trained with balanced global batches of
64 images on several numbers of ranks, and with one random number an image for its augmentation. A
peer answers in `Peer.batches`; 64 images a step where they divide by the ranks, else fewer.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

# In AffectNet's proportions, the least so large that no class of a rank ends before the steps do
COUNTS = (26880, 14960, 5080, 4960, 2800, 1260, 740)
BATCH, STEPS, RESUMED_AT, SEED = 64, 40, 17, 1
WORLDS = (1, 2, 3, 5, 8, 64)
RESUMED_WORLDS = (1, 2, 8)
LARGE = 10_000_000
BOUND_S = 60.0

Labels = NDArray[np.int64]


class Batch(NamedTuple):
    """A rank's images of a step, and what its augmentation drew for each."""

    ids: list[int]
    numbers: list[float]


class Peer(Protocol):
    """A way to order a training."""

    def batches(self, rank: int, world: int, start: int) -> Iterator[Batch]:
        """A rank's steps; start: of a run that was saved after so many and goes on."""
        ...

    def order(self, samples: int) -> Iterator[int]:
        """Goes through an epoch's order of so many samples; yields how many there are so far."""
        ...


def labels_of(samples: int = sum(COUNTS)) -> Labels:
    """The class of each sample, in these proportions, sorted."""
    bounds = np.cumsum(COUNTS) / sum(COUNTS) * samples
    return np.searchsorted(bounds, np.arange(samples), side="right")


def ask(peer: Peer) -> None:
    """Prints the answers as JSON: `small` of the order, `large` of time and memory."""
    answers = _large(peer) if sys.argv[1] == "large" else _small(peer)
    print(json.dumps(answers))


def folder() -> Path:
    """Where a peer may write its data set."""
    return Path(sys.argv[2])


def resumed(
    make: Callable[[], Any], start: int, save: Callable[[Any], Any], load: Callable[[Any, Any], Any]
) -> Any:
    """A loader in the state of another one that has given `start` steps.

    save, load: take a loader's state, and give one to a loader.
    """
    loader = make()
    if start:
        saved = make()
        steps = iter(saved)
        for _ in range(start):
            next(steps)
        load(loader, save(saved))
    return loader


def _small(peer: Peer) -> dict[str, Any]:
    labels = labels_of()
    runs: dict[int, list[list[Batch]]] = {}
    failed: dict[str, str] = {}
    for world in WORLDS:
        try:
            runs[world] = _run(peer, world, 0)
        except Exception as error:
            failed[str(world)] = _line(error)
    if 1 not in runs:
        return {"failed": failed}
    first = runs[1]
    again: dict[int, list[list[Batch]]] = {}
    for world in RESUMED_WORLDS:
        try:
            again[world] = _run(peer, world, RESUMED_AT)
        except Exception as error:
            failed[f"{world}, resumed"] = _line(error)
    return {
        "balance": {w: _imbalance(labels, run) for w, run in runs.items()},
        "order": [w for w, run in runs.items() if _ids(run) == _ids(first)],
        "augmentation": [w for w, run in runs.items()
                         if _ids(run) == _ids(first) and _numbers(run) == _numbers(first)],
        "resume": [w for w in again if _ids(again[w]) == _ids(runs[w][RESUMED_AT:])],
        "resume, augmented": [w for w in again if again[w] == runs[w][RESUMED_AT:]],
        "failed": failed,
    }  # fmt: skip


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _run(peer: Peer, world: int, start: int) -> list[list[Batch]]:
    """The ranks' batches of each step."""
    ranks = []
    for rank in range(world):
        steps = peer.batches(rank, world, start)
        ranks.append([next(steps) for _ in range(STEPS - start)])
    return [list(step) for step in zip(*ranks, strict=True)]


def _imbalance(labels: Labels, run: list[list[Batch]]) -> float:
    """The most that a class's total differed from its share, at any step counted from 0."""
    ids = [[i for batch in step for i in batch.ids] for step in run]
    drawn = np.cumsum([np.bincount(labels[i], minlength=len(COUNTS)) for i in ids], axis=0)
    return float(np.abs(drawn - drawn.sum(axis=1, keepdims=True) / len(COUNTS)).max())


def _ids(run: list[list[Batch]]) -> list[list[int]]:
    """The global batches, whoever has which part of them."""
    return [sorted(i for batch in step for i in batch.ids) for step in run]


def _numbers(run: list[list[Batch]]) -> list[list[tuple[int, float]]]:
    return [sorted(pair for b in step for pair in zip(b.ids, b.numbers, strict=True))
            for step in run]  # fmt: skip


def _large(peer: Peer) -> dict[str, Any]:
    base = _peak_mib()
    began_s, seen = time.perf_counter(), 0
    for ordered in peer.order(LARGE):
        seen = ordered
        if time.perf_counter() - began_s > BOUND_S:
            break
    seconds = time.perf_counter() - began_s
    return {"samples": seen, "seconds": seconds, "mib": _peak_mib() - base}


def _peak_mib() -> float:
    """The most memory of this process; what `getrusage` has is the starting process's too."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 1024
