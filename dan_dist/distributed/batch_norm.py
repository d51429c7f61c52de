"""BatchNorm whose statistics span all ranks, on any device.

torch's SyncBatchNorm refuses CPU tensors; `BatchNorm` here gives the same statistics over any
process group (gloo on CPU), with the parameters and buffers of `nn.BatchNorm1d/2d`.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dan_dist.distributed.collectives import world_size


class _GlobalBatchNorm(torch.autograd.Function):
    """Normalises by the mean and (biased) variance over the images of all ranks.

    The elementwise work is done by torch's own kernels for fixed statistics; what they leave out,
    the gradient through the statistics, needs only their weight and bias gradients, summed over
    ranks (Ioffe & Szegedy 2015, the gradients of section 3).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, n: Tensor,
        eps: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, mean, var, n)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, n = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grads[0], x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        totals = torch.stack([dweight, dbias])
        dist.all_reduce(totals)
        # dx so far is weight/std · dy; the statistics contribute −weight/std · (Σdy + x̂·Σdy·x̂)/n,
        # a line for each channel: once more the kernel for fixed statistics, here 0 and 1
        inv_std = torch.rsqrt(var + ctx.eps)
        slope = -weight * inv_std * inv_std * totals[0] / n
        offset = -weight * inv_std * totals[1] / n - slope * mean
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        # Not by torch.nn.functional, which in torch 2.11 refuses an epsilon of 0
        dx += torch.batch_norm(x, slope, offset, zero, one, False, 0.0, 0.0, False)
        return dx, dweight, dbias, None, None, None, None


class BatchNorm(_BatchNorm):
    """`nn.BatchNorm1d/2d` (N, C, …) whose training statistics span all ranks, on any device.

    Ranks may hold different numbers of images. Without a process group it is the plain module.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm takes (N, C, …), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        mean, var, n = _global_statistics(input.detach())
        with torch.no_grad():
            assert self.num_batches_tracked is not None and self.momentum is not None
            assert self.running_mean is not None and self.running_var is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
        y: Tensor = _GlobalBatchNorm.apply(input, self.weight, self.bias, mean, var, n, self.eps)
        return y


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C), biased variance (C) and count over the ranks' (N, C, …), by Chan's parallel rule.

    Sums of squares would cancel for channels with a large mean; gathered means do not.
    """
    # The kernel of torch's own BatchNorm, 25 times as fast as var_mean. What it gives has the type
    # of the running statistics, which are not wanted here: float32 where x is bfloat16.
    running = torch.zeros(2, x.size(1), dtype=torch.promote_types(x.dtype, torch.float32))
    mean, var = torch.batch_norm_update_stats(x, running[0], running[1], 0.0)
    own = torch.cat([mean, var, mean.new_tensor([x.numel() / x.size(1)])])
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    ranks = torch.stack(parts)
    means, variances, counts = ranks[:, : x.size(1)], ranks[:, x.size(1) : -1], ranks[:, -1:]
    n = counts.sum()
    share = counts / n
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return mean, var, n


def convert_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Replaces every BatchNorm by one whose statistics span all ranks; state_dict is unchanged."""
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return converted
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            new = BatchNorm(child.num_features, child.eps, child.momentum)
            new.to(child.weight.dtype).load_state_dict(child.state_dict())
            setattr(module, name, new.train(child.training))
        else:
            convert_batch_norm(child, device)
    return module
