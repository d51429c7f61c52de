"""Grain: a mixture of the classes' repeated shuffles; a rank takes every world-th of it."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from benchmarks.peers.question import BATCH, SEED, Batch, ask, labels_of


def mixture(samples: int) -> Any:
    labels = labels_of(samples)
    classes = [np.flatnonzero(labels == c) for c in range(labels.max() + 1)]
    parts = [grain.MapDataset.source(ids).seed(SEED).shuffle().repeat() for ids in classes]
    return grain.MapDataset.mix(parts, weights=[1.0] * len(parts))


class Grain:
    def batches(self, rank: int, world: int, start: int) -> Iterator[Batch]:
        drawn = mixture(len(labels_of())).seed(SEED)
        drawn = drawn.random_map(lambda sample, rng: (sample, rng.random()))
        steps = drawn[rank::world].batch(BATCH // world).to_iter_dataset()
        loader = iter(steps)
        if start:
            saved = iter(steps)
            for _ in range(start):
                next(saved)
            loader.set_state(saved.get_state())
        for ids, numbers in loader:
            yield Batch(ids.tolist(), numbers.tolist())

    def order(self, samples: int) -> Iterator[int]:
        drawn = mixture(samples)
        for seen in range(samples):
            drawn[seen]
            if seen % 10_000 == 0:
                yield seen
        yield samples


if __name__ == "__main__":
    ask(Grain())
