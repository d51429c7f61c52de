"""Collectives inside forward and backward, as plain operations that torch.compile traces."""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # registers the operations below
from torch import Tensor


def world_size() -> int:
    """The number of ranks that compute together; 1 where no process group exists."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_gather(value: Tensor, ranks: int, group: str) -> Tensor:
    """(ranks, …): the `value` of every rank; its gradient is the sum of the ranks' gradients.

    group: the name of a process group. The host waits for nothing.
    """
    flat = value.contiguous().flatten()
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(flat, ranks, group)
    found: Tensor = torch.ops._c10d_functional.wait_tensor(gathered)
    return found.view(ranks, *value.shape)


def all_reduce(value: Tensor, group: str) -> Tensor:
    """The sum of `value` over ranks; its gradient is the sum of theirs. group: as `all_gather`."""
    total = torch.ops._c10d_functional.all_reduce(value.contiguous(), "sum", group)
    found: Tensor = torch.ops._c10d_functional.wait_tensor(total)
    return found


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks; its gradient is the sum of the ranks' gradients."""
    if world_size() == 1:
        return value
    group: Any = dist.group.WORLD
    return all_reduce(value, group.group_name)
