"""Whether two image files show the same photograph, however each was saved, cut or mirrored.

A perceptual hash (imagehash's DCT hash, of the picture and of its mirror image) finds candidates;
whether they are the same is decided by their pixels: by the largest correlation of the fine
structure of one with that of the other, over cuts of up to 5 % on each side of either. Light and
contrast do not count. 1,040 bytes an image are kept.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import uniform_filter1d
from tqdm import tqdm

SIDE = 32  # pixels of what is kept of a picture
BITS = 14  # of 64, in which the hashes of one photograph differ at most
PLAUSIBLE = 0.4  # correlation without a cut, below which none is tried
SAME = 0.9  # correlation with the best cut, from which on two pictures are one
CUTS = (0.0, 0.025, 0.05)  # of a side
TRIED = 12  # cuts, of those that come nearest
BLOCK_BYTES = 2**27  # of hashes that are compared at once

Images = NDArray[Any]  # (N, SIDE, SIDE) float32


class Likenesses(NamedTuple):
    """What is kept of N pictures."""

    hashes: NDArray[np.uint64]  # (N, 2): of the picture, of its mirror image
    thumbs: NDArray[np.uint8]  # (N, SIDE, SIDE), gray


class Pairs(NamedTuple):
    """Pictures of two lists that are one photograph: places in both, and how alike they are."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    alike: NDArray[np.float32]  # SAME to 1


def likenesses(pictures: Iterable[Image.Image]) -> Likenesses:
    """What is kept of pictures of any size and mode."""
    import imagehash  # with its parts of SciPy and PyWavelets, which no training needs

    hashes, thumbs = [], []
    for picture in pictures:
        gray = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=3.0)
        thumb = np.asarray(gray)
        forms = (gray, Image.fromarray(np.ascontiguousarray(thumb[:, ::-1])))
        hashes.append([int(str(imagehash.phash(form)), 16) for form in forms])
        thumbs.append(thumb)
    shape = (len(thumbs), SIDE, SIDE)
    return Likenesses(
        np.array(hashes, np.uint64).reshape(len(thumbs), 2),
        np.array(thumbs, np.uint8).reshape(shape),
    )


def joined(parts: list[Likenesses]) -> Likenesses:
    """Of several lists, one."""
    empty = likenesses([])
    return Likenesses(
        np.concatenate([empty.hashes, *(p.hashes for p in parts)]),
        np.concatenate([empty.thumbs, *(p.thumbs for p in parts)]),
    )


