"""One training step and one evaluation pass over all ranks (torch DDP).

Gradients are those of the mean loss over the global batch, however it is split over ranks and
micro-batches: each part contributes its share of the mean, DDP's averaging is undone.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dan_dist.config import Optim
from dan_dist.data.loader import Batch, Loader
from dan_dist.distributed.batch_norm import Shares, convert_batch_norm
from dan_dist.distributed.heartbeat import Heartbeat
from dan_dist.distributed.world import World
from dan_dist.engine.compile import CompiledModule
from dan_dist.engine.graph import Figures, Recorder, StepGraph
from dan_dist.engine.memory import fewer_images, name_memory_errors
from dan_dist.engine.optimizer import (
    WeightAverage,
    load_optimizer,
    make_optimizer,
    optimizer_state,
    parameter_groups,
    set_lr,
)
from dan_dist.engine.passes import micro_steps, pass_images, pass_layout
from dan_dist.engine.precision import Precision, autocast, weight_dtype
from dan_dist.engine.rehearsal import put_back, random_batch, tried_on_all
from dan_dist.engine.rows import evaluate
from dan_dist.model.arithmetic import choose_arithmetic
from dan_dist.model.dan import Output
from dan_dist.model.losses import Loss, Objective


class StepFlags(NamedTuple):
    """What one rank asks of all and reports; summed over ranks along with the loss."""

    stop: bool  # end after a checkpoint
    save: bool  # write a checkpoint
    replaced: int  # images of the batch that stand in for damaged ones
    wait_s: float = 0.0  # that this rank has waited for its batch
    own_s: float = 0.0  # that, and its computing before it first needed the others


class StepResult(NamedTuple):
    """One step's figures. Tensors are on the device, and the same on all ranks."""

    losses: Tensor  # (4,) means over the global batch: total, classification, FCN, AFN
    flags: Tensor  # (3,) sums over ranks, of the first three of StepFlags
    grad_norm: Tensor  # () of the whole gradient
    accuracy: Tensor  # () of the images as they were trained on
    ranks: Tensor  # (2 · ranks,) each rank's wait_s, then each one's own_s
    skipped: bool = False  # the weights were left as they were
    own_s: float = 0.0  # of this rank, computing before it first needed the others


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed."""

    global_batch: int  # images over all ranks
    micro_batch: int | None = None  # images that a rank computes at once; None: its whole share
    precision: Precision = "float32"
    sync_bn: bool = True
    compile: bool = False
    capture: bool = False  # as a CUDA graph, by `Engine.warm_up`
    may_skip: bool = False  # a step that is not finite changes nothing, instead of the weights
    soft: bool = False  # labels come with the share of each class
    deterministic: bool = False  # only algorithms that repeat to the bit on the same GPUs


class Engine:
    """The objective on its device, wrapped for data parallelism, with its optimiser."""

    def __init__(
        self, objective: Objective, world: World, optim: Optim, options: StepOptions
    ) -> None:
        self.options, self.clip_norm, self.world = options, optim.clip_norm, world
        self.micro_steps = micro_steps(options.global_batch, options.micro_batch, world.size)
        self.pass_images = pass_images(options.global_batch, self.micro_steps, world.size)
        self.layout = pass_layout(world.device, self.pass_images)
        self.dtype = weight_dtype(options.precision)
        choose_arithmetic(options.precision, deterministic=options.deterministic)
        objective.to(world.device, self.dtype)
        self.shares: Shares | None = None
        self._reached_s: float | None = None  # when this step first needed the other ranks
        if options.sync_bn and world.size > 1:
            self.shares = Shares(world.device, self.dtype)
            convert_batch_norm(objective, self.shares)
        self.objective, self.groups = objective, parameter_groups(objective, optim)
        self.compiled = CompiledModule(objective) if options.compile else None
        self.is_frozen = optim.backbone_lr == 0
        self.optimizer = self._make_optimizer(optim)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.precision == "fp16")
        self.graph: StepGraph | None = None
        self.model: nn.Module = self._wrap()
        self.average = None if optim.ema is None else self._make_average(optim.ema)

    def train_step(self, batch: Batch, *, lr: float, flags: StepFlags) -> StepResult:
        """One optimiser step on this rank's part of a global batch.

        With `may_skip`, a step whose loss or gradient is not finite changes nothing; to know, the
        device is waited for.

        Raises:
            ValueError: the GPU's memory does not suffice; names train.micro_batch.
        """
        set_lr(self.optimizer, self.groups, lr)
        own, began_s, self._reached_s = self._slots(flags), time.perf_counter(), None
        with self._memory_named():
            if self.graph is None:
                own = own.to(self.world.device, non_blocking=True)
                found = self._step(batch.images, batch.labels, own)
            else:
                found = self.graph(batch.images, batch.labels, own)
        sums = found.sums
        own_s = (self._reached_s or began_s) - began_s  # a captured step is not looked into
        return StepResult(
            sums[:4], sums[5:8], found.grad_norm, sums[4], sums[8:], found.skipped, own_s
        )

    def _slots(self, flags: StepFlags) -> Tensor:
        """What one rank adds to the sum over ranks: its flags, and its times in its own places."""
        size, rank = self.world.size, self.world.rank
        slots = torch.zeros(3 + 2 * size, dtype=self.dtype)
        slots[:3] = torch.tensor(flags[:3], dtype=self.dtype)
        slots[3 + rank], slots[3 + size + rank] = flags.wait_s, flags.own_s
        return slots

    def warm_up(self, image_size: int, recorder: Recorder | None = None) -> None:
        """Compiles and captures the step, where that was chosen; what is trained stays as it is.

        To be called on all ranks, after a checkpoint was loaded and before the loader opens. Where
        a rank cannot compile the step, or capture it, none does; a line is logged.
        """
        if not self.options.compile and not self.options.capture:
            return
        device, scale = self.world.device, self.scaler.state_dict()
        with self._memory_named(), put_back(self._changed, device):
            images, labels = self._random_batch(image_size)
            self._compile(images, labels)
            flags = self._slots(StepFlags(False, False, 0)).to(device)
            if self.options.capture:
                for group in self.optimizer.param_groups:
                    group["lr"] = torch.tensor(0.0, device=device)
                record = partial(StepGraph, self._step, images, labels, flags, recorder)
                self.graph = tried_on_all(self.world, record, "no CUDA graph here")
            elif self.compiled is not None:
                self._step(images, labels, flags)
        self.scaler.load_state_dict(scale)

    def _random_batch(self, image_size: int) -> tuple[Tensor, Tensor]:
        n = sum(images[self.world.rank] for images in self.pass_images)
        classes = self.objective.network.classifier.out_features
        return random_batch(n, image_size, classes, self.world.device, soft=self.options.soft)

    def _compile(self, images: Tensor, labels: Tensor) -> None:
        """Compiles every pass of a step, where that was chosen, and runs none."""
        if (compiled := self.compiled) is None:
            return

        def compile_passes() -> bool:
            for x, y in self._passes(images, labels):
                with self._autocast():
                    compiled.rehearse(x, y, self.options.global_batch)
            return True

        if not tried_on_all(self.world, compile_passes, "not possible here"):
            compiled.forget()
            self.compiled = None

    def evaluate(
        self, loader: Loader, select: Callable[[Output], Tensor], heart: Heartbeat
    ) -> NDArray[np.float32]:
        """The selected output of the network for every image of a split; see `evaluate`.

        By the average of the weights, where one is kept.
        """
        self._average_buffers()
        self.model.eval()
        with nullcontext() if self.average is None else self.average.in_place():
            network, precision = self.objective.network, self.options.precision
            return evaluate(
                network, loader, self.world, select=select, precision=precision, heart=heart
            )

    def state(self) -> dict[str, Any]:
        """Everything that training changes: weights, centres, statistics, optimiser.

        All ranks must call it; rank 0 has it whole. "average" and "scaler" where there are such.
        """
        self._average_buffers()
        state = self._learned()
        if self.average is not None:
            state["average"] = self.average.tensors
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Puts back what `state` gave, on any number of ranks. A captured step is given up."""
        self.graph = None
        self._load_learned(state)
        if self.average is not None:
            self.average.load(state["average"])
        if self.scaler.is_enabled() and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])

    def _learned(self) -> dict[str, Any]:
        own = self.objective.state_dict()
        return {"objective": own, "optimizer": optimizer_state(self.optimizer)}

    def _load_learned(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        load_optimizer(self.optimizer, state["optimizer"])

    def _make_optimizer(self, optim: Optim) -> torch.optim.Optimizer:
        on_gpu = self.world.device.type == "cuda"
        capturable = on_gpu and self.options.capture
        return make_optimizer(self.groups, optim, fused=on_gpu, capturable=capturable)

    def _wrap(self) -> nn.Module:
        """The objective, made data-parallel."""
        self.objective.to(memory_format=self.layout)
        if self.world.size == 1:
            return self.objective
        return DistributedDataParallel(
            self.objective,
            device_ids=[self.world.device] if self.world.device.type == "cuda" else None,
            # With synchronised statistics the buffers are equal on all ranks as it is.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def _step(self, images: Tensor, labels: Tensor, flags: Tensor) -> Figures:
        """Forward, backward and update. flags: on the device, for the sum over ranks."""
        before = [b.clone() for b in self.objective.buffers()] if self.options.may_skip else []
        self._zero_grad()
        parts = torch.zeros(5, dtype=self.dtype, device=self.world.device)
        for i, (x, y) in enumerate(self._passes(images, labels)):
            loss = self._forward_backward(x, y, last=i == self.micro_steps - 1)
            hard = y[:, 0] if self.options.soft else y
            right = (loss.logits.argmax(dim=1) == hard).sum() / self.options.global_batch
            parts += torch.cat([loss.parts, right[None]])
        sums = self.world.sum(torch.cat([parts, flags]))
        norm, skipped = self._update(sums[0])
        if skipped:  # the forward pass has changed BatchNorm's running statistics
            for buffer, kept in zip(self.objective.buffers(), before, strict=True):
                buffer.copy_(kept)
        elif self.average is not None:
            self._update_average(self.average)
        return Figures(sums, norm, skipped)

    def _passes(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of a step by passes, each of which BatchNorm is told of."""
        self.model.train()
        if self.is_frozen:
            self.objective.network.backbone.eval()
        parts = (tensor.tensor_split(self.micro_steps) for tensor in (images, labels))
        for x, y, shares in zip(*parts, self.pass_images, strict=True):
            if self.shares is not None:
                self.shares.announce(shares)
            yield x.to(self.dtype, memory_format=self.layout), y

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _forward_backward(self, images: Tensor, labels: Tensor, *, last: bool) -> Loss:
        """Adds one micro-batch's part of the gradient; after the last one, ranks hold the whole."""
        ddp = isinstance(self.model, DistributedDataParallel)
        with self.model.no_sync() if ddp and not last else nullcontext():  # type: ignore[operator]
            loss = self._forward(images, labels)
            self.scaler.scale(loss.total * self.world.size).backward()  # type: ignore[no-untyped-call]
        return loss

    def _update(self, loss: Tensor) -> tuple[Tensor, bool]:
        """Steps the optimiser; returns the gradient's norm before clipping, and whether it did not.

        Where losses are scaled, a gradient that was too large for float16 is not an error, and
        counts as 0: the optimiser leaves that step out and the scale falls.
        """
        self.scaler.unscale_(self.optimizer)
        shown = norm = self._gradient_norm()
        if self.scaler.is_enabled():
            can_fall = self.scaler._get_scale_async() >= 1  # type: ignore[operator]
            shown = norm.where(torch.isfinite(norm) | ~can_fall, 0.0)
        skipped = self.options.may_skip and not bool(torch.isfinite(loss + shown))
        if not skipped:
            if self.clip_norm is not None:
                own = self.objective.parameters()
                torch.nn.utils.clip_grads_with_norm_(own, self.clip_norm, norm)
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return shown, skipped

    def _make_average(self, decay: float) -> WeightAverage:
        return WeightAverage(self.objective, decay)

    def _update_average(self, average: WeightAverage) -> None:
        average.update()

    def _gradient_norm(self) -> Tensor:
        own = [p.grad for p in self.objective.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(own)

    def _average_buffers(self) -> None:
        """Makes BatchNorm's running statistics equal on all ranks where they were not shared."""
        if self.options.sync_bn or self.world.size == 1:
            return
        averaged = self.average.buffers if self.average is not None else []
        for buffer in (*self.objective.buffers(), *averaged):
            if buffer.is_floating_point():
                self.world.sum(buffer).div_(self.world.size)

    def _forward(self, images: Tensor, labels: Tensor) -> Loss:
        if self.shares is not None:
            self.shares.reached_s = None
        with self._autocast():
            loss: Loss = self.model(images, labels, self.options.global_batch)
        if self._reached_s is None:
            met_s = self.shares.reached_s if self.shares is not None else None
            self._reached_s = met_s or time.perf_counter()
        return loss

    def _autocast(self) -> torch.autocast:
        cache = not self.options.capture
        return autocast(self.options.precision, self.world.device, cache=cache)

    def _memory_named(self) -> AbstractContextManager[None]:
        most = max(images[self.world.rank] for images in self.pass_images)
        way = fewer_images(most, least=1 if self.shares is not None else 2)
        return name_memory_errors(self.world.device, f"{most} images at once", way)

    def _changed(self) -> list[Tensor]:
        """All tensors that a step changes, but the gradients."""
        states = [v for state in self.optimizer.state.values() for v in state.values()]
        average = list(self.average.tensors.values()) if self.average is not None else []
        own = [*self.objective.parameters(), *self.objective.buffers(), *average, *states]
        return [tensor for tensor in own if isinstance(tensor, Tensor)]
