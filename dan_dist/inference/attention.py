"""Where each head of a network looks: Grad-CAM++ (Chattopadhyay et al., arXiv 1710.11063)."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dan_dist.model.dan import DAN

STRIDE = 32  # pixels of the image to a place of a map
LARGEST_GRADIENT = 1e3  # to which gradients are scaled; see _scale


class _Logits(nn.Module):
    """The network's logits alone, as grad-cam wants them."""

    def __init__(self, network: DAN) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images).logits
        return logits


def attention_maps(network: DAN, images: Tensor) -> tuple[Tensor, NDArray[np.float32]]:
    """The logits (n, classes), and the Grad-CAM++ of each one's most probable class.

    Of each head the map of what its spatial attention gives out, s_i of equation 3; last, of the
    backbone's last stage, in which the gradients of all heads meet. Maps are enlarged to the
    images' size and divided by their largest value; one that is the same everywhere is all 0.

    network: float32, in evaluation mode; afterwards only its last stage wants gradients.
    images: (n, 3, S, S), normalised. The maps: (n, heads + 1, S, S), 0 to 1.
    """
    from pytorch_grad_cam import GradCAMPlusPlus

    stage = network.backbone.get_submodule("layer4")
    network.requires_grad_(False)
    stage.requires_grad_()  # what lies before it needs no gradients, and then no memory for them
    # In the order in which they run, as the package counts on
    layers = [stage, *(head.get_submodule("spatial") for head in network.heads)]
    cam = GradCAMPlusPlus(_Logits(network), layers)
    hooks = cam.activations_and_grads
    try:  # not `with cam`, which swallows IndexErrors
        logits: Tensor = hooks(images)
        logits.max(dim=1).values.sum().backward()  # type: ignore[no-untyped-call]
        _scale(hooks)
        fused, *each = cam.compute_cam_per_layer(images, None, False)
    finally:
        hooks.release()
        network.zero_grad()
    maps = np.concatenate([*each, fused], axis=1)
    peaks = maps.max(axis=(2, 3), keepdims=True)
    return logits.detach(), np.divide(maps, peaks, out=np.zeros_like(maps), where=peaks > 0)


def _scale(hooks: Any) -> None:
    """Gradients times a factor, activations divided by it: the maps stay as they are.

    The package adds 1e-6 to the denominator of Grad-CAM++'s equation 19. Beside this network's
    squared gradients, 1e-8 and less, that is no guard against 0 but would itself set the weights.
    """
    for k, gradient in enumerate(hooks.gradients):
        largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
        factor = torch.where(largest > 0, LARGEST_GRADIENT / largest, 1.0)
        hooks.gradients[k] = gradient * factor
        hooks.activations[k] = hooks.activations[k] / factor
