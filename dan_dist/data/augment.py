"""Training augmentation as numbers: uniforms in, warp matrices and erase boxes out (pure numpy).

The transforms and their order are torchvision's, as the authors' release composes them: flip,
RandomAffine (nearest neighbour, filled with 0), normalisation, RandomErasing (with the mean).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, RGB, of values in [0, 1]
STD = (0.229, 0.224, 0.225)

ERASE_TRIES = 4  # torchvision draws up to 10 boxes until one fits; all but 1 in 10⁴ fit by the 4th
ERASE_RATIO = (0.3, 3.3)  # height ÷ width, torchvision's default
UNIFORMS = 9 + 2 * ERASE_TRIES  # numbers used per image


@dataclass(frozen=True)
class Augment:
    """What happens to a training image; the defaults do nothing."""

    flip_p: float = 0.0  # probability of a horizontal flip
    affine_p: float = 0.0  # probability of rotation, scaling and shift together
    degrees: float = 0.0  # rotation, uniform in ±degrees
    scale: tuple[float, float] = (1.0, 1.0)
    translate: float = 0.0  # shift, uniform in ±translate · image size, whole pixels
    erase_p: float = 0.0  # probability of erasing one box
    erase_area: tuple[float, float] = (0.02, 0.33)  # of the image's area


class Placement(NamedTuple):
    """Per image: where each output pixel comes from, and which box is erased."""

    warped: NDArray[np.bool_]  # (n,): by `matrix`; the others are flipped at most
    flip: NDArray[np.int32]  # (n,): 1 flips
    matrix: Floats  # (n, 2, 3): output (x, y, 1) → input (x, y), pixel centres at +0.5; flips too
    anchor: Floats  # (n, 2): upper left corner (y, x) of the erased box
    shape: Floats  # (n, 2): its height and width; 0 erases nothing


def placements(uniforms: Floats, augment: Augment, size: int) -> Placement:
    """The placement of n images of size×size pixels from (n, UNIFORMS) numbers in [0, 1)."""
    u = uniforms.astype(np.float64)
    flip, warped = u[:, 0] < augment.flip_p, u[:, 1] < augment.affine_p
    matrix = _matrices(u[:, 2:6], flip, augment, size)
    return Placement(warped, flip.astype(np.int32), matrix, *_erase_boxes(u[:, 6:], augment, size))


def _matrices(
    u: NDArray[np.float64], flip: NDArray[np.bool_], augment: Augment, size: int
) -> Floats:
    """Flip first, then rotate and scale about the centre, then shift; inverted: output → input."""
    angle = np.radians((2 * u[:, 0] - 1) * augment.degrees)
    low, high = augment.scale
    scale = low + u[:, 1] * (high - low)
    shift = np.round((2 * u[:, 2:4] - 1) * augment.translate * size)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    center = size / 2
    matrix = np.empty((len(u), 2, 3))
    matrix[:, 0, :2] = np.stack([cos, sin], axis=1)
    matrix[:, 1, :2] = np.stack([-sin, cos], axis=1)
    matrix[:, :, 2] = center - np.einsum("nij,nj->ni", matrix[:, :, :2], center + shift)
    matrix[flip, 0] *= -1
    matrix[flip, 0, 2] += size
    return matrix.astype(np.float32)


def _erase_boxes(u: NDArray[np.float64], augment: Augment, size: int) -> tuple[Floats, Floats]:
    """The first of a few random boxes that fits inside the image (Zhong et al. 2017)."""
    area = size * size * (augment.erase_area[0] + u[:, 3::2] * np.ptp(augment.erase_area))
    low, high = map(math.log, ERASE_RATIO)
    ratio = np.exp(low + u[:, 4::2] * (high - low))
    height, width = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
    fits = (height < size) & (width < size)
    first, rows = fits.argmax(axis=1), np.arange(len(u))
    shape = np.stack([height[rows, first], width[rows, first]], axis=1)
    shape[~fits.any(axis=1) | (u[:, 0] >= augment.erase_p)] = 0
    anchor = np.floor(u[:, 1:3] * (size - shape + 1))
    return anchor.astype(np.float32), shape.astype(np.float32)
