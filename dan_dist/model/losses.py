"""The training objective: network, losses and class centres in one module (arXiv 2109.07270, §3).

Identities, on which backbones are trained, are classified by cross-entropy alone, or by ArcFace's.

The centres are Parameters beside the network's, so that whatever wraps the objective (DDP)
synchronises them, the optimiser trains them and a checkpoint holds them.
"""

import math
import sys
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dan_dist.distributed.collectives import all_reduce_sum
from dan_dist.model.dan import DAN

FcnLoss = Literal["affinity", "center", "none"]
AfnLoss = Literal["partition", "partition_release", "none"]

# Guard of the variance across heads in equation 6. The gradient of log(1 + k/σ²) grows like 1/σ
# where heads agree; from scratch 1e-6 trains slower than 1e-3.
VARIANCE_GUARD = 1e-3


class Margin(NamedTuple):
    """ArcFace's s and m: logits are s · cos(θ + m) for an image's own class, else s · cos θ."""

    s: float
    m: float  # radians


class Loss(NamedTuple):
    """The loss of some images of a global batch, and what to report of it."""

    total: Tensor  # scalar, float32 or float64; differentiate this
    parts: Tensor  # (4,) detached: total, classification, FCN loss, AFN loss
    logits: Tensor  # (images, classes)


def center_loss(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """‖x′ᵢ − c_yᵢ‖² of each image, (B,) (Wen et al. 2016; row "center" of table 1).

    features: (B, D); labels: (B,) int64; centers: (classes, D).
    """
    # Not centers[labels], whose gradient CPU threads add up in the order in which they come.
    return (features - F.embedding(labels, centers)).square().sum(dim=1)


def affinity_loss(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """Equation 2 of each image, (B,): distance to the own class's centre over σ_c².

    σ_c² is the variance across the centres (unbiased, as in the authors' release), summed over the
    D dimensions: centres that move apart lower the loss.
    """
    spread = centers.var(dim=0).sum()
    return center_loss(features, labels, centers) / spread


def partition_loss(heads: Tensor) -> Tensor:
    """Equation 6 of each image, (B,): mean over channels of log(1 + k/σ²), σ² across the k heads.

    heads: (B, k, D), k ≥ 2.
    """
    variance = heads.var(dim=1)
    return torch.log1p(heads.size(1) / (variance + VARIANCE_GUARD)).mean(dim=1)


def partition_release_loss(heads: Tensor) -> Tensor:
    """The authors' release's form, a scalar: log(1 + k/(σ² + machine epsilon)), one logarithm.

    σ² is the mean of the heads' variance over channels and batch. The batch is that of all ranks:
    the mean is reduced over them with its gradient, so that every rank computes the same value and
    the ranks' shares of it add up to the one-process gradient.
    """
    variance = heads.var(dim=1)
    count = variance.new_full((), variance.numel())  # filled there: a copy would wait for the GPU
    sums = all_reduce_sum(torch.stack([variance.sum(), count]))
    mean = sums[0] / sums[1].detach()
    return torch.log1p(heads.size(1) / (mean + sys.float_info.epsilon))


def arcface_logits(cosines: Tensor, labels: Tensor, margin: Margin) -> Tensor:
    """(B, classes) logits from cosines, with the margin on each image's own class.

    Additive angular margin (Deng et al., arXiv 1801.07698, equation 3). Beyond θ = π − m, where
    cos(θ + m) would rise again, a line goes on, as in the authors' code. labels: (B,) int64.
    """
    own = cosines.gather(1, labels[:, None])
    sine = (1 - own.square()).clamp(min=1e-7).sqrt()  # its gradient is infinite at 0
    moved = own * math.cos(margin.m) - sine * math.sin(margin.m)
    beyond = own - margin.m * math.sin(margin.m)
    moved = torch.where(own > -math.cos(margin.m), moved, beyond)
    return margin.s * cosines.scatter(1, labels[:, None], moved)


class Objective(nn.Module):
    """Equation 7: classification + λ1 · FCN loss + λ2 · AFN loss, over part of a global batch.

    margin: the network's logits are cosines, from which ArcFace's are made. label_smoothing: the
    part of an image's label that is spread over all classes.
    """

    def __init__(
        self,
        network: DAN,
        classes: int,
        *,
        fcn: FcnLoss = "affinity",
        afn: AfnLoss = "partition",
        lambda_fcn: float = 1.0,
        lambda_afn: float = 1.0,
        margin: Margin | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.network, self.margin, self.label_smoothing = network, margin, label_smoothing
        self.fcn, self.afn = fcn, afn if len(network.heads) > 1 else "none"  # 0 at k = 1 (§3.3)
        self.lambda_fcn, self.lambda_afn = lambda_fcn, lambda_afn
        if fcn != "none":
            self.centers = nn.Parameter(torch.randn(classes, network.channels))

    def forward(self, images: Tensor, labels: Tensor, global_batch: int) -> Loss:
        """images (n,3,S,S), labels (n,) int64: n of the `global_batch` images of one step.

        Soft labels are (n, 1 + classes) float32: the class, then the share of each class.

        The loss is the part of the global mean that these images contribute: summed over all ranks
        and micro-batches of a step it is the mean over the global batch, however it was split.
        """
        output = self.network(images)
        dtype = torch.float64 if output.logits.dtype == torch.float64 else torch.float32
        share, targets = len(labels) / global_batch, labels
        if labels.dim() == 2:
            labels, targets = labels[:, 0].long(), labels[:, 1:].to(dtype)
        logits, features = output.logits.to(dtype), output.features.to(dtype)
        zero = logits.new_zeros(())
        # Autocast would run some of these reductions in bfloat16: variances need float32.
        with torch.autocast(images.device.type, enabled=False):
            if self.margin is not None:
                logits = arcface_logits(logits, labels, self.margin)
            classification = (
                F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing) * share
            )
            fcn = afn = zero
            if self.fcn == "affinity":
                fcn = affinity_loss(features, labels, self.centers).mean() * share
            elif self.fcn == "center":
                fcn = center_loss(features, labels, self.centers).mean() * share
            if self.afn == "partition" and output.heads is not None:
                afn = partition_loss(output.heads.to(dtype)).mean() * share
            elif self.afn == "partition_release" and output.heads is not None:
                afn = partition_release_loss(output.heads.to(dtype)) * share
            total = classification + self.lambda_fcn * fcn + self.lambda_afn * afn
        parts = torch.stack([total, classification, fcn, afn]).detach()
        return Loss(total, parts, logits.detach())
