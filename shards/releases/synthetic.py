"""The demo's data set: drawn faces, classed by their eight expressions or by person.

A face is a function of (seed, index, expression, person); training and validation never share an
index, and where persons are the classes no person.
"""

import numpy as np

from shards.format import DRAWN
from shards.images import encode
from shards.release import Content, Item, Release
from shards.releases.affectnet import CLASSES, TRAIN
from shards.releases.drawing.face import draw_face


def train_labels(count: int) -> list[int]:
    """Labels of `count` training images in AffectNet's proportions, at least one each, sorted."""
    if count < len(CLASSES):
        raise ValueError(f"--train {count}: at least {len(CLASSES)} images, one of each class")
    exact = np.array(TRAIN) / sum(TRAIN) * (count - len(CLASSES))
    sizes = np.floor(exact).astype(int)
    largest = np.argsort(sizes - exact, kind="stable")  # largest remainder first
    sizes[largest[: count - len(CLASSES) - sizes.sum()]] += 1
    return np.repeat(np.arange(len(CLASSES)), sizes + 1).tolist()


def release(train: int, val: int, *, size: int, seed: int) -> Release:
    """Strangers by expression: `train` images in AffectNet's proportions, `val` images balanced."""
    if val <= 0 or val % len(CLASSES):
        raise ValueError(f"--val {val}: expected a positive multiple of {len(CLASSES)}")
    _check_size(size)
    labels = train_labels(train), np.repeat(np.arange(len(CLASSES)), val // len(CLASSES)).tolist()
    splits, index = {}, 0
    for name, own in zip(("train", "val"), labels, strict=True):
        splits[name] = [
            Item(f"face_{index + k:07d}", label, (seed, index + k, label, size, None))
            for k, label in enumerate(own)
        ]
        index += len(own)
    return Release(DRAWN, f"seed {seed}, {size} px", CLASSES, splits, read)


def identity_release(
    train: int, val: int, *, identities: int, held_out: int, size: int, seed: int
) -> Release:
    """Persons, who are the classes: `identities` in `train` images, `held_out` others in `val`.

    Images are divided evenly over persons, who show all expressions in turn.
    """
    _check_size(size)
    splits: dict[str, list[Item]] = {"train": [], "val": []}
    index, person = 0, 0
    for name, images, persons in (("train", train, identities), ("val", val, held_out)):
        if not 0 < 2 * persons <= images:
            raise ValueError(f"--{name} {images}: {persons} identities, each needs two images")
        for k, count in enumerate(np.bincount(np.arange(images) * persons // images).tolist()):
            for number in range(1, count + 1):  # named as `shards.pack identities` would LFW's
                key = f"{person + k:06d}_{number - 1:05d}_person_{person + k:05d}_{number:04d}"
                source = (seed, index, index % len(CLASSES), size, person + k)
                splits[name].append(Item(key, person + k, source))
                index += 1
        person += persons
    names = tuple(f"person_{k:05d}" for k in range(person))
    text = f"{identities} and {held_out} identities, seed {seed}, {size} px"
    return Release(DRAWN, text, names, splits, read, mixed=True)


def release_by(
    by: str, train: int, val: int, *, identities: int, held_out: int, size: int, seed: int
) -> Release:
    """Drawn faces whose classes are what `by` names, "expression" or "identity".

    identities, held_out: the persons in training and validation; of "identity" alone.
    """
    if by == "expression":
        return release(train, val, size=size, seed=seed)
    return identity_release(
        train, val, identities=identities, held_out=held_out, size=size, seed=seed
    )


def _check_size(size: int) -> None:
    if not 16 <= size <= 2048:
        raise ValueError(f"--size {size}: expected 16 to 2048 pixels")


def read(item: Item) -> Content:
    """The face's JPEG bytes."""
    seed, index, expression, size, person = item.source
    return Content(encode(draw_face(seed, index, expression, size=size, person=person)))
