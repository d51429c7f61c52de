"""A device that runs out of memory, in words that name the key to change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LESS = "free it of other processes, or train with a smaller model.image_size or model.heads"


@contextmanager
def name_memory_errors(device: torch.device, work: str, way: str = LESS) -> Iterator[None]:
    """Within it, a rank does `work`; way: what would need less memory.

    Raises:
        ValueError: its device's memory does not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise ValueError(f"{device}: not enough memory for {work} ({reason}); {way}") from error


def fewer_images(images: int, least: int) -> str:
    """What to do where a step has no memory for so many images at once.

    least: that BatchNorm can normalise.
    """
    half = images // 2
    return f"give train.micro_batch={half} or less" if half >= least else LESS
