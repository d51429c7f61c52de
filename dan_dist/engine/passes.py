"""How a global batch is divided over ranks, and a rank's share over forward passes. Pure."""

import logging

import torch

from dan_dist.data.sampler import rank_columns

log = logging.getLogger(__name__)

FEW_IMAGES = 8  # from some 16 of 64 px on, a step is as long in either layout


def micro_steps(global_batch: int, micro_batch: int | None, world_size: int) -> int:
    """Forward and backward passes of a step, the same on every rank: set by the fullest one."""
    fullest = -(-global_batch // world_size)
    return -(-fullest // (micro_batch or fullest))


def pass_images(global_batch: int, passes: int, world_size: int) -> list[tuple[int, ...]]:
    """The images of each rank in each of a step's passes, as `Tensor.tensor_split` divides them."""
    columns = [rank_columns(global_batch, rank, world_size) for rank in range(world_size)]
    own = [c.stop - c.start for c in columns]
    return [tuple(n // passes + (i < n % passes) for n in own) for i in range(passes)]


def pass_layout(device: torch.device, images: list[tuple[int, ...]]) -> torch.memory_format:
    """How a step's images and weights lie in memory, the same on every rank: channels last.

    But contiguous where a CPU has few images a pass: a step is then as long as the weights and
    their gradients take to be rewritten in channels last, which the kernels do for each pass anew.
    With 8 images of 32 px that is half of it.

    images: what `pass_images` gives.
    """
    few = max(n for ranks in images for n in ranks) <= FEW_IMAGES
    return torch.contiguous_format if few and device.type == "cpu" else torch.channels_last


def check_split(global_batch: int, micro_batch: int | None, world_size: int, sync_bn: bool) -> None:
    """Every rank needs an image in every micro-step, and BatchNorm at least two to normalise.

    Raises:
        ValueError: more ranks than images, or too few images in a micro-step.
    """
    if world_size > global_batch:
        raise ValueError(f"{world_size} ranks, more than train.global_batch ({global_batch})")
    passes = micro_steps(global_batch, micro_batch, world_size)
    smallest = global_batch // world_size // passes
    statistics = smallest * (world_size if sync_bn else 1)
    if smallest < 1 or statistics < 2:
        raise ValueError(
            f"train.global_batch {global_batch} over {world_size} ranks in {passes} micro-steps "
            f"leaves BatchNorm {statistics} images, it needs at least 2; raise train.micro_batch"
        )
    if passes > 1:
        log.info(
            "%d micro-steps a step: BatchNorm and the batch-mean partition loss see about %d "
            "images at a time, not %d", passes, statistics, global_batch,
        )  # fmt: skip
