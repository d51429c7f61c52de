"""What AffectNet's releases share: classes, labels, and the values kept in a sample's JSON."""

import math
from typing import Any

import numpy as np

from shards.release import LeftOut

CLASSES = ("neutral", "happy", "sad", "surprise", "fear", "disgust", "anger", "contempt")
NO_CLASS = {8: "none", 9: "uncertain", 10: "non-face"}


def is_class(label: int, classes: int, left_out: LeftOut) -> bool:
    """Whether a label is one of the classes; an image of another is left out."""
    if label < classes:
        return True
    left_out.add(f"label {label} ({NO_CLASS.get(label) or CLASSES[label]})")
    return False


def check_label(value: Any, where: str) -> int:
    """A label of AffectNet, from a number or text."""
    try:
        label = int(float(value))
        if label != float(value):
            raise ValueError(f"{value} is no whole number")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {value!r} is no label: {error}") from error
    if not 0 <= label <= max(NO_CLASS):
        raise ValueError(f"{where}: label {label}, expected 0 to {max(NO_CLASS)}")
    return label


def make_meta(
    values: dict[str, Any], corner: tuple[int, int], original: tuple[int, int], size: int | None
) -> dict[str, Any] | None:
    """The values of an image's JSON, which knows no infinity; landmarks in the image's pixels."""
    meta: dict[str, Any] = {}
    for name, numbers in values.items():
        flat = numbers.tolist()
        if not flat or not all(map(math.isfinite, flat)):
            continue
        if name == "landmarks":
            scale = 1.0 if size is None else size / np.array(original)
            meta[name] = np.round((numbers.reshape(-1, 2) - corner) * scale, 2).ravel().tolist()
        else:
            meta[name] = flat[0]
    return meta or None
