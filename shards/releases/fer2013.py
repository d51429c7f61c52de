"""FER-2013: a CSV of pixels, or images in folders {train,test}/<class>.

The CSV is `fer2013.csv` (emotion, pixels, Usage) or `icml_face_data.csv` (emotion, Usage, pixels,
with spaces before the names).
"""

import csv
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from shards.release import Content, Item, LeftOut, Release
from shards.releases.layout import Found, contents, find_parts, only
from shards.releases.source import Source, check_counts, line_at, lines, open_source
from shards.releases.source import read as read_image
from shards.releases.trees import list_classes

CLASSES = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")  # labels 0 to 6
SPLITS = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}
# Their sums are those of Goodfellow et al. 2013 (arXiv 1307.0414): 4953, 547, 5121, 8989, 6077,
# 4002, 6198; those of val and test are what public code expects of the CSV, independently (searched
# 2026-11-27). The folders are kaggle.com/datasets/msambare/fer2013, whose test is val and test.
OFFICIAL = {
    "train": (3995, 436, 4097, 7215, 4830, 3171, 4965),
    "val": (467, 56, 496, 895, 653, 415, 607),
    "test": (491, 55, 528, 879, 594, 416, 626),
}
IN_FOLDERS = {"train": OFFICIAL["train"], "test": (958, 111, 1024, 1774, 1247, 831, 1233)}
FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
SIDE = 48
CSVS = ("fer2013.csv", "icml_face_data.csv")
COLUMNS = ("emotion", "Usage", "pixels")


class Row(NamedTuple):
    """One face of the CSV, but for its pixels."""

    where: str
    at: int  # byte at which its line begins
    crc32: int  # of the line
    emotion: int
    split: str


def release(source: str | Path | Source) -> Release:
    """The faces of the CSV, or else of the folders.

    Raises:
        FileNotFoundError: neither is there. ValueError: a line that is none of the CSV's.
    """
    source = open_source(source)
    folders = (name for names in FOLDERS.values() for name in names)
    found = find_parts(source, (*CSVS, *folders, "train.csv"))
    left_out = LeftOut(source.root)
    path = only([path for name in CSVS for path in found[name]], source)
    if path is None:
        return _from_folders(source, found, left_out)
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS.values()}
    for number, row in enumerate(rows(path, source)):
        splits[row.split].append(make_item(number, row, row.emotion, source.relative(path)))
    check_counts("FER-2013", CLASSES, splits, OFFICIAL)
    splits = {split: items for split, items in splits.items() if items}
    reader = partial(read, source=source.absolute())
    return Release("FER-2013", path.name, CLASSES, splits, reader, left_out)


def _from_folders(source: Source, found: Found, left_out: LeftOut) -> Release:
    named = {split: [path for name in names for path in found[name] if path.is_dir()]
             for split, names in FOLDERS.items()}  # fmt: skip
    homes = {split: only(paths, source) for split, paths in named.items()}
    if homes["train"] is None:
        hint = ""
        if found["train.csv"]:
            hint = "; train.csv lacks the test faces, icml_face_data.csv has all"
        raise FileNotFoundError(
            f"{source.root / CSVS[0]} not found; expected {' or '.join(CSVS)}, or train/<class>/ "
            f"and test/<class>/; {contents(source)}{hint}"
        )
    labels = {name: label for label, name in enumerate(CLASSES)}
    splits = {split: list_classes(home, labels, source, left_out)
              for split, home in homes.items() if home is not None}  # fmt: skip
    check_counts("FER-2013", CLASSES, splits, IN_FOLDERS)
    reader = partial(read_image, source=source.absolute())
    return Release("FER-2013", "folders", CLASSES, splits, reader, left_out)


def rows(path: Path, source: Source) -> Iterator[Row]:
    """The faces of a CSV in its order.

    Raises:
        ValueError: a line of another form, which is named.
    """
    columns: tuple[str, ...] = ()
    for where, at, line in lines(path, source):
        values = cells(line, where)
        if not columns:
            columns = tuple(value.strip() for value in values)
            if missing := [name for name in COLUMNS if name not in columns]:
                raise ValueError(f"{where}: column {missing[0]} is missing")
            continue
        face = _named(values, columns, where)
        if not face["emotion"].isdecimal() or int(face["emotion"]) >= len(CLASSES):
            raise ValueError(f"{where}: emotion {face['emotion'][:20]!r}, expected 0 to 6")
        if face["Usage"] not in SPLITS:
            expected = ", ".join(SPLITS)
            raise ValueError(f"{where}: Usage {face['Usage'][:20]!r}, expected {expected}")
        if (count := len(face["pixels"].split())) != SIDE**2:
            raise ValueError(f"{where}: {count} pixels, expected {SIDE**2} ({SIDE}×{SIDE})")
        crc32 = zlib.crc32(line.encode())
        yield Row(where, at, crc32, int(face["emotion"]), SPLITS[face["Usage"]])


def make_item(number: int, row: Row, label: int, path: str) -> Item:
    """A face as an item: its source is its name, the CSV, and its line, which is read again."""
    key = f"fer{number:07d}"
    return Item(key, label, (f"{key}.png", path, row.at, row.crc32))


def read(item: Item, source: Source) -> Content:
    """The face of a line of the CSV."""
    return Content(read_face(item, source))


def read_face(item: Item, source: Source) -> Image.Image:
    """The pixels that an item's line holds."""
    _, name, at, crc32 = item.source[:4]
    path = f"{source.root}/{name}"
    line = line_at(path, at)
    if zlib.crc32(line.encode()) != crc32:
        raise OSError(f"{path} was changed while it was packed")
    text = max(cells(line, path), key=len)  # the one column of many numbers
    pixels = [int(value) if value.isdecimal() else -1 for value in text.split()]
    if min(pixels) < 0 or max(pixels) > 255:
        raise ValueError("a pixel is no number from 0 to 255")
    return Image.fromarray(np.array(pixels, np.uint8).reshape(SIDE, SIDE))


def cells(line: str, where: str) -> list[str]:
    """The cells of a line of CSV; a ValueError names `where` it is none."""
    try:
        return next(csv.reader([line]))
    except csv.Error as error:
        raise ValueError(f"{where}: {error}") from error


def _named(values: list[str], columns: tuple[str, ...], where: str) -> Mapping[str, str]:
    if len(values) != len(columns):
        raise ValueError(f"{where}: {len(values)} columns, expected {len(columns)}")
    return dict(zip(columns, (value.strip() for value in values), strict=True))
