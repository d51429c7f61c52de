"""Whether what a checkpoint gives an engine is of its objective and optimiser."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dan_dist.config import Optim
from dan_dist.engine.optimizer import parameter_groups
from dan_dist.model.losses import Objective
from dan_dist.run.plain import is_count, is_number

MOMENTS = {
    "adam": {"step", "exp_avg", "exp_avg_sq"},
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "sgd": {"momentum_buffer"},
}


def check_state(content: Mapping[str, Any], objective: Objective, optim: Optim) -> None:
    """Refuses weights, an average, an optimiser's state or a loss scale of another training.

    objective: of this training, as it is without data parallelism; its values are not read.

    Raises:
        ValueError: names the first tensor that is not as expected.
    """
    own = objective.state_dict()
    check_tensors("objective", content["objective"], own)
    if optim.ema is not None:
        averaged = {k: v for k, v in own.items() if v.is_floating_point()}
        check_tensors("average", content.get("average", {}), averaged)
    check_optimizer(content["optimizer"], objective, optim)
    for name, value in content.get("scaler", {}).items():
        if not is_number(value):
            raise ValueError(f"scaler.{name} is a {type(value).__name__}, expected a number")


def check_tensors(part: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuses all but tensors of the wanted names, shapes and kinds."""
    for name in (*wanted, *found):
        if name not in found or name not in wanted:
            is_missing = "is missing" if name not in found else "is none of this network's"
            raise ValueError(f"{part}.{name} {is_missing}")
        check_tensor(f"{part}.{name}", found[name], wanted[name].shape)
        if found[name].is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(f"{part}.{name} is of {found[name].dtype}")


def check_tensor(name: str, found: Any, shape: torch.Size) -> None:
    """Refuses all but a tensor of this shape."""
    if not isinstance(found, Tensor) or found.shape != shape:
        kind = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found)
        raise ValueError(f"{name} is {kind}, expected a tensor of shape {tuple(shape)}")


def check_optimizer(found: Mapping[str, Any], objective: Objective, optim: Optim) -> None:
    """Refuses a state that is not of as many groups, parameters and moments as this optimiser's.

    Before its first step an optimiser has no moments.
    """
    groups = [group.parameters for group in parameter_groups(objective, optim)]
    state, saved = found.get("state"), found.get("param_groups")
    if not isinstance(state, dict) or not isinstance(saved, list):
        raise ValueError("optimizer: expected its state and its param_groups")
    numbers = [group.get("params") if isinstance(group, dict) else None for group in saved]
    first, expected = 0, []
    for parameters in groups:
        expected.append(list(range(first, first := first + len(parameters))))
    if numbers != expected:
        raise ValueError(f"optimizer.param_groups are not {len(groups)} of {first} parameters")
    if not state:
        return
    if {*state} != {*range(first)} or not all(is_count(key) for key in state):
        raise ValueError(f"optimizer.state is not of {first} parameters")
    wanted = MOMENTS[optim.name]
    is_plain_sgd = optim.name == "sgd" and all(own == {} for own in state.values())
    for number, parameter in enumerate(p for parameters in groups for p in parameters):
        own = state[number]
        kept = {*own} if isinstance(own, dict) else None
        if kept != wanted and not is_plain_sgd:
            raise ValueError(f"optimizer.state.{number} is not of {optim.name}")
        for key, moment in own.items():
            name = f"optimizer.state.{number}.{key}"
            if key == "momentum_buffer" and moment is None:
                continue
            shape = torch.Size() if key == "step" else parameter.shape
            check_tensor(name, moment, shape)
            if not moment.is_floating_point() or moment.isnan().any():
                raise ValueError(f"{name} holds what is no number")
