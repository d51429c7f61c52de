"""A network's output for every image of a split, over all ranks."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dan_dist.data.loader import Loader
from dan_dist.distributed.heartbeat import Heartbeat
from dan_dist.distributed.world import World
from dan_dist.engine.memory import name_memory_errors
from dan_dist.engine.precision import Precision, autocast, weight_dtype
from dan_dist.model.dan import DAN, Output


@torch.no_grad()
def evaluate(
    network: DAN,
    loader: Loader,
    world: World,
    *,
    select: Callable[[Output], Tensor],
    precision: Precision,
    heart: Heartbeat,
) -> NDArray[np.float32]:
    """(samples, D) float32 of a whole split, in index order, the same on every rank.

    network: in evaluation mode. loader: this rank's part of a pass, at least one step. select: the
    part of B images' output that is wanted, (B, D) float32.

    Raises:
        ValueError: the device's memory does not suffice.
    """
    samples, dtype = len(loader.reader.split), weight_dtype(precision)
    rows = torch.empty(0)
    for step in range(loader.order.steps):
        heart.beat("evaluation", step + 1)
        batch = next(loader)
        with name_memory_errors(world.device, f"evaluating {len(batch.ids)} images at once"):
            with autocast(precision, world.device):
                wanted = select(network(batch.images.to(dtype)))
            if not step:  # a row more, for padding: then no place is waited for
                rows = torch.zeros(samples + 1, wanted.size(1), device=world.device)
            places = batch.ids.where(batch.ids >= 0, samples).to(world.device, non_blocking=True)
            rows[places] = wanted
    found: NDArray[np.float32] = world.sum(rows[:samples]).cpu().numpy()
    return found
