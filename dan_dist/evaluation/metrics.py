"""Numbers of a whole split, from what a network gives for every image: pure numpy."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Probabilities = NDArray[np.float32]  # (images, classes)
Labels = NDArray[np.integer]  # (images,)
BINS = 15  # of confidence, as Guo et al. 2017


def confusion(probabilities: Probabilities, labels: Labels) -> NDArray[np.int64]:
    """(classes, classes) counts: row the true label, column the most probable class."""
    classes = probabilities.shape[1]
    cells = labels.astype(np.int64) * classes + probabilities.argmax(axis=1)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def cross_entropy(probabilities: Probabilities, labels: Labels) -> float:
    """The mean of -log p of the true class, in nats; a p of 0 counts as float32's least."""
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(own, np.finfo(np.float32).tiny)).mean())


def summarise(matrix: NDArray[np.int64], class_names: tuple[str, ...]) -> dict[str, float]:
    """Accuracy, mean recall and macro-F1 over the classes that have images, each such recall."""
    scores = {n: s for n, s in class_scores(matrix, class_names).items() if s["images"]}
    return {
        "accuracy": float(matrix.trace() / matrix.sum()),
        "mean_recall": float(np.mean([s["recall"] for s in scores.values()])),
        "macro_f1": float(np.mean([s["f1"] for s in scores.values()])),
        **{f"recall/{n}": s["recall"] for n, s in scores.items()},
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


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Shares as text, but those of single classes ("recall/happy")."""
    whole = {name.replace("_", " "): share for name, share in metrics.items() if "/" not in name}
    return ", ".join(f"{name} {100 * share:.2f} %" for name, share in whole.items())
