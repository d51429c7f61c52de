"""A process group whose other ranks are not there and do nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_group(size: int) -> Iterator[None]:
    """Within it, this process is rank 0 of so many."""
    if dist.is_initialized():  # DeepSpeed holds on to the group of one rank
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
