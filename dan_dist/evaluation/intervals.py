"""95 % intervals of an evaluation's figures: how far they would go with other images like these.

Shares of images (accuracy, a class's recall): Wilson 1927. Means over classes (mean recall,
macro-F1): bootstrap percentiles, where images are drawn anew within each true class. Means over
sets: from the sets' own intervals.
"""

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Interval = list[float]  # from, to; a list, as JSON has no tuples

LEVEL = 0.95
DRAWS = 2000  # of the bootstrap
METHOD = (
    f"{100 * LEVEL:.0f} %; accuracy, recalls: Wilson; mean recall, macro-F1: bootstrap within each "
    f"class, {DRAWS} draws"
)


def intervals(matrix: NDArray[np.int64], class_names: tuple[str, ...]) -> dict[str, Interval]:
    """The interval of each figure that `metrics.summarise` gives of a confusion matrix."""
    images, hits = matrix.sum(axis=1), matrix.diagonal()
    present = np.flatnonzero(images).tolist()
    mean_recall, macro_f1 = _bootstrap(matrix)
    return {
        "accuracy": wilson(int(hits.sum()), int(images.sum())),
        "mean_recall": mean_recall,
        "macro_f1": macro_f1,
        **{f"recall/{class_names[k]}": wilson(int(hits[k]), int(images[k])) for k in present},
    }


def wilson(right: int, images: int) -> Interval:
    """The score interval of a share of independent images."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share, weight = right / images, z * z / images
    centre = (share + weight / 2) / (1 + weight)
    half = z * np.sqrt(share * (1 - share) / images + weight / (4 * images)) / (1 + weight)
    # Of none and of all images an end is the share itself, which rounding would miss
    return [float(max(0.0, min(share, centre - half))), float(min(1.0, max(share, centre + half)))]


def of_mean(shares: Sequence[float], found: Sequence[Interval]) -> Interval:
    """Of the mean of independent shares, from their own intervals (MOVER, Zou and Donner 2008)."""
    mean, (low, high) = np.mean(shares), np.transpose(found)
    below, above = (float(np.linalg.norm(shares - end)) / len(shares) for end in (low, high))
    return [float(mean) - below, float(mean) + above]


def _bootstrap(matrix: NDArray[np.int64]) -> tuple[Interval, Interval]:
    """Of mean recall and macro-F1; the draws are the same for the same matrix."""
    rng = np.random.Generator(np.random.Philox(0))
    images, classes = matrix.sum(axis=1), len(matrix)
    hits, predicted = np.zeros((DRAWS, classes)), np.zeros((DRAWS, classes))
    for k in np.flatnonzero(images).tolist():
        cells = np.flatnonzero(matrix[k])  # a network confuses a class with few others
        drawn = rng.multinomial(images[k], matrix[k, cells] / images[k], size=DRAWS)
        predicted[:, cells] += drawn
        hits[:, k] = drawn[:, cells == k].sum(axis=1)
    own = images > 0
    recalls = hits[:, own] / images[own]
    f1 = 2 * hits[:, own] / (images[own] + predicted[:, own])
    ends = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    low, high = np.percentile([recalls.mean(axis=1), f1.mean(axis=1)], ends, axis=1).tolist()
    return [low[0], high[0]], [low[1], high[1]]


def format_figures(figures: Mapping[str, float], found: Mapping[str, Interval]) -> str:
    """Shares as text, each with its interval; without those of single classes."""
    return ", ".join(
        f"{name.replace('_', ' ')} {100 * figures[name]:.2f} % "
        f"({100 * low:.2f} to {100 * high:.2f})"
        for name, (low, high) in found.items()
        if "/" not in name
    )
