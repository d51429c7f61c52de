"""Collectives inside forward and backward, as plain operations that torch.compile traces."""

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
    operations = torch.ops._c10d_functional_autograd
    flat = operations.all_gather_into_tensor(value.contiguous().flatten(), ranks, group)
    gathered: Tensor = torch.ops._c10d_functional.wait_tensor(flat)
    return gathered.view(ranks, *value.shape)


def all_reduce(value: Tensor, group: str) -> Tensor:
    """The sum of `value` over the ranks of a process group, without a gradient."""
    total = torch.ops._c10d_functional.all_reduce(value.contiguous(), "sum", group)
    found: Tensor = torch.ops._c10d_functional.wait_tensor(total)
    return found


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks; its gradient is the sum of the ranks' gradients."""
    ranks = world_size()
    if ranks == 1:
        return value
    assert dist.group.WORLD is not None
    return all_gather(value, ranks, dist.group.WORLD.group_name).sum(dim=0)
