"""torch's WeightedRandomSampler under a DistributedSampler, all ranks' generators of one seed."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, WeightedRandomSampler

from benchmarks.peers.question import BATCH, SEED, Batch, ask, labels_of


class Drawn(Dataset[tuple[int, float]]):
    """The samples that were drawn, in turn; each augmented by a number of the rank's generator."""

    def __init__(self, order: Sequence[int]) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, at: int) -> tuple[int, float]:
        return self.order[at], torch.rand(()).item()


def draw(samples: int) -> list[int]:
    labels = labels_of(samples)
    weights: Any = torch.from_numpy((1 / np.bincount(labels))[labels])
    generator = torch.Generator().manual_seed(SEED)
    return list(WeightedRandomSampler(weights, samples, generator=generator))


class Torch:
    def batches(self, rank: int, world: int, start: int) -> Iterator[Batch]:
        torch.manual_seed(SEED)
        drawn = Drawn(draw(len(labels_of())))
        ranks: DistributedSampler[Any] = DistributedSampler(
            drawn, world, rank, shuffle=False, drop_last=True
        )
        # Nothing saves where a loader is: to go on means to load what came before
        for step, (ids, numbers) in enumerate(DataLoader(drawn, BATCH // world, sampler=ranks)):
            if step >= start:
                yield Batch(ids.tolist(), numbers.tolist())

    def order(self, samples: int) -> Iterator[int]:
        yield len(draw(samples))


if __name__ == "__main__":
    ask(Torch())
