"""The embedded data set: drawn faces of eight expressions, in AffectNet's proportions.

A face is a function of (seed, index, label); training and validation never share an index.
"""

import logging
from pathlib import Path

import numpy as np

from dan_dist.shardset import MANIFEST, open_shardset
from shards.affectnet import TRAIN as AFFECTNET_TRAIN
from shards.claim import CONTACT_SHEET
from shards.faces import CLASSES, face
from shards.images import encode
from shards.release import Content, Item, Release
from shards.show import overview
from shards.writer import pack

log = logging.getLogger(__name__)


def train_labels(count: int) -> list[int]:
    """Labels of `count` training images in AffectNet's proportions, at least one each, sorted.

    Raises:
        ValueError: fewer images than classes.
    """
    if count < len(CLASSES):
        raise ValueError(f"--train {count}: at least {len(CLASSES)} images, one of each class")
    exact = np.array(AFFECTNET_TRAIN) / sum(AFFECTNET_TRAIN) * (count - len(CLASSES))
    sizes = np.floor(exact).astype(int)
    largest = np.argsort(sizes - exact, kind="stable")  # largest remainder first
    sizes[largest[: count - len(CLASSES) - sizes.sum()]] += 1
    return np.repeat(np.arange(len(CLASSES)), sizes + 1).tolist()


def release(train: int, val: int, *, size: int, seed: int) -> Release:
    """`train` images in AffectNet's proportions and `val` images balanced over the classes.

    Raises:
        ValueError: `val` is not a positive multiple of 8, `train` below 8, or no possible size.
    """
    if val <= 0 or val % len(CLASSES):
        raise ValueError(f"--val {val}: expected a positive multiple of {len(CLASSES)}")
    if not 16 <= size <= 2048:
        raise ValueError(f"--size {size}: expected 16 to 2048 pixels")
    labels = train_labels(train), np.repeat(np.arange(len(CLASSES)), val // len(CLASSES)).tolist()
    splits, index = {}, 0
    for name, own in zip(("train", "val"), labels, strict=True):
        splits[name] = [
            Item(f"face_{index + k:07d}", label, (seed, index + k, label, size))
            for k, label in enumerate(own)
        ]
        index += len(own)
    return Release("synthetic", f"seed {seed}, {size} px", CLASSES, splits, read)


def read(item: Item) -> Content:
    """The face's JPEG bytes."""
    seed, index, label, size = item.source
    return Content(encode(face(seed, index, label, size=size)))


def ensure(folder: str | Path, train: int, val: int, *, size: int, seed: int) -> None:
    """Packs these faces into `folder`, with a contact sheet, unless they are there.

    Raises:
        ValueError: the folder holds other shards.
    """
    wanted, folder = release(train, val, size=size, seed=seed), Path(folder)
    if not (folder / MANIFEST).exists():
        log.info("drawing %d faces into %s", train + val, folder)
        pack(wanted, folder, size=size)
        overview(open_shardset(folder), folder / CONTACT_SHEET)
    found = open_shardset(folder)
    counts = {name: sum(per_class) for name, per_class in found.counts.items()}
    if found.release != wanted.release or counts != {"train": train, "val": val}:
        raise ValueError(
            f"{folder} holds {found.dataset} ({found.release}) {counts}, not the faces asked for "
            f"({wanted.release}) {{'train': {train}, 'val': {val}}}; name another folder"
        )
