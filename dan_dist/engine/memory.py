"""A device that runs out of memory, in words that name the key to change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def name_memory_errors(device: torch.device, images: int) -> Iterator[None]:
    """Within it, a rank computes so many images at once.

    Raises:
        ValueError: its device's memory does not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise ValueError(
            f"{device}: not enough memory for {images} images at once ({reason}); give "
            f"train.micro_batch={max(1, images // 2)} or less"
        ) from error
