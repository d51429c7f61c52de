"""What only a GPU can show: DALI's mixed decoding beside the CPU's, and training on the GPU."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import DAN, weights
from dan_dist import train as story
from dan_dist.config import Optim, load_config
from dan_dist.data.augment import UNIFORMS, Augment, placements
from dan_dist.data.decoded import (
    DecodedReader,
    DeviceReader,
    decode_to_file,
    decode_to_memory,
    open_file,
)
from dan_dist.data.loader import Batch, Loader
from dan_dist.data.order import TrainOrder
from dan_dist.data.reader import Reader
from dan_dist.data.sampler import augmentation_uniforms, rank_columns
from dan_dist.distributed.world import World
from dan_dist.engine.ddp import Engine, StepFlags, StepOptions
from dan_dist.engine.readout import Readout
from dan_dist.model import dan
from dan_dist.model.arithmetic import choose_arithmetic
from dan_dist.model.losses import Objective
from dan_dist.run.checkpoint import load
from dan_dist.run.folder import newest_checkpoint
from shards.format import ShardSet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
GPU = torch.device("cuda", 0)
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


def test_pixels_do_not_depend_on_the_place_in_the_batch(faces: ShardSet) -> None:
    split = faces.split("train")

    def taken(world: int) -> list[Tensor]:
        found = []
        for rank in range(world):
            order = TrainOrder(
                split, rank_columns(64, rank, world), global_batch=64, seed=1, balanced=True
            )
            with Loader(Reader(split, 0), order, image_size=32, augment=AUGMENT, device=GPU,
                        threads=2) as loader:  # fmt: skip
                found.append([next(loader).images.cpu() for _ in range(3)])
        return [torch.cat(step) for step in zip(*found, strict=True)]

    for whole, parts in zip(taken(1), taken(8), strict=True):
        assert torch.equal(whole, parts)


def test_single_pixels_that_differ_from_the_cpus_lie_at_borders(faces: ShardSet) -> None:
    """Of the warp's source pixels alone, where CPU and GPU round otherwise."""
    uniforms = augmentation_uniforms(1, 0, 16, UNIFORMS)
    matrices = placements(uniforms, AUGMENT, 32).matrix.astype(np.float64)
    cpu, gpu = (batches(faces, place, AUGMENT)[0] for place in ("cpu", "cuda:0"))
    apart = (cpu.images - gpu.images.cpu()).abs().amax(dim=1).numpy() > 0.1
    y, x = np.mgrid[:32, :32] + 0.5
    sources = np.einsum("nij,jp->nip", matrices, np.stack([x, y, np.ones_like(x)]).reshape(3, -1))
    distance = np.abs(sources - np.round(sources)).min(axis=1).reshape(-1, 32, 32)
    assert not apart[distance > 1e-3].any() and apart.mean() < 0.01


@pytest.mark.parametrize("place", ["host", "device"])
def test_a_split_decoded_once_gives_the_plain_batches(
    faces: ShardSet, tmp_path: Path, place: str
) -> None:
    split = faces.split("train")
    if place == "host":
        path = decode_to_file(split, fingerprint="f" * 16, cache=str(tmp_path), image_size=32,
                              device=GPU, threads=2)  # fmt: skip
        reader = DecodedReader(split, open_file(path, split, image_size=32), 0)
    else:
        found = decode_to_memory(split, image_size=32, device=GPU, threads=2)
        reader = DeviceReader(split, found, 0)
    order = TrainOrder(split, slice(None), global_batch=16, seed=1, balanced=True)
    with Loader(reader, order, image_size=32, augment=AUGMENT, device=GPU, threads=2) as loader:
        for plain in batches(faces, "cuda:0", AUGMENT):
            assert torch.equal(next(loader).images, plain.images)


def test_figures_come_by_pinned_memory() -> None:
    values = torch.arange(8.0, device=GPU)
    assert Readout(values * 2).read() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]


def test_a_step_never_waits_for_the_gpu() -> None:
    """As on fake tensors (test_fake_cuda_step.py), with the backward pass that autograd runs."""
    images, labels = torch.randn(8, 3, 64, 64, device=GPU), torch.arange(8, device=GPU) % 7
    options = StepOptions(global_batch=8, precision="bf16")
    engine = Engine(Objective(dan.DAN(7, 4), 7), World(0, 0, 1, 1, GPU), Optim(), options)
    step = Batch(images, labels, torch.arange(8))
    engine.train_step(step, lr=1e-4, flags=StepFlags(False, False, 0))  # makes Adam's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.train_step(step, lr=1e-4, flags=StepFlags(False, False, 0))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_deterministic_trainings_are_one(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        options = [*DAN, "train.device=cuda", "train.deterministic=true", "train.epochs=1"]
        story.main(load_config(tiny(name), options))
        newest = newest_checkpoint(tmp_path / name)
        assert newest is not None
        found.append(load(newest[0], keys=("objective",))["objective"])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_compiled_training_is_the_plain_one_and_resumes_in_mid_epoch(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Compiled and as one CUDA graph: the sums of six steps' gradients, to float32's rounding.

    Of the baseline, and with weights that hardly move: DAN's steps enlarge what rounding does.
    """

    def train(name: str, steps: int, compiled: str) -> Tensor:
        options = ["train.device=cuda", "train.precision=float32", "optim.lr=1e-6"]
        options += [f"train.max_steps={steps}", f"train.compile={compiled}"]
        story.main(load_config(tiny(name), options))
        found = weights(tmp_path / name)
        return torch.cat([v.flatten() for k, v in found.items() if k.endswith("momentum_buffer")])

    plain, whole = train("plain", 6, "false"), train("whole", 6, "true")
    train("parts", 4, "true")  # of ten steps an epoch
    for found in (whole, train("parts", 6, "true")):
        assert (found - plain).norm() < 0.05 * plain.norm()


def test_float32_is_not_tf32() -> None:
    images, kernels = (torch.randn(64, 64, 3, 3, device=GPU) for _ in range(2))
    exact = torch.nn.functional.conv2d(images.double(), kernels.double())
    off = {}
    for precision in ("float32", "tf32"):
        choose_arithmetic(precision)
        off[precision] = float((torch.nn.functional.conv2d(images, kernels) - exact).abs().max())
    choose_arithmetic("float32")
    assert off["float32"] < 1e-3 < off["tf32"]


def test_training_on_the_gpu(tiny: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    options = [*DAN, "train.device=cuda", "train.precision=auto"]
    metrics = story.main(load_config(tiny("run"), options)).metrics
    assert math.isfinite(metrics["accuracy"]) and "finished after 20 steps" in caplog.text
