"""Alignment of a face by its five landmarks: a similarity transform to the standard template."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

# Eyes, nose, corners of the mouth (the left one of each first, as seen) in a 112-pixel square: the
# template of the ArcFace line of face recognition.
TEMPLATE_SIDE = 112
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655],
     [70.7299, 92.2041]]
)  # fmt: skip


def similarity(source: ArrayLike, target: ArrayLike) -> tuple[complex, complex]:
    """(a, b) of the rotation, scaling and shift z → a·z + b nearest to source → target.

    source, target: (n, 2) points; z = x + iy. Least squares, without reflection (Umeyama 1991).
    """
    z, w = _complex(source), _complex(target)
    centred = z - z.mean()
    spread = np.vdot(centred, centred).real
    if not spread > 0:
        raise ValueError(f"landmarks {np.asarray(source).tolist()} are one point")
    a = np.vdot(centred, w) / spread
    return complex(a), complex(w.mean() - a * z.mean())


def align(image: Image.Image, landmarks: ArrayLike, size: int) -> Image.Image:
    """The face in a size×size square, its landmarks where the template has them; black outside.

    landmarks: (5, 2), pixels, (0, 0) being the middle of the first pixel, as detectors give them.
    """
    corners = np.asarray(landmarks, float) + 0.5  # from the pixel's corner, as Pillow counts
    a, b = similarity(corners, (TEMPLATE + 0.5) * (size / TEMPLATE_SIDE))
    if abs(a) * max(image.size) < 1:  # the whole image would be less than a pixel
        raise ValueError(f"landmarks {np.asarray(landmarks).tolist()} are not those of a face")
    if (shrink := int(1 / abs(a))) > 1:  # else pixels would be skipped
        image, a = image.reduce(shrink), a * shrink
    back, shift = 1 / a, -b / a
    return image.transform(
        (size, size),
        Image.Transform.AFFINE,
        (back.real, -back.imag, shift.real, back.imag, back.real, shift.imag),
        Image.Resampling.BILINEAR,
    )


def _complex(points: ArrayLike) -> NDArray[np.complex128]:
    array = np.asarray(points, float)
    return array[:, 0] + 1j * array[:, 1]
