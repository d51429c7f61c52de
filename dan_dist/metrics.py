"""Numbers of a whole split, from what a network gives for every image: pure numpy."""

from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Probabilities = NDArray[np.float32]  # (images, classes)
Labels = NDArray[np.integer]  # (images,)
BINS = 15  # of confidence, as Guo et al. 2017
AREA = 0.2  # of an image: the share of its pixels that counts as what a head looks at


def confusion(probabilities: Probabilities, labels: Labels) -> NDArray[np.int64]:
    """(classes, classes) counts: row the true label, column the most probable class."""
    classes = probabilities.shape[1]
    cells = labels.astype(np.int64) * classes + probabilities.argmax(axis=1)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def summarise(matrix: NDArray[np.int64], class_names: tuple[str, ...]) -> dict[str, float]:
    """Accuracy, mean recall over the classes that have images, and each such class's recall."""
    scores = class_scores(matrix, class_names)
    recalls = {f"recall/{n}": s["recall"] for n, s in scores.items() if s["images"]}
    return {
        "accuracy": float(matrix.trace() / matrix.sum()),
        "mean_recall": float(np.mean(list(recalls.values()))),
        **recalls,
    }


def class_scores(
    matrix: NDArray[np.int64], class_names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Each class's precision, recall, F1 (0 where nothing is to be divided by) and images."""
    hits = matrix.diagonal()
    images, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(images, 1)
    f1 = 2 * hits / np.maximum(images + predicted, 1)
    columns = {"precision": precision, "recall": recall, "f1": f1, "images": images}
    return {
        name: {key: column[k].item() for key, column in columns.items()}
        for k, name in enumerate(class_names)
    }


class Calibration(NamedTuple):
    """How far confidence is from accuracy, in `BINS` equal intervals of confidence."""

    error: float  # expected calibration error: mean distance of the two over all images
    images: NDArray[np.int64]  # (BINS,)
    confidence: NDArray[np.float64]  # (BINS,) mean of the bin's images; 0 where there are none
    accuracy: NDArray[np.float64]  # (BINS,) likewise


def calibrate(probabilities: Probabilities, labels: Labels) -> Calibration:
    """Expected calibration error (Guo et al. 2017, equation 3) and the bins it is made of."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    # bin m holds (m / BINS, (m + 1) / BINS]
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    images = np.bincount(bins, minlength=BINS)
    mean_confidence = np.bincount(bins, confidence, BINS) / np.maximum(images, 1)
    accuracy = np.bincount(bins, right, BINS) / np.maximum(images, 1)
    error = float((images * np.abs(accuracy - mean_confidence)).sum() / len(labels))
    return Calibration(error, images, mean_confidence, accuracy)


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


def class_separation(features: NDArray[np.floating], labels: Labels) -> float:
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
