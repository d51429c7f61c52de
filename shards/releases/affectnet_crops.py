"""AffectNet's reduced release (March 2021): crops, and their annotations as arrays.

`train_set/images/<id>.jpg`, 224×224 pixels, `train_set/annotations/<id>_{exp,val,aro,lnd}.npy`.
"""

import io
import math
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shards.images import decode
from shards.jpeg import plain_jpeg_size
from shards.release import Content, Item, LeftOut, Read
from shards.releases.affectnet_labels import check_label, is_class, make_meta
from shards.releases.layout import part
from shards.releases.source import Keys, Source, entries, read_file

NOTES = {"val": "valence", "aro": "arousal", "lnd": "landmarks"}  # beside a crop's label


def list_crops(
    homes: Mapping[str, Path], source: Source, classes: int, left_out: LeftOut, *,
    size: int | None,
) -> tuple[dict[str, list[Item]], Read]:  # fmt: skip
    """Items whose source is the image and which notes there are of it, as bits."""
    splits: dict[str, list[Item]] = {}
    notes_of: dict[str, str] = {}  # folder of images → that of their annotations
    for split, home in homes.items():
        crops, annotations = part(home, "images", source), part(home, "annotations", source)
        if crops is None or annotations is None:
            missing = "annotations" if crops else "images"
            raise FileNotFoundError(f"{home / missing} not found")
        folder, noted = source.relative(crops), source.relative(annotations)
        notes_of[folder] = noted
        images = images_by_stem(source, crops, left_out)
        notes = _notes(source, annotations, left_out)
        for stem in sorted(images.keys() - notes.keys()):
            left_out.add("no annotation", crops / images[stem])
        for stem in sorted(notes.keys() - images.keys()):
            left_out.add("annotated, but there is no image", crops / stem)
        keys, splits[split] = Keys(), []
        for stem in sorted(images.keys() & notes.keys()):
            label = _label(source, f"{noted}/{stem}_exp.npy")
            if is_class(label, classes, left_out):
                item = f"{folder}/{images[stem]}", notes[stem]
                splits[split].append(Item(keys.make(stem), label, item))
    return splits, partial(read_crop, source=source.absolute(), size=size, notes_of=notes_of)


def images_by_stem(source: Source, folder: Path, left_out: LeftOut) -> dict[str, str]:
    """Number of an image → file name; JSON files beside images are none."""
    found: dict[str, str] = {}
    for entry in entries(folder, source, left_out):
        if entry.name.lower().endswith(".json"):
            continue
        stem = Path(entry.name).stem
        if stem in found:
            left_out.add("a second image of its number", entry.path)
        else:
            found[stem] = entry.name
    return found


def _notes(source: Source, folder: Path, left_out: LeftOut) -> dict[str, int]:
    """Number of a labelled image → which NOTES there are of it, a bit each."""
    bits = {kind: 1 << k for k, kind in enumerate(("exp", *NOTES))}
    found: dict[str, int] = {}
    for entry in entries(folder, source, left_out):
        stem, _, kind = entry.name.removesuffix(".npy").rpartition("_")
        found[stem] = found.get(stem, 0) | bits.get(kind, 0)
    return {stem: own >> 1 for stem, own in found.items() if own & bits["exp"]}


def _label(source: Source, relative: str) -> int:
    return check_label(_array(source, relative), str(source.root / relative))


def _array(source: Source, relative: str) -> Any:
    """A number or text array from an .npy file; pickled objects are refused."""
    data = read_file(source, relative)
    try:
        start = data.index(b"\n") + 1  # the header ends with it
        shape, order, dtype = _array_header(data[:start])
        return np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape, order=order)
    except Exception as error:  # the header is parsed as Python text: errors of many kinds
        raise ValueError(f"{relative}: no plain array: {error}") from error


@lru_cache(64)  # a release's million arrays have a handful of headers
def _array_header(header: bytes) -> tuple[tuple[int, ...], Literal["F", "C"], np.dtype[Any]]:
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not of npy format 1.0")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    return shape, "F" if is_fortran else "C", dtype


def read_crop(item: Item, source: Source, size: int | None, notes_of: Mapping[str, str]) -> Content:
    """The crop's bytes, with the values of the annotations beside it."""
    image, notes = item.source
    data = read_file(source, image)
    folder, stem = notes_of[image.rpartition("/")[0]], Path(image).stem
    values: dict[str, Any] = {}
    for k, (kind, name) in enumerate(NOTES.items()):
        if notes >> k & 1:
            path = f"{folder}/{stem}_{kind}.npy"
            numbers = _array(source, path).astype(float).ravel()
            if numbers.size % 2 if name == "landmarks" else numbers.size != 1:
                raise ValueError(f"{path}: {numbers.size} numbers")
            values[name] = numbers
    original = plain_jpeg_size(data) or decode(data).size if "landmarks" in values else (1, 1)
    return Content(data, make_meta(values, (0, 0), original, size))
