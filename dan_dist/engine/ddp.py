"""One training step and one evaluation pass over all ranks (torch DDP).

Gradients are those of the mean loss over the global batch, however it is split over ranks and
micro-batches: each part contributes its share of the mean, DDP's averaging is undone.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.parallel import DistributedDataParallel

from dan_dist.config import Optim
from dan_dist.data.loader import Batch, Loader
from dan_dist.distributed.batch_norm import convert_batch_norm
from dan_dist.distributed.heartbeat import Heartbeat
from dan_dist.distributed.world import World
from dan_dist.model.arithmetic import choose_arithmetic
from dan_dist.model.dan import DAN, Output
from dan_dist.model.losses import Loss, Objective

log = logging.getLogger(__name__)

Precision = Literal["float32", "tf32", "bf16", "float64"]  # on a CPU, tf32 is float32
PrecisionChoice = Precision | Literal["auto"]


def resolve_precision(choice: PrecisionChoice, device: torch.device) -> Precision:
    """The precision of a choice: "auto" is bf16 on a GPU and on a CPU that multiplies it."""
    if choice != "auto":
        return choice
    has_bf16 = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if has_bf16 else "float32"


class StepFlags(NamedTuple):
    """What one rank asks of all; summed over ranks along with the loss."""

    stop: bool  # end after a checkpoint
    save: bool  # write a checkpoint
    replaced: int  # images of the batch that stand in for damaged ones


class StepResult(NamedTuple):
    """One step's figures, on the device: the same on all ranks."""

    losses: Tensor  # (4,) means over the global batch: total, classification, FCN, AFN
    flags: Tensor  # (3,) sums over ranks, in the order of StepFlags
    grad_norm: Tensor  # () of the whole gradient
    skipped: bool = False  # the weights were left as they were


