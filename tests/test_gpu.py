"""What only a GPU can show: DALI's mixed decoding beside the CPU's, and training on the GPU."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import DAN
from dan_dist import train as story
from dan_dist.config import load_config
from dan_dist.data.augment import Augment
from dan_dist.data.loader import Batch, Loader
from dan_dist.data.order import TrainOrder
from dan_dist.data.reader import Reader
from shards.format import ShardSet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
AUGMENT = Augment(flip_p=0.5, affine_p=0.7, degrees=20, scale=(0.8, 1.0), translate=0.2)


def batches(faces: ShardSet, device: str, augment: Augment) -> list[Batch]:
    split = faces.split("train")
    order = TrainOrder(split, slice(None), global_batch=16, seed=1, balanced=True)
    place = torch.device(device)
    with Loader(
        Reader(split, max_bad=0), order, image_size=32, augment=augment, device=place, threads=2
    ) as loader:
        return [next(loader) for _ in range(8)]


@pytest.mark.parametrize("erase_p", [0.0, 1.0])
def test_mixed_decoding_gives_the_cpus_pixels(faces: ShardSet, erase_p: float) -> None:
    augment = replace(AUGMENT, erase_p=erase_p)
    for cpu, gpu in zip(
        batches(faces, "cpu", augment), batches(faces, "cuda:0", augment), strict=True
    ):
        assert gpu.images.device.type == "cuda" and torch.equal(cpu.ids, gpu.ids)
        difference = (cpu.images - gpu.images.cpu()).abs()
        assert difference.mean() < 0.02 and torch.equal(cpu.labels, gpu.labels.cpu())


def test_training_on_the_gpu(tiny: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    options = [*DAN, "train.device=cuda", "train.precision=auto"]
    metrics = story.main(load_config(tiny("run"), options)).metrics
    assert math.isfinite(metrics["accuracy"]) and "finished after 20 steps" in caplog.text
