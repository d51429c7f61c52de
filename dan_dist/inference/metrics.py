"""Numbers of a look inside a network, from its maps and features as arrays."""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

PERPLEXITY = 30.0  # of t-SNE, scikit-learn's own
AREA = 0.2  # of an image: the share of its pixels that counts as what a head looks at


def head_overlap(maps: NDArray[np.floating]) -> float:
    """How far heads look at the same places of one image: 1 the same, 0 none in common.

    The mean over all pairs of heads of their areas' intersection over union. A head's area is the
    AREA of the pixels where its map is largest (of equal ones the first); pixels of the map's
    lowest value, where nothing is looked at, are in no area.

    maps: (heads, h, w). Those of one value everywhere have no area and are left out; NaN where
    fewer than two are left.
    """
    flat = maps.reshape(len(maps), maps.shape[1] * maps.shape[2])
    above = flat > flat.min(axis=1, keepdims=True)
    largest = np.argsort(-flat, axis=1, kind="stable")[:, : round(AREA * flat.shape[1])]
    areas = np.zeros(flat.shape, bool)
    np.put_along_axis(areas, largest, True, axis=1)
    areas &= above
    pairs = combinations(areas[above.any(axis=1)], 2)
    overlaps = [(a & b).sum() / (a | b).sum() for a, b in pairs]
    return float(np.mean(overlaps)) if overlaps else float("nan")


def class_separation(features: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """How far classes lie apart, measured by how wide they are.

    The mean distance between two classes' means over the mean distance of an image to its class's
    mean, Euclidean. NaN where there is one class alone, or all classes are points.

    features: (images, dimensions), computed with in float64.
    """
    classes, numbers = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(classes), features.shape[1]))
    np.add.at(sums, numbers, features)
    means = sums / np.bincount(numbers)[:, None]
    within = np.linalg.norm(features - means[numbers], axis=1).mean()
    between = [np.linalg.norm(a - b) for a, b in combinations(means, 2)]
    return float(np.mean(between) / within) if between and within else float("nan")


def project(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """(images, 2) by t-SNE; all in one point where the features are."""
    from sklearn.manifold import TSNE  # takes a second to import

    if not np.ptp(features, axis=0).any():
        return np.zeros((len(features), 2), np.float32)
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)  # neighbours; there must be more images
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=0)
    points: NDArray[np.float32] = tsne.fit_transform(features)
    return points