def same_photographs(a: Likenesses, b: Likenesses) -> Pairs:
    """All pairs of a picture of `a` and one of `b` that are the same photograph."""
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
    rows = max(1, BLOCK_BYTES // max(1, 8 * len(a.hashes)))
    with tqdm(desc="comparing pictures", total=len(b.hashes), leave=False, disable=None) as bar:
        for first in range(0, len(b.hashes), rows):
            own = b.hashes[first : first + rows, 0]
            for mirrored in (0, 1):
                differing = np.bitwise_count(own[:, None] ^ a.hashes[None, :, mirrored])
                right, left = np.nonzero(differing <= BITS)
                if len(left):
                    alike = _alike(a.thumbs, left, b.thumbs, right + first, mirrored=bool(mirrored))
                    same = alike >= SAME
                    found.append((left[same], right[same] + first, alike[same]))
            bar.update(len(own))
    if not found:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    left, right, alike = (np.concatenate(part) for part in zip(*found, strict=True))
    # A picture that is its own mirror image is found twice
    order = np.lexsort((-alike, left, right))
    left, right, alike = left[order], right[order], alike[order]
    new = (np.diff(right, prepend=-1) != 0) | (np.diff(left, prepend=-1) != 0)
    return Pairs(left[new], right[new], alike[new])


def _alike(
    a: NDArray[np.uint8], left: NDArray[np.int64], b: NDArray[np.uint8], right: NDArray[np.int64],
    *, mirrored: bool, chunk: int = 128,
) -> NDArray[np.float32]:  # fmt: skip
    """The correlation of each pair's fine structure, with the best cut where it is plausible."""
    found = np.empty(len(left), np.float32)
    for first in range(0, len(left), chunk):
        own = slice(first, first + chunk)
        x, y = a[left[own]].astype(np.float32), b[right[own]].astype(np.float32)
        x = x[:, :, ::-1] if mirrored else x
        fine_x, fine_y = _fine(x), _fine(y)
        alike = (_unit(fine_x) * _unit(fine_y)).sum((1, 2))
        tried = np.flatnonzero(alike > PLAUSIBLE)
        if len(tried):
            best = np.maximum(
                _best_cut(x[tried], fine_y[tried]), _best_cut(y[tried], fine_x[tried])
            )
            alike[tried] = np.maximum(alike[tried], best)
        found[own] = alike
    return found


def _best_cut(cut: Images, fine: Images) -> Images:
    """The largest correlation of `fine` with the fine structure of a cut of the other picture.

    Which cuts come near is told by the products alone, whose matrices are small; of the TRIED best
    ones correlations are computed.
    """
    target = fine - _SMOOTH.T @ fine @ _SMOOTH  # ⟨fine(w), fine⟩ = ⟨w, target⟩
    rows = (_CUT @ cut).reshape(len(cut), -1, SIDE, SIDE)
    inner = rows.swapaxes(2, 3) @ target[:, None]
    products = inner.reshape(-1, SIDE * SIDE) @ _COLUMNS
    best = np.argpartition(products.reshape(len(cut), -1), -TRIED)[:, -TRIED:]
    r, c = np.divmod(best, len(_CUTS))
    chosen = np.take_along_axis(rows, r[:, :, None, None], axis=1) @ _TURNED[c]
    found = _fine(chosen.reshape(-1, SIDE, SIDE)).reshape(*best.shape, SIDE, SIDE)
    products = (found * _unit(fine)[:, None]).sum((2, 3))
    norms = np.sqrt((found**2).sum((2, 3)))
    correlation: Images = (products / np.maximum(norms, 1e-3)).max(1)
    return correlation


def _fine(pictures: Images) -> Images:
    """What is left of pictures (N, SIDE, SIDE) when their surroundings' mean is taken away."""
    fine: Images = pictures - _SMOOTH @ pictures @ _SMOOTH.T
    return fine


def _unit(pictures: Images) -> Images:
    """Of norm 1; a picture without structure stays near 0."""
    unit: Images = pictures / np.maximum(np.sqrt((pictures**2).sum((1, 2), keepdims=True)), 1e-3)
    return unit


def _resampling(low: float, high: float) -> Images:
    """The matrix that enlarges [low, high] of a line of SIDE pixels to the whole, linearly."""
    places = (low + (high - low) * (np.arange(SIDE) + 0.5) / SIDE) * SIDE - 0.5
    before = np.clip(np.floor(places).astype(int), 0, SIDE - 2)
    part = np.clip(places - before, 0, 1).astype(np.float32)
    matrix = np.zeros((SIDE, SIDE), np.float32)
    matrix[np.arange(SIDE), before] = 1 - part
    matrix[np.arange(SIDE), before + 1] += part
    return matrix


_SMOOTH: Images = uniform_filter1d(np.eye(SIDE, dtype=np.float32), 9, axis=0)
_CUTS = [_resampling(low, 1 - high) for low in CUTS for high in CUTS]
_CUT: Images = np.concatenate(_CUTS)  # (9 * SIDE, SIDE)
_TURNED: Images = np.stack([matrix.T for matrix in _CUTS])  # (9, SIDE, SIDE)
_COLUMNS: Images = _TURNED.reshape(len(_CUTS), -1).T  # (SIDE * SIDE, 9)
