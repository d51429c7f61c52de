"""Attention maps: Grad-CAM++ as its paper has it, and the numbers of maps and features by hand."""

from collections import OrderedDict

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dan_dist.inference.attention import attention_maps
from dan_dist.inference.metrics import class_separation, head_overlap, project
from dan_dist.model.dan import DAN


def heat(*pixels: int, shape: tuple[int, int] = (2, 5)) -> NDArray[np.float32]:
    """A map that is 1 at the numbered pixels, 0.5 at the last one, else 0."""
    flat = np.zeros(shape[0] * shape[1], np.float32)
    flat[list(pixels)] = 1
    flat[pixels[-1]] = 0.5
    return flat.reshape(shape)


def test_overlap_by_hand() -> None:
    """A fifth of ten pixels are two."""
    a, b, c = heat(0, 1), heat(1, 2), heat(8, 9)
    assert head_overlap(np.stack([a, a, a])) == 1
    assert head_overlap(np.stack([a, c])) == 0
    assert head_overlap(np.stack([a, b])) == pytest.approx(1 / 3)
    assert head_overlap(np.stack([a, b, c])) == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert head_overlap(np.stack([a, 10 * a + 3])) == 1  # the scale does not matter


def test_overlap_of_maps_with_equal_values_or_none() -> None:
    a, flat = heat(0, 1), np.full((2, 5), 0.7, np.float32)
    assert head_overlap(np.stack([a, flat, a])) == 1
    assert np.isnan(head_overlap(np.stack([a, flat])))
    assert np.isnan(head_overlap(np.empty((0, 2, 5), np.float32)))
    # Four largest ones: the first two count; one pixel alone: the rest, which are least, do not.
    many, one = heat(0, 1, 2, 3, 4), heat(1)
    assert head_overlap(np.stack([many, a])) == 1
    assert head_overlap(np.stack([one, a])) == 1 / 2
    assert head_overlap(np.stack([one, heat(9)])) == 0


def test_separation_by_hand() -> None:
    """Means (0, 0), (6, 0), (0, 8), apart by 6, 8 and 10; images 1 from them, or 3."""
    features = np.array([[-1, 0], [1, 0], [6, -1], [6, 1], [0, 5], [0, 11]], np.float32)
    labels = np.array([0, 0, 5, 5, 2, 2])
    expected = ((6 + 8 + 10) / 3) / ((1 + 1 + 1 + 1 + 3 + 3) / 6)
    assert class_separation(features, labels) == pytest.approx(expected)
    assert class_separation(100 * features + 7, labels) == pytest.approx(expected)
    assert np.isnan(class_separation(features, np.zeros(6, int)))
    assert np.isnan(class_separation(np.ones((6, 2)), labels))


def reference(network: DAN, images: Tensor) -> list[NDArray[np.float32]]:
    """Grad-CAM++ by equations 10 and 19 of arXiv 1710.11063 in float64: heads, then layer4.

    α = g² / (2 g² + Σ A · g³), w = Σ α · relu(g), map = relu(Σ w · A).
    """
    exact = DAN(network.classifier.out_features, len(network.heads)).double().eval()
    exact.load_state_dict(network.state_dict())
    outputs: list[Tensor] = []
    for layer in (*(head.spatial for head in exact.heads), exact.backbone.layer4):
        layer.register_forward_hook(lambda m, i, output: outputs.append(output))
    score = exact(images.double()).logits.max(dim=1).values.sum()
    if network.heads:  # layer4 runs first
        outputs = [*outputs[1:], outputs[0]]
    maps = []
    for a, g in zip(outputs, torch.autograd.grad(score, outputs), strict=True):
        alpha = g**2 / (2 * g**2 + a.sum(dim=(2, 3), keepdim=True) * g**3)
        weights = torch.where(g > 0, alpha * g, 0.0).sum(dim=(2, 3), keepdim=True)
        maps.append((weights * a).sum(dim=1).relu().detach().float().numpy())
    return maps


