"""mosaicml-streaming: a stream a class, in equal proportions, batched "stratified"."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from streaming import MDSWriter, Stream, StreamingDataset
from streaming.base.batching import generate_work
from streaming.base.util import clean_stale_shared_memory
from streaming.base.world import World

from benchmarks.peers.question import BATCH, COUNTS, SEED, Batch, ask, folder, labels_of

SHARD = 1 << 20  # samples a shard of the large set


def write(root: Path) -> None:
    """A set of sample numbers for each class."""
    labels = labels_of()
    for c in range(len(COUNTS)):
        if not (root / str(c)).exists():
            with MDSWriter(out=str(root / str(c)), columns={"id": "int"}) as out:
                for sample in np.flatnonzero(labels == c).tolist():
                    out.write({"id": sample})


def write_large(root: Path, samples: int) -> None:
    """Indexes whose shards are holes: of an order, no sample is read."""
    for c, count in enumerate(np.bincount(labels_of(samples)).tolist()):
        part, shards = root / f"large-{c}", []
        part.mkdir(parents=True, exist_ok=True)
        for number in range(-(-count // SHARD)):
            name = f"shard.{number:05}.mds"
            (part / name).write_bytes(bytes(8))
            raw = {"basename": name, "bytes": 8, "hashes": {}}
            shards.append({
                "column_encodings": ["int"], "column_names": ["id"], "column_sizes": [8],
                "compression": None, "format": "mds", "hashes": [], "raw_data": raw,
                "samples": min(SHARD, count - number * SHARD), "size_limit": 1 << 26,
                "version": 2, "zip_data": None,
            })  # fmt: skip
        (part / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))


def opened(roots: list[Path], batch: int) -> StreamingDataset:
    clean_stale_shared_memory()
    return StreamingDataset(
        streams=[Stream(local=str(root), proportion=1 / len(roots)) for root in roots],
        batch_size=batch, shuffle=True, shuffle_seed=SEED, num_canonical_nodes=1,
        shuffle_block_size=1 << 18, batching_method="stratified",
    )  # fmt: skip


class Streaming:
    """One process takes the work of any rank: the function that gives it takes the world."""

    def __init__(self) -> None:
        write(folder())
        self.whole: StreamingDataset | None = None

    def batches(self, rank: int, world: int, start: int) -> Iterator[Batch]:
        if self.whole is None:
            self.whole = opened([folder() / str(c) for c in range(len(COUNTS))], BATCH)
        self.whole.batch_size = BATCH // world
        ranks = World(num_nodes=1, ranks_per_node=world, workers_per_rank=1, worker=0)
        seen = start * (BATCH // world) * world
        work = generate_work("stratified", self.whole, ranks, 0, seen)
        torch.manual_seed(SEED)  # an augmentation has its rank's generator, from its start
        for ids in work[0, rank, 0].tolist():
            yield Batch(ids, torch.rand(len(ids)).tolist())

    def order(self, samples: int) -> Iterator[int]:
        write_large(folder(), samples)
        whole = opened([folder() / f"large-{c}" for c in range(len(COUNTS))], 256)
        ranks = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
        yield generate_work("stratified", whole, ranks, 0, 0).size


if __name__ == "__main__":
    ask(Streaming())
