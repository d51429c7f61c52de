"""What is tried before the first step, compiling it and recording it, and leaves nothing behind.

What fails on one rank is left out on all of them: the collectives of a step that is compiled, or
recorded, are others than those of one that is not.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from dan_dist.distributed.world import World

T = TypeVar("T")
log = logging.getLogger(__name__)


def tried_on_all(world: World, task: Callable[[], T], failure: str) -> T | None:
    """What `task` gives; None where a ValueError ends it on any rank, and a line says the reason.

    failure: in that line, what has failed.
    """
    try:
        return world.run_on_all(task)
    except ValueError as error:
        log.warning("train.compile: %s (%s); going on without", failure, error)
        return None


def random_batch(
    images: int, image_size: int, classes: int, device: torch.device, *, soft: bool
) -> tuple[Tensor, Tensor]:
    """(N, 3, S, S) pixels and labels, laid out as the loader's. soft: with shares of classes."""
    generator = torch.Generator(device).manual_seed(0)
    shape = images, image_size, image_size, 3
    pixels = torch.randn(shape, device=device, generator=generator).permute(0, 3, 1, 2)
    labels = torch.arange(images, device=device) % classes
    if soft:
        shares = torch.eye(classes, device=device)[labels]
        labels = torch.cat([labels[:, None], shares], dim=1)
    return pixels, labels


@contextmanager
def put_back(tensors: Callable[[], Sequence[Tensor]], device: torch.device) -> Iterator[None]:
    """Within it, steps may be tried: what they change is put back in place, at its end.

    tensors: all that a step changes. Those that are there at the end alone become 0, as optimisers
    begin.
    """
    kept = {id(tensor): (tensor, tensor.detach().clone()) for tensor in tensors()}
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor in tensors():
                    if id(tensor) in kept:
                        tensor.copy_(kept[id(tensor)][1])
                    else:
                        tensor.zero_()