def micro_steps(global_batch: int, micro_batch: int | None, world_size: int) -> int:
    """Forward and backward passes of a step, the same on every rank: set by the fullest one."""
    fullest = -(-global_batch // world_size)
    return -(-fullest // (micro_batch or fullest))


def check_split(global_batch: int, micro_batch: int | None, world_size: int, sync_bn: bool) -> None:
    """Every rank needs an image in every micro-step, and BatchNorm at least two to normalise.

    Raises:
        ValueError: more ranks than images, or too few images in a micro-step.
    """
    if world_size > global_batch:
        raise ValueError(f"{world_size} ranks, more than train.global_batch ({global_batch})")
    passes = micro_steps(global_batch, micro_batch, world_size)
    smallest = global_batch // world_size // passes
    statistics = smallest * (world_size if sync_bn else 1)
    if smallest < 1 or statistics < 2:
        raise ValueError(
            f"train.global_batch {global_batch} over {world_size} ranks in {passes} micro-steps "
            f"leaves BatchNorm {statistics} images, it needs at least 2; raise train.micro_batch"
        )
    if passes > 1:
        log.info(
            "%d micro-steps a step: BatchNorm and the batch-mean partition loss see about %d "
            "images at a time, not %d", passes, statistics, global_batch,
        )  # fmt: skip


@torch.no_grad()
def evaluate(
    network: DAN,
    loader: Loader,
    world: World,
    *,
    select: Callable[[Output], Tensor],
    bf16: bool,
    heart: Heartbeat,
) -> NDArray[np.float32]:
    """(samples, D) float32 of a whole split, in index order, the same on every rank.

    network: in evaluation mode. loader: this rank's part of a pass, at least one step. select: the
    part of B images' output that is wanted, (B, D) float32.
    """
    samples, dtype = len(loader.reader.split), network.classifier.weight.dtype
    rows = torch.empty(0)
    for step in range(loader.order.steps):
        heart.beat("evaluation", step + 1)
        batch = next(loader)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            wanted = select(network(batch.images.to(dtype)))
        if not step:  # a row more, for padding: then nothing waits for the device to know its place
            rows = torch.zeros(samples + 1, wanted.size(1), device=world.device)
        places = batch.ids.where(batch.ids >= 0, samples).to(world.device, non_blocking=True)
        rows[places] = wanted
    found: NDArray[np.float32] = world.sum(rows[:samples]).cpu().numpy()
    return found


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed."""

    global_batch: int  # images over all ranks
    micro_batch: int | None = None  # images that a rank computes at once; None: its whole share
    precision: Precision = "float32"
    sync_bn: bool = True
    compile: bool = False
    may_skip: bool = False  # a step that is not finite changes nothing, instead of the weights
    deterministic: bool = False  # only algorithms that repeat to the bit on the same GPUs


class Engine:
    """The objective on its device, wrapped for data parallelism, with its optimiser."""

    def __init__(
        self, objective: Objective, world: World, optim: Optim, options: StepOptions
    ) -> None:
        self.options, self.clip_norm, self.world = options, optim.clip_norm, world
        self.micro_steps = micro_steps(options.global_batch, options.micro_batch, world.size)
        self.dtype = torch.float64 if options.precision == "float64" else torch.float32
        self.bf16 = options.precision == "bf16"
        choose_arithmetic(options.precision, deterministic=options.deterministic)
        objective.to(world.device, self.dtype)
        if options.sync_bn and world.size > 1:
            convert_batch_norm(objective, world.device)
        self.objective = objective
        if options.compile:
            objective.network.compile()
        parameters, lr, decay = objective.parameters(), optim.lr, optim.weight_decay
        self.optimizer: torch.optim.Optimizer
        if optim.name == "adam":
            self.optimizer = torch.optim.Adam(parameters, lr, weight_decay=decay)
        else:
            self.optimizer = torch.optim.SGD(parameters, lr, optim.momentum, weight_decay=decay)
        self.model: nn.Module = self._wrap()

    def train_step(self, batch: Batch, *, lr: float, flags: StepFlags) -> StepResult:
        """One optimiser step on this rank's part of a global batch.

        With `may_skip`, a step whose loss or gradient is not finite changes nothing; to know, the
        device is waited for.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        before = (
            [buffer.clone() for buffer in self.objective.buffers()] if self.options.may_skip else []
        )
        self.model.train()
        self._zero_grad()
        parts = torch.zeros(4, dtype=self.dtype, device=self.world.device)
        images = batch.images.tensor_split(self.micro_steps)
        labels = batch.labels.tensor_split(self.micro_steps)
        for i, (x, y) in enumerate(zip(images, labels, strict=True)):
            loss = self._forward_backward(x, y, last=i == self.micro_steps - 1)
            parts += loss.parts
        own = torch.tensor(flags, dtype=self.dtype)
        sums = self.world.sum(torch.cat([parts, own.to(self.world.device, non_blocking=True)]))
        norm, skipped = self._update(sums[0])
        if skipped:  # the forward pass has changed BatchNorm's running statistics
            for buffer, kept in zip(self.objective.buffers(), before, strict=True):
                buffer.copy_(kept)
        return StepResult(sums[:4], sums[4:], norm, skipped)

    def evaluate(
        self, loader: Loader, select: Callable[[Output], Tensor], heart: Heartbeat
    ) -> NDArray[np.float32]:
        """The selected output of the network for every image of a split; see `evaluate`."""
        self._average_buffers()
        self.model.eval()
        return evaluate(
            self.objective.network, loader, self.world, select=select, bf16=self.bf16, heart=heart
        )

    def state(self) -> dict[str, Any]:
        """Everything that training changes: weights, centres, statistics, optimiser.

        All ranks must call it; rank 0 has it whole.
        """
        self._average_buffers()
        return {"objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Puts back what `state` gave, on any number of ranks."""
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _wrap(self) -> nn.Module:
        """The objective, made data-parallel."""
        self.objective.to(memory_format=torch.channels_last)
        if self.world.size == 1:
            return self.objective
        return DistributedDataParallel(
            self.objective,
            device_ids=[self.world.device] if self.world.device.type == "cuda" else None,
            # With synchronised statistics the buffers are equal on all ranks as it is.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _forward_backward(self, images: Tensor, labels: Tensor, *, last: bool) -> Loss:
        """Adds one micro-batch's part of the gradient; after the last one, ranks hold the whole."""
        ddp = isinstance(self.model, DistributedDataParallel)
        with self.model.no_sync() if ddp and not last else nullcontext():  # type: ignore[operator]
            loss = self._forward(images, labels)
            (loss.total * self.world.size).backward()  # type: ignore[no-untyped-call]
        return loss

    def _update(self, loss: Tensor) -> tuple[Tensor, bool]:
        """Steps the optimiser; returns the gradient's norm before clipping, and if it did not."""
        norm = self._gradient_norm()
        skipped = self.options.may_skip and not bool(torch.isfinite(loss + norm))
        if not skipped:
            if self.clip_norm is not None:
                own = self.objective.parameters()
                torch.nn.utils.clip_grads_with_norm_(own, self.clip_norm, norm)
            self.optimizer.step()
        return norm, skipped

    def _gradient_norm(self) -> Tensor:
        own = [p.grad for p in self.objective.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(own)

    def _average_buffers(self) -> None:
        """Makes BatchNorm's running statistics equal on all ranks where they were not shared."""
        if self.options.sync_bn or self.world.size == 1:
            return
        for buffer in self.objective.buffers():
            if buffer.is_floating_point():
                self.world.sum(buffer).div_(self.world.size)

    def _forward(self, images: Tensor, labels: Tensor) -> Loss:
        with self._autocast():
            try:
                loss: Loss = self.model(images.to(self.dtype), labels, self.options.global_batch)
            except TorchDynamoException as error:
                log.warning("train.compile: not possible here (%s); going on without", type(error))
                self.objective.network._compiled_call_impl = None  # undoes Module.compile()
                loss = self.model(images.to(self.dtype), labels, self.options.global_batch)
        return loss

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16)
