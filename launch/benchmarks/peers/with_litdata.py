"""LitData: a combined dataset of a streaming dataset a class, in equal weights."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset
from litdata.streaming.writer import BinaryWriter

from benchmarks.peers import question
from benchmarks.peers.question import BATCH, BOUND_S, COUNTS, SEED, Batch, ask, folder, labels_of

CHUNK = 8  # samples: of the smallest class, most ranks have one


def numbered(sample: int) -> tuple[int, float]:
    """A sample's number, and one of torch's for its augmentation."""
    return sample, torch.rand(()).item()


def write(root: Path, samples: Iterator[int] | list[int], chunk: int) -> None:
    """A finished data set of these sample numbers."""
    root.mkdir(parents=True)
    writer = BinaryWriter(str(root), chunk_size=chunk)
    for at, sample in enumerate(samples):
        writer[at] = sample
    writer.done()
    writer.merge()


class LitData:
    def __init__(self) -> None:
        labels = labels_of()
        for c in range(len(COUNTS)):
            if not (folder() / str(c)).exists():
                write(folder() / str(c), np.flatnonzero(labels == c).tolist(), CHUNK)

    def batches(self, rank: int, world: int, start: int) -> Iterator[Batch]:
        os.environ.update(WORLD_SIZE=str(world), GLOBAL_RANK=str(rank), NNODES="1")
        loader = question.resumed(
            lambda: self._loader(rank, world), start,
            lambda loader: loader.state_dict(),
            lambda loader, state: loader.load_state_dict(state),
        )  # fmt: skip
        while True:  # an epoch ends where the smallest class does
            is_empty = True
            for ids, numbers in loader:
                is_empty = False
                yield Batch(ids.tolist(), numbers.tolist())
            if is_empty:
                raise ValueError(f"an epoch of rank {rank} of {world} is empty")

    def _loader(self, rank: int, world: int) -> Any:
        torch.manual_seed(SEED)
        parts = []
        for c in range(len(COUNTS)):
            part = StreamingDataset(
                str(folder() / str(c)), shuffle=True, seed=SEED, drop_last=True, transform=numbered
            )
            parts.append(part)
        drawn = CombinedStreamingDataset(
            parts, seed=SEED, weights=[1 / len(parts)] * len(parts), iterate_over_all=False
        )
        return StreamingDataLoader(drawn, batch_size=BATCH // world)

    def order(self, samples: int) -> Iterator[int]:
        """Which class comes next is drawn sample by sample; its samples have to be there."""
        root = folder() / "large"

        def counted() -> Iterator[int]:
            began_s = time.perf_counter()
            for sample in range(samples):
                if sample % 10_000 == 0 and time.perf_counter() - began_s > BOUND_S:
                    return
                yield sample

        write(root, counted(), 1 << 16)
        yield 0


if __name__ == "__main__":
    ask(LitData())
