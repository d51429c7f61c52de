"""Whether two image files show the same photograph, however each was saved, cut or mirrored.

A perceptual hash (imagehash's DCT hash, of the picture and of its mirror image) finds candidates,
and their coarse structure sorts out most; whether the others are the same is decided by their
pixels: by the largest correlation of the fine structure of one with that of the other, over cuts of
up to 5 % on each side of either. Light and contrast do not count. 1,040 bytes an image are kept.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from shards.jpeg import small_gray

SIDE = 32  # pixels of what is kept of a picture
BITS = 14  # of 64, in which the hashes of one photograph differ at most
COARSE = 10  # frequencies of each axis
NEAR = 0.74  # correlation of the coarse structure, below which pictures are not compared
PLAUSIBLE = 0.4  # correlation without a cut, below which none is tried
SAME = 0.9  # correlation with the best cut, from which on two pictures are one
CUTS = (0.0, 0.025, 0.05)  # of a side
TRIED = 12  # cuts, of those that come nearest
DECODED = 48  # pixels: a JPEG is decoded at a half or less of its size, but not below
ROWS, COLUMNS = 128, 8192  # pictures of two lists whose hashes are compared at once: 8 MB

LIKENESS = np.dtype(
    [("hashes", "<u8", (2,)), ("thumb", "u1", (SIDE, SIDE))]  # of the picture, its mirror image
)
Likenesses = NDArray[Any]  # (N,) LIKENESS: what is kept of N pictures
Images = NDArray[Any]  # (N, SIDE, SIDE) float32


class Pairs(NamedTuple):
    """Pictures of two lists that are one photograph: places in both, and how alike they are."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    alike: NDArray[np.float32]  # SAME to 1


class _Kept(NamedTuple):
    """A list of pictures, as they are compared."""

    hashes: tuple[NDArray[np.uint64], NDArray[np.uint64]]  # of the pictures, of their mirror images
    coarse: NDArray[np.float32]  # (N, COARSE²)
    thumbs: NDArray[np.uint8]


def likenesses(pictures: Iterable[Image.Image]) -> Likenesses:
    """What is kept of pictures of any size and mode."""
    kept = []
    for picture in pictures:
        gray = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=3.0)
        thumb = np.asarray(gray)
        forms = (gray, Image.fromarray(np.ascontiguousarray(thumb[:, ::-1])))
        kept.append(([_hash(form) for form in forms], thumb))
    return np.array(kept, LIKENESS)


def _hash(gray: Image.Image) -> int:
    """64 bits that look-alikes have in common, but for a few."""
    import imagehash  # with PyWavelets and parts of SciPy: seconds, which no training needs

    return int(str(imagehash.phash(gray)), 16)


def jpeg_picture(jpeg: bytes) -> Image.Image:
    """The picture by which a JPEG is compared; all who compare packed images compare this one.

    Raises:
        ValueError: its data are damaged.
    """
    return Image.fromarray(np.ascontiguousarray(small_gray(jpeg, DECODED)))


def jpeg_picture_or_blank(jpeg: bytes) -> Image.Image:
    """The same; of damaged data a picture that is like no other."""
    try:
        return jpeg_picture(jpeg)
    except ValueError:
        return Image.new("L", (1, 1))


