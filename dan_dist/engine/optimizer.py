"""The optimiser over groups of parameters, its state across devices, and the weights' average."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dan_dist.config import Optim
from dan_dist.model.losses import Objective


class Group(NamedTuple):
    """Parameters that the optimiser treats alike."""

    parameters: list[nn.Parameter]
    lr_factor: float  # times the learning rate of the step
    weight_decay: float


def parameter_groups(objective: Objective, optim: Optim) -> list[Group]:
    """The parameters that are trained, in the objective's order; one group where all are alike.

    `optim.decay` "weights" leaves out what has one dimension, BatchNorm's and biases, and the class
    centres. `optim.backbone_lr` 0 leaves out the backbone, which then needs no gradient.
    """
    backbone = {id(p) for p in objective.network.backbone.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        factor = optim.backbone_lr if id(parameter) in backbone else 1.0
        is_weight = parameter.ndim > 1 and name != "centers"
        decay = optim.weight_decay if optim.decay == "all" or is_weight else 0.0
        if factor:
            groups.setdefault((factor, decay), []).append(parameter)
        else:
            parameter.requires_grad_(False)
    return [Group(parameters, *key) for key, parameters in groups.items()]


def make_optimizer(
    groups: list[Group], optim: Optim, *, fused: bool, capturable: bool
) -> torch.optim.Optimizer:
    """torch's optimiser. fused: one kernel for all parameters. capturable: into a CUDA graph."""
    own = [{"params": g.parameters, "weight_decay": g.weight_decay} for g in groups]
    fuse = True if fused else None
    if optim.name == "sgd":
        return torch.optim.SGD(own, optim.lr, optim.momentum, nesterov=optim.nesterov, fused=fuse)
    kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    return kind(own, optim.lr, fused=fuse, capturable=capturable)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state as plain values and tensors."""
    state = optimizer.state_dict()
    groups = [
        {k: float(v) if isinstance(v, Tensor) else v for k, v in group.items()}
        for group in state["param_groups"]
    ]
    return {"state": state["state"], "param_groups": groups}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Puts back what `optimizer_state` gave, on whatever device and by whatever kernels.

    Settings are this optimiser's own: those of the training stand in its configuration, and others
    belong to the machine.
    """
    groups = [
        {**own, "params": saved["params"]}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    # Moments lie in memory as their weights do, which fused kernels want
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            is_moment = isinstance(value, Tensor) and value.shape == parameter.shape
            if is_moment and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def set_lr(optimizer: torch.optim.Optimizer, groups: list[Group], lr: float) -> None:
    """Sets each group's learning rate; one that a CUDA graph reads stays where it is in memory."""
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        if isinstance(own["lr"], Tensor):
            own["lr"].fill_(lr * group.lr_factor)
        else:
            own["lr"] = lr * group.lr_factor


class WeightAverage:
    """The exponential moving average of all that is learned: weights, centres, statistics."""

    def __init__(self, objective: nn.Module, decay: float) -> None:
        named = [*objective.named_parameters(), *objective.named_buffers()]
        self.decay = decay
        self._current = {name: t for name, t in named if t.is_floating_point()}
        self.tensors = {name: t.detach().clone() for name, t in self._current.items()}
        self.buffers = [self.tensors[n] for n, _ in objective.named_buffers() if n in self.tensors]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights after a step in: average = decay · average + (1 − decay) · weights."""
        own, current = list(self.tensors.values()), list(self._current.values())
        torch._foreach_lerp_(own, current, 1 - self.decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back `tensors` of an earlier one.

        Raises:
            ValueError: they are not of this network.
        """
        if tensors.keys() != self.tensors.keys():
            raise ValueError("the average of the weights is of another network")
        for name, own in self.tensors.items():
            own.copy_(tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it, the network has the average for its weights."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        """The network gets the average, and the average the network's weights."""
        for name, current in self._current.items():
            kept = current.clone()
            current.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)