def enlarged(small: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """From the least value to the largest, bilinear, the largest 1."""
    large = cv2.resize((small - small.min()) / np.ptp(small), (side, side))
    return large / large.max()


@pytest.mark.parametrize(
    ("heads", "layout"),
    [(h, torch.contiguous_format) for h in (0, 1, 3)] + [(3, torch.channels_last)],
)
def test_maps_are_grad_cam_plus_plus(heads: int, layout: torch.memory_format) -> None:
    torch.manual_seed(1)
    network = DAN(8, heads).eval()
    images = torch.randn(3, 3, 96, 96)
    expected = reference(network, images)
    placed = images.to(memory_format=layout)
    logits, maps = attention_maps(network.to(memory_format=layout), placed)
    assert maps.shape == (3, heads + 1, 96, 96) and maps.dtype == np.float32
    assert torch.allclose(logits, network(images).logits, rtol=1e-4, atol=1e-5)
    for panel, small in enumerate(expected):
        for k in range(3):
            assert np.abs(maps[k, panel] - enlarged(small[k], 96)).max() < 1e-4, (panel, k)
    # Nothing is left behind: no hook, no gradient.
    assert not any(m._forward_hooks for m in network.modules())
    assert all(p.grad is None for p in network.parameters())


def test_an_error_inside_is_not_lost() -> None:
    network = DAN(8, 1).eval()
    network.classifier.register_forward_hook(lambda m, i, o: [][0])
    with pytest.raises(IndexError) as caught:  # and holds on to all that was alive
        attention_maps(network, torch.randn(1, 3, 64, 64))
    assert not network.heads[0].spatial._forward_hooks, caught


def two_heads(first: int, second: int) -> DAN:
    """A network whose heads look where one colour (0 red, 1 green, 2 blue) is bright."""
    torch.manual_seed(0)
    network = DAN(4, 2).eval()
    patches = nn.Conv2d(3, 512, 32, stride=32)
    nn.init.zeros_(patches.weight)
    nn.init.uniform_(patches.bias, 0.5, 1.5)
    for colour in range(3):
        patches.weight.data[colour, colour] = 1 / 32**2
        patches.bias.data[colour] = 0
    network.backbone = nn.Sequential(OrderedDict(layer4=patches))
    for head, colour in zip(network.heads, (first, second), strict=True):
        for convolution in (m for m in head.spatial.modules() if isinstance(m, nn.Conv2d)):
            nn.init.zeros_(convolution.weight)
        head.spatial.reduce[0].weight.data[0, colour] = 1
        head.spatial.square[0].weight.data[0, 0, 1, 1] = 1
        nn.init.normal_(head.channel.gate[3].bias, std=2)  # vectors differ where the places do not
    return network


def test_heads_that_look_elsewhere_overlap_less() -> None:
    images = torch.zeros(1, 3, 160, 160)
    images[:, 0, :64, :64] = 1.0  # red above on the left, green below on the right
    images[:, 1, 96:, 96:] = 0.9
    _, same = attention_maps(two_heads(0, 0), images)
    _, apart = attention_maps(two_heads(0, 1), images)
    assert same[0, 0, :64, :64].mean() > 10 * same[0, 0, 96:, 96:].mean()
    assert apart[0, 1, 96:, 96:].mean() > 10 * apart[0, 1, :64, :64].mean()
    assert head_overlap(same[0, :2]) > 0.9
    assert head_overlap(apart[0, :2]) < 0.1


def test_heads_that_do_the_same_have_empty_maps() -> None:
    """Over equal heads the log-softmax has no gradient; the backbone's, their sum, has none too."""
    network = two_heads(0, 0)
    network.heads[1].load_state_dict(network.heads[0].state_dict())
    _, maps = attention_maps(network, torch.rand(2, 3, 96, 96))
    assert not maps.any() and np.isnan(head_overlap(maps[0, :2]))


def test_features_in_one_point_are_drawn_there() -> None:
    assert (project(np.ones((5, 512), np.float32)) == 0).all()
    assert np.isfinite(project(np.eye(2, 512, dtype=np.float32))).all()