def same_photographs(a: Likenesses, b: Likenesses | None = None, workers: int = 1) -> Pairs:
    """All pairs of a picture of `a` and one of `b` that are the same photograph.

    Without `b`, of two pictures of `a`: each pair once. workers: threads.
    """
    one = _kept(a)
    other = one if b is None else _kept(b)
    starts = range(0, len(other.thumbs), ROWS)
    found = [Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    with (
        tqdm(desc="comparing pictures", total=len(starts), leave=False, disable=None) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for pairs in pool.map(lambda first: _compare(one, other, first), starts):
            found.append(pairs)
            bar.update()
    left, right, alike = (np.concatenate(part) for part in zip(*found, strict=True))
    # A picture that is its own mirror image is found twice
    order = np.lexsort((-alike, left, right))
    left, right, alike = left[order], right[order], alike[order]
    new = (np.diff(right, prepend=-1) != 0) | (np.diff(left, prepend=-1) != 0)
    return Pairs(left[new], right[new], alike[new])


def _kept(pictures: Likenesses) -> _Kept:
    from scipy.fft import dctn

    hashes = (np.ascontiguousarray(pictures["hashes"][:, k]) for k in (0, 1))
    coarse = np.empty((len(pictures), COARSE**2), np.float32)
    for first in range(0, len(pictures), COLUMNS):
        own = slice(first, first + COLUMNS)
        waves = dctn(pictures["thumb"][own].astype(np.float32), axes=(1, 2), norm="ortho")
        waves = (waves[:, :COARSE, :COARSE] * _FREQUENCY).reshape(-1, COARSE**2)
        coarse[own] = waves / np.maximum(np.linalg.norm(waves, axis=1, keepdims=True), 1e-3)
    return _Kept((next(hashes), next(hashes)), coarse, pictures["thumb"])


def _compare(a: _Kept, b: _Kept, first: int) -> Pairs:
    """The pairs of ROWS pictures of `b` and all of `a`; of one list, with those before them."""
    rows = slice(first, min(first + ROWS, len(b.thumbs)))
    last = rows.stop if a is b else len(a.thumbs)
    found = []
    for mirrored in (False, True):
        left, right = _candidates(a, b, rows, last, mirrored=mirrored)
        is_pair = left < right if a is b else np.ones(len(left), bool)
        left, right = left[is_pair], right[is_pair]
        alike = _alike(a.thumbs, left, b.thumbs, right, mirrored=mirrored)
        same = alike >= SAME
        found.append((left[same], right[same], alike[same]))
    return Pairs(*(np.concatenate(part) for part in zip(*found, strict=True)))


def _candidates(
    a: _Kept, b: _Kept, rows: slice, last: int, *, mirrored: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pictures of `a`, up to the `last`, and of these `rows` of `b` whose pixels are compared."""
    hashes, coarse = b.hashes[0][rows], b.coarse[rows]
    if mirrored:
        coarse = coarse * _MIRRORED
    found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    for start in range(0, last, COLUMNS):
        others = a.hashes[mirrored][start : min(start + COLUMNS, last)]
        right, left = np.nonzero(np.bitwise_count(hashes[:, None] ^ others) <= BITS)
        left += start
        near = np.einsum("ij,ij->i", a.coarse[left], coarse[right]) >= NEAR
        found.append((left[near], right[near] + rows.start))
    left, right = (np.concatenate(part) for part in zip(*found, strict=True))
    return left, right


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


def _means(count: int) -> Images:
    """The matrix that replaces each of SIDE pixels of a line by the mean of `count` around it."""
    line = np.pad(np.eye(SIDE, dtype=np.float32), ((count // 2, count // 2), (0, 0)), "symmetric")
    means: Images = np.lib.stride_tricks.sliding_window_view(line, count, axis=0).mean(-1)
    return means


_FREQUENCY: NDArray[np.float32] = np.hypot(*np.indices((COARSE, COARSE))).astype(np.float32)
# Of a mirror image, the coefficients of odd frequencies across are negative
_MIRRORED: NDArray[np.float32] = np.tile(1 - 2 * (np.arange(COARSE) % 2), COARSE).astype(np.float32)
_SMOOTH: Images = _means(9)
_CUTS = [_resampling(low, 1 - high) for low in CUTS for high in CUTS]
_CUT: Images = np.concatenate(_CUTS)  # (9 * SIDE, SIDE)
_TURNED: Images = np.stack([matrix.T for matrix in _CUTS])  # (9, SIDE, SIDE)
_COLUMNS: Images = _TURNED.reshape(len(_CUTS), -1).T  # (SIDE * SIDE, 9)
