"""The DAN network: backbone, k cross-attention heads, attention fusion (arXiv 2109.07270, §3)."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, conv1x1

WIDTH = 64  # channels of ResNet-18's first stage
LAST = 8  # times as many has its last one

# How the heads' vectors become the one that is classified: the sum of their log-softmax over the
# heads, as the paper has it, or their mean.
Fusion = Literal["log_softmax", "mean"]


class Output(NamedTuple):
    """What the network gives for B images; C, its last stage's channels, is 512 as in the paper."""

    logits: Tensor  # (B, classes); cosines where the classifier gives those
    features: Tensor  # (B, C) pooled backbone features, which the FCN losses cluster
    heads: Tensor | None  # (B, k, C) attended vectors, log-softmax over k; None for the baseline


def probabilities(output: Output) -> Tensor:
    """(B, classes) float32 of each class."""
    return output.logits.softmax(dim=1, dtype=torch.float32)


def probabilities_among(columns: Sequence[int], output: Output) -> Tensor:
    """(B, columns) float32 of these classes alone, as if the network knew no others."""
    return output.logits[:, list(columns)].softmax(dim=1, dtype=torch.float32)


def features(output: Output) -> Tensor:
    """(B, C) float32, pooled from the backbone."""
    return output.features.float()


class SpatialAttention(nn.Module):
    """Equation 3: (B,C,h,w) scaled by one map (B,1,h,w) from three parallel convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.reduce = _conv(channels, half, 1)
        self.square = _conv(half, channels, 3)
        self.wide = _conv(half, channels, (1, 3))
        self.tall = _conv(half, channels, (3, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(x)
        y = torch.relu(self.square(y) + self.wide(y) + self.tall(y))
        return x * y.sum(dim=1, keepdim=True)


class ChannelAttention(nn.Module):
    """Equation 4: pooled maps (B,C) times a gate in (0, 1) per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        few = channels // 16
        self.gate = nn.Sequential(
            nn.Linear(channels, few),
            nn.BatchNorm1d(few),
            nn.ReLU(inplace=True),
            nn.Linear(few, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        pooled = _pool(x)
        gate: Tensor = self.gate(pooled)
        return pooled * gate


class CosineClassifier(nn.Linear):
    """(B, D) features → (B, classes) cosines of the angles to each class's weights, in float32.

    bfloat16, in which autocast would multiply, resolves no angles below 5°.
    """

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__(inputs, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            # DeepSpeed's third stage gathers weights in what it thinks autocast multiplies in
            return F.linear(F.normalize(x), F.normalize(self.weight.to(x.dtype)))


class DAN(nn.Module):
    """Distract-your-attention network with `heads` cross-attention heads.

    `heads=0` is the paper's baseline: ResNet-18, pooling, one linear layer; with `cosine` that
    gives cosines, as ArcFace wants them. `width`: channels of ResNet-18's first stage; 64 in the
    paper, and in all pre-trained files.
    Input (B,3,S,S), S divisible by 32, normalised by MEAN and STD.
    """

    def __init__(
        self, classes: int, heads: int = 4, *, width: int = WIDTH, cosine: bool = False,
        fusion: Fusion = "log_softmax",
    ) -> None:  # fmt: skip
        super().__init__()
        self.fusion, self.width, self.channels = fusion, width, LAST * width
        self.backbone = _resnet18(width)
        self.heads = nn.ModuleList(_head(self.channels) for _ in range(heads))
        self.heads.apply(_initialise)
        self.classifier = (CosineClassifier if cosine else nn.Linear)(self.channels, classes)
        # The authors' release normalises the logits; the paper's text does not mention it.
        self.logit_norm = nn.BatchNorm1d(classes) if heads else nn.Identity()

    def forward(self, images: Tensor) -> Output:
        x = self.backbone(images)
        features = _pool(x)
        if not self.heads:
            return Output(self.classifier(features), features, None)
        attended = torch.stack([head(x) for head in self.heads], dim=1)
        # Equation 5; over a single head the log-softmax would be all zero
        spread = attended.log_softmax(dim=1) if len(self.heads) > 1 else attended
        fused = attended.mean(dim=1) if self.fusion == "mean" else spread.sum(dim=1)
        logits = self.logit_norm(self.classifier(fused))
        return Output(logits, features, spread)


def _resnet18(width: int) -> nn.Sequential:
    """ResNet-18 (arXiv 1512.03385) without pooling and classifier, as torchvision makes it.

    By its names, and where the width is 64 with the numbers that it draws from torch's generator.
    """
    stages = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
        bn1=nn.BatchNorm2d(width),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(3, stride=2, padding=1),
        layer1=nn.Sequential(BasicBlock(width, width), BasicBlock(width, width)),
    )
    for number in range(2, 5):
        inputs, outputs = width * 2 ** (number - 2), width * 2 ** (number - 1)
        shortcut = nn.Sequential(conv1x1(inputs, outputs, 2), nn.BatchNorm2d(outputs))
        blocks = BasicBlock(inputs, outputs, 2, shortcut), BasicBlock(outputs, outputs)
        stages[f"layer{number}"] = nn.Sequential(*blocks)
    nn.Linear(LAST * width, 1000)  # torchvision's classifier, which draws numbers too
    backbone = nn.Sequential(stages)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def _head(channels: int) -> nn.Sequential:
    parts = {"spatial": SpatialAttention(channels), "channel": ChannelAttention(channels)}
    return nn.Sequential(OrderedDict(parts))


def _pool(x: Tensor) -> Tensor:
    """(B,C) means over the places of (B,C,h,w), in float32 where autocast has made x bfloat16.

    What the losses compare, heads and images, differs by less than bfloat16 resolves.
    """
    return x.mean(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


def _conv(inputs: int, outputs: int, kernel: int | tuple[int, int]) -> nn.Sequential:
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (size[0] // 2, size[1] // 2)
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, padding=padding), nn.BatchNorm2d(outputs))


def _initialise(module: nn.Module) -> None:
    """The authors' release: Kaiming fan-out convolutions, near-zero linear layers, zero biases."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        assert module.bias is not None
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.001)
        nn.init.zeros_(module.bias)


def cost(
    classes: int, heads: int, image_size: int, *, width: int = WIDTH, cosine: bool = False
) -> dict[str, str]:
    """The network's parameters, and the GFLOPs of one image's forward pass (2 a multiply-add).

    As tags of a run: they are no metrics of a step, and follow from its parameters.
    """
    with torch.device("meta"):  # shapes alone, no memory; and no autocast, which cosines ask for
        network = DAN(classes, heads, width=width).eval()
        image = torch.empty(1, 3, image_size, image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    bias = classes if cosine else 0  # a classifier of cosines has none
    parameters = sum(p.numel() for p in network.parameters()) - bias
    gflops = counter.get_total_flops() / 1e9
    return {"network.parameters": str(parameters), "network.gflops": f"{gflops:.6g}"}
