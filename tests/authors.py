"""The authors' DAN: its equations by plain functions of tensors, and files in its layout."""

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
SPATIAL = {"conv1x1": (256, 512, 1, 1), "conv_3x3": (512, 256, 3, 3),
           "conv_1x3": (512, 256, 1, 3), "conv_3x1": (512, 256, 3, 1)}  # fmt: skip


def authors_state(classes: int, heads: int) -> State:
    """Random weights in the layout of the authors' files, double precision."""
    random = torch.Generator().manual_seed(classes + heads)
    state: State = {}

    def put(name: str, *shape: int) -> None:
        deviation = (2 / torch.Size(shape[1:] or (1,)).numel()) ** 0.5
        state[f"{name}.weight"] = torch.randn(shape, generator=random).double() * deviation

    def norm(name: str, channels: int) -> None:
        state[f"{name}.weight"] = 1 + 0.2 * torch.randn(channels, generator=random).double()
        for part in ("bias", "running_mean"):
            state[f"{name}.{part}"] = 0.2 * torch.randn(channels, generator=random).double()
        state[f"{name}.running_var"] = 0.5 + torch.rand(channels, generator=random).double()
        state[f"{name}.num_batches_tracked"] = torch.tensor(3)

    def with_bias(name: str, *shape: int) -> None:
        put(name, *shape)
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=random).double()

    put("features.0", 64, 3, 7, 7)
    norm("features.1", 64)
    width = 64
    for stage, wide in enumerate((64, 128, 256, 512), start=4):
        for block in range(2):
            name = f"features.{stage}.{block}"
            put(f"{name}.conv1", wide, width, 3, 3)
            norm(f"{name}.bn1", wide)
            put(f"{name}.conv2", wide, wide, 3, 3)
            norm(f"{name}.bn2", wide)
            if wide != width:
                put(f"{name}.downsample.0", wide, width, 1, 1)
                norm(f"{name}.downsample.1", wide)
            width = wide
    for head in range(heads):
        for conv, shape in SPATIAL.items():
            with_bias(f"cat_head{head}.sa.{conv}.0", *shape)
            norm(f"cat_head{head}.sa.{conv}.1", shape[0])
        with_bias(f"cat_head{head}.ca.attention.0", 32, 512)
        norm(f"cat_head{head}.ca.attention.1", 32)
        with_bias(f"cat_head{head}.ca.attention.3", 512, 32)
    with_bias("fc", classes, 512)
    norm("bn", classes)
    return state


class Reference:
    """DAN's equations by plain functions of tensors; in `settling`, BatchNorm learns its batch."""

    def __init__(self, state: State, heads: int) -> None:
        self.state, self.heads, self.settling = state, heads, False

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias, mean, var = (
            self.state[f"{name}.{part}"] for part in ("weight", "bias", "running_mean",
                                                      "running_var")
        )  # fmt: skip
        if self.settling:
            axes = [0, *range(2, x.ndim)]
            mean.copy_(x.mean(dim=axes))
            var.copy_(x.var(dim=axes) + 1e-3)
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = weight / torch.sqrt(var + 1e-5)
        return (x - mean.view(shape)) * scale.view(shape) + bias.view(shape)

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, padding)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def block(self, x: Tensor, name: str, stride: int) -> Tensor:
        y = torch.relu(self.norm(self.conv(x, f"{name}.conv1", stride), f"{name}.bn1"))
        y = self.norm(self.conv(y, f"{name}.conv2"), f"{name}.bn2")
        if f"{name}.downsample.0.weight" in self.state:
            x = self.norm(self.conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
        return torch.relu(x + y)

    def head(self, x: Tensor, name: str) -> Tensor:
        """Equations 3 and 4."""

        def branch(y: Tensor, part: str) -> Tensor:
            return self.norm(self.conv(y, f"{name}.sa.{part}.0"), f"{name}.sa.{part}.1")

        y = branch(x, "conv1x1")
        y = torch.relu(branch(y, "conv_3x3") + branch(y, "conv_1x3") + branch(y, "conv_3x1"))
        pooled = (x * y.sum(dim=1, keepdim=True)).mean(dim=(2, 3))
        gate = f"{name}.ca.attention"
        hidden = torch.relu(self.norm(self.linear(pooled, f"{gate}.0"), f"{gate}.1"))
        return pooled * torch.sigmoid(self.linear(hidden, f"{gate}.3"))

    def __call__(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(images, "features.0", 2), "features.1"))
        x = F.max_pool2d(x, 3, 2, 1)
        for stage in range(4, 8):
            for block in range(2):
                x = self.block(x, f"features.{stage}.{block}", 2 if stage > 4 and not block else 1)
        heads = torch.stack([self.head(x, f"cat_head{k}") for k in range(self.heads)])
        if self.heads > 1:  # equation 5
            heads = heads - heads.logsumexp(dim=0)
        return self.norm(self.linear(heads.sum(dim=0), "fc"), "bn")
