"""The same training under DeepSpeed: ZeRO divides the optimiser's state, and more, over the ranks.

Checkpoints are those of the DDP engine: the state is gathered when it is saved and divided when it
is loaded, so that a run resumes at any world size, stage and engine. That is on purpose in place of
DeepSpeed's own format and its universal one, which need a conversion, and DeepSpeed, to be read.
"""

import difflib
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import deepspeed  # for the device that `init_world` has chosen
import deepspeed.ops
import numpy as np
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from deepspeed.utils import (
    logger,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)
from numpy.typing import NDArray
from torch import Tensor, nn

from dan_dist.config import EngineChoice, Optim, overlay
from dan_dist.data.loader import Loader
from dan_dist.distributed.heartbeat import Heartbeat
from dan_dist.distributed.world import World, group_of_one
from dan_dist.engine.ddp import Engine, StepOptions
from dan_dist.engine.graph import Recorder
from dan_dist.engine.optimizer import (
    WeightAverage,
    load_optimizer,
    make_optimizer,
    optimizer_state,
)
from dan_dist.model.dan import Output
from dan_dist.model.losses import Loss, Objective

logger.setLevel(logging.ERROR)  # its log of what it finds is long

# On a CPU, DeepSpeed would compile a collective of its own at the first start, for a minute and
# with a compiler that may be missing; gloo, which is there, serves.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# DeepSpeed's keys whose values are derived from our configuration
OURS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.global_batch and train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "managed_gradient_accumulation": "train.global_batch and train.micro_batch",
    "elasticity": "train.global_batch",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim.name, optim.lr …",
    "scheduler": "schedule.name, schedule.gamma …",
    **dict.fromkeys(
        ("bf16", "bfloat16", "fp16", "amp", "torch_autocast", "data_types"), "train.precision"
    ),
    "zero_optimization.stage": "engine.zero_stage",
}
# Its others, of which it takes any without a word (runtime/config.py of 0.19)
THEIRS = (
    "activation_checkpointing", "aio", "autotuning", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "compression_training", "csv_monitor",
    "curriculum_learning", "data_efficiency", "dataloader_drop_last", "datastates_ckpt",
    "disable_allgather", "disable_python_gc", "dump_state", "eigenvalue", "expert_parallel",
    "flops_profiler", "gradient_allreduce_op", "gradient_predivide_factor", "graph_harvesting",
    "hybrid_engine", "log_level", "memory_breakdown", "nebula", "pipeline", "prescale_gradients",
    "progressive_layer_drop", "quantize_training", "seq_parallel_communication_data_type",
    "sparse_attention", "sparse_gradients", "steps_per_print", "tensor_parallel", "tensorboard",
    "timers", "use_data_before_expert_parallelism", "wall_clock_breakdown", "wandb",
    "weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)  # fmt: skip
# What it raises where it does not like its configuration
REFUSALS = (
    AssertionError, TypeError, KeyError, ValueError, DeepSpeedConfigError, ZeRORuntimeException
)  # fmt: skip


class DeepSpeedEngine(Engine):
    """The objective under `deepspeed.initialize`.

    choice.zero_stage: what is divided over the ranks: 0 nothing, 1 the optimiser's state, 2 the
    gradients too, 3 the weights too. choice.deepspeed: DeepSpeed's own configuration, laid over
    what is derived here.

    Raises:
        ValueError: `choice.deepspeed` has a key whose value is derived from ours, or that DeepSpeed
            does not know, or DeepSpeed refuses its configuration.
    """

    def __init__(
        self, objective: Objective, world: World, optim: Optim, options: StepOptions,
        choice: EngineChoice,
    ) -> None:  # fmt: skip
        check_extra(choice.deepspeed)
        if options.precision == "fp16":
            raise ValueError("train.precision: fp16 needs engine.name=ddp; DeepSpeed takes float32")
        self.zero_stage, self.extra = choice.zero_stage, choice.deepspeed
        super().__init__(objective, world, optim, options)

    def _learned(self) -> dict[str, Any]:
        """Gathered from all ranks: all must call it, rank 0 has it.

        One tensor after the other, into the CPU's memory: where the weights are divided, the whole
        of them need not fit a GPU.
        """
        self._average_buffers()
        weights = {}
        for name, tensor in self.objective.state_dict(keep_vars=True).items():
            with self._whole([tensor] if isinstance(tensor, nn.Parameter) else []):
                if self.world.is_main:
                    weights[name] = tensor.detach().to("cpu", copy=True)
        if self.zero_stage == 0:
            return {"objective": weights, "optimizer": optimizer_state(self.optimizer)}
        parameters = self._trained()
        step, keys = self._inner_state()
        if keys and self.zero_stage < 3:
            self._link_moments()
        moments: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(parameters) if keys else ():
            own: dict[str, Any] = {} if step is None else {"step": step.to("cpu", copy=True)}
            for key in keys:
                whole = safe_get_full_optimizer_state(parameter, key)
                if self.world.is_main:
                    own[key] = whole.to("cpu", copy=True)
            moments[number] = own
        zero: Any = self.model.optimizer
        groups, first = [], 0
        for own, group in zip(zero.param_groups, self.groups, strict=True):
            numbers = list(range(first, first := first + len(group.parameters)))
            groups.append({**{k: v for k, v in own.items() if k != "params"}, "params": numbers})
        return {"objective": weights, "optimizer": {"state": moments, "param_groups": groups}}

    def _load_learned(self, state: dict[str, Any]) -> None:
        parameters = self._trained()
        with self._whole(list(self.objective.parameters()), change=True):
            self.objective.load_state_dict(state["objective"])
        if self.zero_stage == 0:
            load_optimizer(self.optimizer, state["optimizer"])
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
            self._link_moments()
        for number, parameter in enumerate(parameters):
            for key in moments:
                value = state["optimizer"]["state"][number][key].to(self.world.device)
                safe_set_full_optimizer_state(parameter, value, key)

    def warm_up(self, image_size: int, recorder: Recorder | None = None) -> None:
        """Compiles, and tries no step: DeepSpeed's own copies of the weights could not be put back.

        Under stage 3, whose weights are whole within a step alone, step 1 compiles.
        """
        if self.zero_stage < 3:
            with self._memory_named():
                self._compile(*self._random_batch(image_size))

    def evaluate(
        self, loader: Loader, select: Callable[[Output], Tensor], heart: Heartbeat
    ) -> NDArray[np.float32]:
        if self.average is None or self.zero_stage < 3:
            return super().evaluate(loader, select, heart)
        own = list(self.objective.parameters())
        with self._whole(own, change=True):
            self.average.exchange()
        average, self.average = self.average, None
        found = super().evaluate(loader, select, heart)
        self.average = average
        with self._whole(own, change=True):
            self.average.exchange()
        return found

    def _make_average(self, decay: float) -> WeightAverage:
        with self._whole(list(self.objective.parameters())):
            return super()._make_average(decay)

    def _update_average(self, average: WeightAverage) -> None:
        with self._whole(list(self.objective.parameters())):
            average.update()

    def _make_optimizer(self, optim: Optim) -> torch.optim.Optimizer:
        """By plain kernels: DeepSpeed's own parts of the weights are what it is called with."""
        return make_optimizer(self.groups, optim, fused=False, capturable=False)

    def _trained(self) -> list[nn.Parameter]:
        """The parameters in the order in which checkpoints number them."""
        return [parameter for group in self.groups for parameter in group.parameters]

    def _wrap(self) -> nn.Module:
        derived: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own throughput figures alone
            "gradient_accumulation_steps": self.micro_steps,
            "gradient_clipping": self.clip_norm or 0.0,
            "zero_optimization": {"stage": self.zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's serves where its state is offloaded
            # Not its bf16 section, which casts weights but not BatchNorm's statistics.
            "torch_autocast": {
                "enabled": self.options.precision == "bf16",
                "dtype": "bfloat16",
            },
            "steps_per_print": 10**9,
        }
        group_of_one(self.world)
        try:
            engine, *_ = deepspeed.initialize(
                model=self.objective,
                optimizer=self.optimizer,
                config=overlay(derived, self.extra),
                dist_init_required=False,
            )
        except REFUSALS as error:
            line = " ".join(str(error).split())
            raise ValueError(f"DeepSpeed refuses its configuration: {line}") from error
        wrapped: nn.Module = engine
        return wrapped

    def _zero_grad(self) -> None:
        """DeepSpeed does that after a step, in memory that it may have set aside for gradients."""

    def _forward_backward(self, images: Tensor, labels: Tensor, *, last: bool) -> Loss:
        engine: Any = self.model
        # Said, not counted by DeepSpeed, whose count a skipped step would put out of step.
        engine.set_gradient_accumulation_boundary(last)
        loss = self._forward(images, labels)
        # DeepSpeed averages over ranks, but these are parts of the mean over the global batch. And
        # it must get another tensor than `loss.total`, whose gradient it divides by micro-steps.
        engine.backward(loss.total * self.world.size, scale_wrt_gas=False)
        return loss

    def _update(self, loss: Tensor) -> tuple[Tensor, bool]:
        engine: Any = self.model
        skipped = False
        if self.zero_stage == 0:
            norm = self._gradient_norm()
            skipped = self.options.may_skip and not bool(torch.isfinite(loss + norm))
        if skipped:
            engine.zero_grad()
            return norm, skipped
        engine.step()
        if self.zero_stage > 0:  # a gradient that is not finite was skipped by DeepSpeed itself
            found = engine.get_global_grad_norm()  # asking a tensor for its truth would wait for it
            norm = torch.as_tensor(0.0 if found is None else found, device=self.world.device)
            skipped = self.options.may_skip and not bool(torch.isfinite(norm))
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

    def _link_moments(self) -> None:
        """Lets DeepSpeed find each parameter's moments.

        It does so itself in its first step, but there for the first group alone: the others have
        none yet.
        """
        zero: Any = self.model.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()

    def _inner_state(self) -> tuple[Tensor | None, list[str]]:
        """Adam's step number, and the names of the moments that are kept of each parameter."""
        zero: Any = self.model.optimizer
        inner: dict[Tensor, dict[str, Any]] = zero.optimizer.state
        own = inner.get(self._flat_partitions()[0], {})
        moments = [k for k, v in own.items() if torch.is_tensor(v) and k != "step"]
        step = own.get("step")
        return (torch.as_tensor(step) if step is not None else None), moments


def check_extra(extra: Mapping[str, Any]) -> None:
    """Refuses expert configuration whose values are derived from ours, or that DeepSpeed ignores.

    Raises:
        ValueError: names the key, and ours or the nearest.
    """
    zero = extra.get("zero_optimization")
    sub = [f"zero_optimization.{key}" for key in zero] if isinstance(zero, Mapping) else []
    for key in (*extra, *sub):
        if key in OURS:
            raise ValueError(f"engine.deepspeed.{key}: {OURS[key]} sets that")
        if key not in THEIRS and key not in sub:
            near = difflib.get_close_matches(key, (*THEIRS, *OURS), 1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"engine.deepspeed.{key}: DeepSpeed knows no such key{hint}")
