"""The output of a trained network for every image of a split, on all ranks together."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dan_dist.data.loader import Loader, evaluation_loader
from dan_dist.distributed.heartbeat import Heartbeat
from dan_dist.distributed.world import World
from dan_dist.engine.memory import name_memory_errors
from dan_dist.engine.precision import PrecisionChoice, resolve_precision, weight_dtype
from dan_dist.engine.rows import evaluate
from dan_dist.model.arithmetic import choose_arithmetic
from dan_dist.model.dan import Output, probabilities
from dan_dist.model.weights import Trained
from shards.format import Split


def predict(
    trained: Trained,
    split: Split,
    world: World,
    heart: Heartbeat,
    precision: PrecisionChoice,
    select: Callable[[Output], Tensor] = probabilities,
) -> NDArray[np.float32]:
    """(images, D) by a network from a file, in index order, the same on every rank.

    select: the part of the network's output that is wanted; by default (images, classes)
    probabilities. An output that is not finite is a ValueError: the network's weights are not
    finite, or are too large.
    """
    engine: Any = {}
    if precision == "auto" and trained.config:
        precision, engine = trained.config["train"]["precision"], trained.config.get("engine")
    trained_by = engine.get("name", "ddp") if isinstance(engine, dict) else "ddp"
    resolved = resolve_precision(precision, world.device, trained_by)
    choose_arithmetic(resolved)
    with name_memory_errors(world.device, "the network"):
        network = trained.network.to(world.device, weight_dtype(resolved)).to(
            memory_format=torch.channels_last
        )
    with open_loader(trained, split, world) as loader:
        found = evaluate(network, loader, world, select=select, precision=resolved, heart=heart)
    if bad := int((~np.isfinite(found)).any(axis=1).sum()):
        raise ValueError(
            f"{trained.path}: the output is not finite for {bad} of {len(found)} images"
        )
    return found


def open_loader(trained: Trained, split: Split, world: World) -> Loader:
    """This rank's part of a pass over a split, at the network's image size."""
    return evaluation_loader(
        split,
        rank=world.rank,
        world_size=world.size,
        image_size=trained.image_size,
        device=world.device,
        threads=world.cores,
    )
