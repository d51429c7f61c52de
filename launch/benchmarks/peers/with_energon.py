"""Megatron-Energon: a blend of a WebDataset a class, in equal weights, restored from its state."""

import json
import tarfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon import (
    DefaultTaskEncoder,
    TextSample,
    WorkerConfig,
    get_savable_loader,
    get_train_dataset,
)
from megatron.energon.flavors.webdataset.base_webdataset import BaseWebdatasetFactory

from benchmarks.peers.question import (
    BATCH,
    BOUND_S,
    COUNTS,
    RESUMED_WORLDS,
    SEED,
    Batch,
    ask,
    folder,
    labels_of,
    resumed,
)

SAMPLE_TYPE = """sample_type: {__module__: megatron.energon, __class__: TextSample}
field_map: {text: txt}
"""


class Numbered(DefaultTaskEncoder[Any, Any, Any, Any]):
    """A sample's number, and one of torch's for its augmentation."""

    def encode_sample(self, sample: TextSample) -> tuple[int, float]:
        return int(sample.text), torch.rand(()).item()

    def batch(self, samples: list[tuple[int, float]]) -> list[tuple[int, float]]:
        return samples

    def encode_batch(self, batch: list[tuple[int, float]]) -> list[tuple[int, float]]:
        return batch


def write(root: Path, samples: list[int]) -> None:
    """A finished WebDataset of these sample numbers."""
    root.mkdir(parents=True)
    with tarfile.open(root / "train-0.tar", "w") as tar:
        for sample in samples:
            data = str(sample).encode()
            info = tarfile.TarInfo(f"{sample:08}.txt")
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    BaseWebdatasetFactory.prepare_dataset(
        root, ["train-0.tar"], split_parts_ratio=[("train", 1.0)], workers=1
    )
    (root / ".nv-meta" / "dataset.yaml").write_text(SAMPLE_TYPE)


class Energon:
    def __init__(self) -> None:
        self.blend = folder() / "blend.yaml"
        if not self.blend.exists():
            labels = labels_of()
            for c in range(len(COUNTS)):
                write(folder() / str(c), np.flatnonzero(labels == c).tolist())
            parts = [{"weight": 1.0, "path": str(folder() / str(c))} for c in range(len(COUNTS))]
            content = {"__module__": "megatron.energon", "__class__": "MetadatasetV2",
                       "splits": {"train": {"blend": parts}}}  # fmt: skip
            self.blend.write_text(json.dumps(content))

    def batches(self, rank: int, world: int, start: int) -> Iterator[Batch]:
        steps = resumed(
            lambda: self._loader(rank, world), start,
            lambda loader: loader.save_state_rank(),
            lambda loader, state: loader.restore_state_rank(state),
        )  # fmt: skip
        for step in steps:
            yield Batch([i for i, _ in step], [number for _, number in step])

    def _loader(self, rank: int, world: int) -> Any:
        # Only a worker's random numbers are saved; of 64 ranks each, one machine has no room
        workers = 1 if world <= max(RESUMED_WORLDS) else 0
        ranks = WorkerConfig(rank=rank, world_size=world, num_workers=workers, seed_offset=SEED)
        dataset = get_train_dataset(
            self.blend, worker_config=ranks, batch_size=BATCH // world, shuffle_buffer_size=100,
            max_samples_per_sequence=None, task_encoder=Numbered(),
        )  # fmt: skip
        return get_savable_loader(dataset)

    def order(self, samples: int) -> Iterator[int]:
        """Its order is only found by reading, so samples have to be written first."""
        began_s, labels = time.perf_counter(), labels_of(samples)
        with tarfile.open(folder() / "large.tar", "w") as tar:
            for sample in np.flatnonzero(labels >= 0).tolist():
                info = tarfile.TarInfo(f"{sample:08}.txt")
                info.size = 8
                tar.addfile(info, BytesIO(b"%08d" % sample))
                if time.perf_counter() - began_s > BOUND_S:
                    break
        yield 0


if __name__ == "__main__":
    ask(Energon())
