"""The same training under DeepSpeed: ZeRO divides the optimiser's state, and more, over the ranks.

Checkpoints are those of the DDP engine: the state is gathered when it is saved and divided when it
is loaded, so that a run goes on at any world size, stage and engine.
"""

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from dan_dist.engine import Engine
from dan_dist.losses import Loss
from dan_dist.world import group_of_one

# Read when DeepSpeed is imported; what it finds by itself, it tells at length
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.utils import (
    logger,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)

logger.setLevel(logging.ERROR)

# On a CPU, DeepSpeed would compile a collective of its own at the first start, for a minute and
# with a compiler that may be missing; gloo, which is there, serves.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


class DeepSpeedEngine(Engine):
    """The objective under `deepspeed.initialize`.

    zero_stage: what is divided over the ranks: 0 nothing, 1 the optimiser's state, 2 the gradients
    too, 3 the weights too. extra: DeepSpeed's own configuration, laid over what is derived here.

    Raises:
        ValueError: `extra` states batch sizes, or DeepSpeed refuses its configuration.
    """

    def __init__(self, *arguments: Any, zero_stage: int, extra: Mapping[str, Any], **rest: Any):
        if stated := [key for key in SIZES if key in extra]:
            raise ValueError(
                f"engine.deepspeed.{stated[0]}: train.global_batch and train.micro_batch say that"
            )
        self.zero_stage, self.extra = zero_stage, extra
        super().__init__(*arguments, **rest)

    def state(self) -> dict[str, Any]:
        """What `Engine.state` gives, gathered from all ranks: all must call it."""
        parameters = list(self.objective.parameters())
        with self._whole(parameters):
            weights = {k: v.detach().clone() for k, v in self.objective.state_dict().items()}
        if self.zero_stage == 0:
            return {"objective": weights, "optimizer": self.optimizer.state_dict()}
        step, keys = self._inner_state()
        moments: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(parameters) if keys else ():
            moments[number] = {
                key: safe_get_full_optimizer_state(parameter, key).clone() for key in keys
            }
            if step is not None:
                moments[number]["step"] = step.clone()
        zero: Any = self.model.optimizer
        group = {k: v for k, v in zero.param_groups[0].items() if k != "params"}
        groups = [{**group, "params": list(range(len(parameters)))}]
        return {"objective": weights, "optimizer": {"state": moments, "param_groups": groups}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Puts back what any engine's `state` gave."""
        parameters = list(self.objective.parameters())
        with self._whole(parameters, change=True):
            self.objective.load_state_dict(state["objective"])
        if self.zero_stage == 0:
            self.optimizer.load_state_dict(state["optimizer"])
            return
        zero: Any = self.model.optimizer
        zero.refresh_fp32_params()
        if not state["optimizer"]["state"]:
            return
        first = state["optimizer"]["state"][0]
        moments = [key for key, value in first.items() if key != "step" and value is not None]
        for flat in self._flat_partitions():
            own = {key: torch.zeros_like(flat) for key in moments}
            if "step" in first:
                own["step"] = first["step"].clone()
            zero.optimizer.state[flat] = own
        if self.zero_stage < 3:
            zero._lazy_init_hp_params_optimizer_state()
        for number, parameter in enumerate(parameters):
            for key in moments:
                value = state["optimizer"]["state"][number][key].to(self.world.device)
                safe_set_full_optimizer_state(parameter, value, key)

    def _wrap(self) -> nn.Module:
        derived: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own throughput figures alone
            "gradient_accumulation_steps": self.micro_steps,
            "gradient_clipping": self.clip_norm or 0.0,
            "zero_optimization": {"stage": self.zero_stage},
            "zero_allow_untested_optimizer": True,
            # Not its bf16 section, which casts weights but not BatchNorm's statistics.
            "torch_autocast": {"enabled": self.bf16, "dtype": "bfloat16"},
            "steps_per_print": 10**9,
        }
        group_of_one(self.world)
        try:
            engine, *_ = deepspeed.initialize(
                model=self.objective,
                optimizer=self.optimizer,
                config=_merge(derived, self.extra),
                dist_init_required=False,
            )
        except (AssertionError, TypeError, KeyError, ValueError) as error:
            line = " ".join(str(error).split())
            raise ValueError(f"DeepSpeed refuses its configuration: {line}") from error
        wrapped: nn.Module = engine
        return wrapped

    def _forward_backward(self, images: Tensor, labels: Tensor, *, last: bool) -> Loss:
        loss = self._forward(images, labels)
        engine: Any = self.model
        # DeepSpeed averages over ranks, but these are parts of the mean over the global batch.
        engine.backward(loss.total * self.world.size, scale_wrt_gas=False)
        if not last:
            engine.step()  # it counts micro-batches, and steps after the last one alone
        return loss

    def _update(self, loss: Tensor) -> tuple[Tensor, bool]:
        engine: Any = self.model
        skipped = False
        if self.zero_stage == 0:
            norm = self._gradient_norm()
            skipped = self.may_skip and not bool(torch.isfinite(loss + norm))
        if skipped:
            engine.zero_grad()
            return norm, skipped
        engine.step()
        if self.zero_stage > 0:  # a gradient that is not finite was skipped by DeepSpeed itself
            norm = torch.as_tensor(engine.get_global_grad_norm() or 0.0, device=self.world.device)
            skipped = self.may_skip and not bool(torch.isfinite(norm))
        return norm.to(self.dtype), skipped

    def _whole(
        self, parameters: list[nn.Parameter], *, change: bool = False
    ) -> AbstractContextManager[Any]:
        """Within it, stage 3's parameters are whole on every rank."""
        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=0 if change else None, enabled=self.zero_stage == 3
        )
        return context

    def _flat_partitions(self) -> list[Tensor]:
        """This rank's parts of the float32 weights, to which the optimiser's state belongs."""
        zero: Any = self.model.optimizer
        name = "single_partition_of_fp32_groups" if self.zero_stage < 3 else (
            "fp32_partitioned_groups_flat"
        )  # fmt: skip
        found: list[Tensor] = getattr(zero, name)
        return found

    def _inner_state(self) -> tuple[Tensor | None, list[str]]:
        """Adam's step number, and the names of the moments that are kept of each parameter."""
        zero: Any = self.model.optimizer
        inner: dict[Tensor, dict[str, Any]] = zero.optimizer.state
        own = inner.get(self._flat_partitions()[0], {})
        moments = [k for k, v in own.items() if torch.is_tensor(v) and k != "step"]
        step = own.get("step")
        return (torch.as_tensor(step) if step is not None else None), moments


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
