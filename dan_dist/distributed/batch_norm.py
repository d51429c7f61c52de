"""BatchNorm whose statistics span all ranks, on any device, without a wait of the host.

torch's SyncBatchNorm refuses CPU tensors, waits for the GPU three times a layer and breaks
torch.compile's graph at each; `BatchNorm` here gives the same statistics over any process group,
with the parameters and buffers of `nn.BatchNorm1d/2d`. How many images each rank holds is known on
the host (`Shares`), so that no operation's shape depends on what a device has computed.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dan_dist.distributed.collectives import all_gather, all_reduce, world_size


class Shares:
    """Each rank's part of the images of one forward pass, for all BatchNorms of a network.

    Has a process group of its own: its small messages do not queue behind gradients. All ranks must
    make one, and announce the same numbers before each pass.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.ranks, self.rank = world_size(), dist.get_rank()
        group: Any = dist.new_group()
        self.group: str = group.group_name
        self._device, self._dtype = device, dtype
        self._known: dict[tuple[int, ...], Tensor] = {}
        self.images: tuple[int, ...] = ()
        self.reached_s: float | None = None  # when this rank first waited for others; set anew

    def announce(self, images: Sequence[int]) -> None:
        """The number of images of each rank in the next passes."""
        assert len(images) == self.ranks
        self.images, self.total = tuple(images), sum(images)
        if self.images not in self._known:
            shares = [[n / self.total] for n in images]
            self._known[self.images] = torch.tensor(shares, dtype=self._dtype, device=self._device)
        self.parts = self._known[self.images]  # (ranks, 1), of the sum 1


class Over(NamedTuple):
    """What a layer's statistics are of, and its guard of the variance."""

    n: int  # values a channel, of all ranks
    eps: float
    group: str  # the ranks', by its name


class _GlobalBatchNorm(torch.autograd.Function):
    """Normalises by the mean and (biased) variance over the images of all ranks.

    The elementwise work is done by torch's own kernels for fixed statistics; what they leave out,
    the gradient through the statistics, needs only their weight and bias gradients, summed over
    ranks (Ioffe & Szegedy 2015, the gradients of section 3).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, over: Over
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.over = over
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=over.eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        return *gradients(grads[0], x, weight, mean, var, ctx.over), None, None, None


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, over: Over
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of this rank's x, and its part of those of weight and bias."""
    n, eps, group = over
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, mean, var, None, None, False, eps, [True, True, True]
    )
    totals = all_reduce(torch.stack([dweight, dbias]), group)
    # dx so far is weight/std · dy; the statistics contribute −weight/std · (Σdy + x̂·Σdy·x̂)/n,
    # a line for each channel: once more the kernel for fixed statistics, here 0 and ½ + ½, as some
    # versions of torch take no eps of 0
    inv_std = torch.rsqrt(var + eps)
    slope = -weight * inv_std * inv_std * totals[0] / n
    offset = -weight * inv_std * totals[1] / n - slope * mean
    zero, half = torch.zeros_like(mean), torch.full_like(mean, 0.5)
    dx += F.batch_norm(x, zero, half, slope, offset, training=False, eps=0.5)
    return dx, dweight, dbias


class BatchNorm(_BatchNorm):
    """`nn.BatchNorm1d/2d` (N, C, …) whose training statistics span all ranks, on any device.

    Ranks may hold different numbers of images, those that `shares` announces. In evaluation it is
    the plain module.
    """

    def __init__(self, plain: _BatchNorm, shares: Shares) -> None:
        """In place of `plain`, whose state it takes over."""
        weight = plain.weight
        super().__init__(
            plain.num_features, plain.eps, plain.momentum, device=weight.device, dtype=weight.dtype
        )
        self.load_state_dict(plain.state_dict())
        self.train(plain.training)
        self.shares = shares

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm takes (N, C, …), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        shares = self.shares
        assert len(input) == shares.images[shares.rank], "not the images that were announced"
        n = shares.total * (input.numel() // (len(input) * input.size(1)))
        if torch.compiler.is_compiling():
            return self._traced(input, n)
        shares.reached_s = shares.reached_s or time.perf_counter()
        with torch.no_grad():
            mean, var = self._over_ranks(*_statistics(input))
            self._update_running(mean, var, n)
        y: Tensor = _GlobalBatchNorm.apply(
            input, self.weight, self.bias, mean, var, Over(n, self.eps, shares.group)
        )
        return y

    def _traced(self, x: Tensor, n: int) -> Tensor:
        """The same in operations whose gradient autograd finds, and which a compiler fuses."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        over, place = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        own_var, own_mean = torch.var_mean(wide, over, correction=0)
        mean, var = self._over_ranks(own_mean, own_var)
        self._update_running(mean.detach(), var.detach(), n)
        slope = torch.rsqrt(var + self.eps) * self.weight
        return ((wide - mean.view(place)) * slope.view(place) + self.bias.view(place)).to(x.dtype)

    def _over_ranks(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (C) over the ranks' images, from each one's, by Chan's rule.

        Sums of squares would cancel for channels with a large mean; gathered means do not.
        """
        shares = self.shares
        ranks = all_gather(torch.stack([mean, var]), shares.ranks, shares.group)
        means, variances = ranks[:, 0], ranks[:, 1]
        mean = (shares.parts * means).sum(0)
        return mean, (shares.parts * (variances + (means - mean).square())).sum(0)

    def _update_running(self, mean: Tensor, var: Tensor, n: int) -> None:
        """Moves the running statistics; n: the values that each of (C) was computed of."""
        assert self.num_batches_tracked is not None and self.momentum is not None
        assert self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C) of this rank's (N, C, …), in float32 where x has fewer bits."""
    # The kernel of torch's own BatchNorm, on a CPU 25 times as fast as var_mean. What it gives has
    # the type of the running statistics, which are not wanted here.
    wide = torch.promote_types(x.dtype, torch.float32)
    running = torch.zeros(2, x.size(1), dtype=wide, device=x.device)
    mean, var = torch.batch_norm_update_stats(x, running[0], running[1], 0.0)
    return mean, var


def convert_batch_norm(module: nn.Module, shares: Shares) -> nn.Module:
    """Replaces every BatchNorm by one whose statistics span all ranks; state_dict is unchanged."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, BatchNorm(child, shares))
        else:
            convert_batch_norm(child, shares)
    return module
