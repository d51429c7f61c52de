"""AffectNet, both releases: recognised by their layout, labels dropped by rule, counts compared.

Reduced (March 2021): `train_set/images/<id>.jpg`, 224×224 crops, with
`train_set/annotations/<id>_{exp,val,aro,lnd}.npy`; `val_set` or `valid_set` likewise.
Full: whole photos under `Manually_Annotated_Images/`, with `training.csv` and `validation.csv`,
which give each face's box.
"""

import csv
import io
import logging
import math
import zlib
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.images import decode
from shards.jpeg import plain_jpeg_size
from shards.release import NAMES_KEPT, Content, Item, LeftOut, Release
from shards.releases.source import (
    Keys,
    check_counts,
    entries,
    leads_out,
    line_at,
    lines,
    read_file,
    walk,
)

CLASSES = ("neutral", "happy", "sad", "surprise", "fear", "disgust", "anger", "contempt")
NO_CLASS = {8: "none", 9: "uncertain", 10: "non-face"}
TRAIN = (74874, 134415, 25459, 14090, 6378, 3803, 24882, 3750)
OFFICIAL: dict[str, dict[str, tuple[int, ...]]] = {
    "reduced": {"train": TRAIN, "val": (*[500] * 7, 499)},
    "full": {"train": TRAIN, "val": (500,) * 8},
}
COLUMNS = ("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height",
           "facial_landmarks", "expression", "valence", "arousal")  # fmt: skip
PHOTOS = "Manually_Annotated_Images"
NOTES = {"val": "valence", "aro": "arousal", "lnd": "landmarks"}  # beside a crop's label
LISTS = (".", "Manually_Annotated_file_lists", "Manually_Annotated")  # where training.csv may lie

log = logging.getLogger(__name__)


def release(source: str | Path, *, classes: int = 8, size: int | None, margin: float) -> Release:
    """The images of either release, as 7 classes (without contempt) or 8.

    size: pixels of the packed images, into which landmarks are converted; None keeps sizes.
    margin: of the full release's face boxes, in parts of their width and height, on each side.
    """
    root = Path(source)
    is_reduced = (root / "train_set" / "annotations").is_dir()
    folders = [root / name for name in LISTS if (root / name / "training.csv").is_file()]
    if is_reduced and folders:
        raise ValueError(f"{root} holds both AffectNet releases (train_set/ and training.csv)")
    if not is_reduced and not folders:
        raise FileNotFoundError(
            f"{root} holds no AffectNet release: neither train_set/annotations/ (the reduced one) "
            f"nor training.csv with {PHOTOS}/ (the full one) is there"
        )
    kind, left_out = "reduced" if is_reduced else "full", LeftOut(root)
    log.info("%s: AffectNet, the %s release", root, kind)
    if is_reduced:
        if margin:
            raise ValueError("--margin: the reduced release's images are crops already")
        splits = _reduced(root, classes, left_out)
        read: Any = partial(read_reduced, root=root.absolute(), size=size)
    else:
        photos = next((p for p in (root, *folders) if (p / PHOTOS).is_dir()), root) / PHOTOS
        if not photos.is_dir():
            raise FileNotFoundError(f"{photos} not found; unpack the full release's images there")
        splits, lists = _full(root, folders[0], photos, classes, left_out)
        read = partial(read_full, root=root.absolute(), lists=lists, size=size, margin=margin,
                       photos=photos.relative_to(root).as_posix())  # fmt: skip
    official = {split: counts[:classes] for split, counts in OFFICIAL[kind].items()}
    check_counts(f"AffectNet's {kind} release", CLASSES[:classes], splits, official)
    described = f"{kind} release" + (f", boxes with margin {margin:g}" if kind == "full" else "")
    return Release(f"AffectNet-{classes}", described, CLASSES[:classes], splits, read, left_out)


def _is_class(label: int, classes: int, left_out: LeftOut) -> bool:
    """Whether a label is one of the classes; an image of another is left out."""
    if label < classes:
        return True
    left_out.add(f"label {label} ({NO_CLASS.get(label) or CLASSES[label]})")
    return False


def _reduced(root: Path, classes: int, left_out: LeftOut) -> dict[str, list[Item]]:
    """Items whose source is the image and which notes there are of it, as bits."""
    folders = {"train": "train_set", "val": "val_set"}
    if not (root / "val_set").is_dir() and (root / "valid_set").is_dir():
        folders["val"] = "valid_set"
    splits: dict[str, list[Item]] = {}
    for split, folder in folders.items():
        for part in ("images", "annotations"):
            if not (root / folder / part).is_dir():
                raise FileNotFoundError(f"{root / folder / part} not found")
        images = _images(root, root / folder / "images", left_out)
        notes = _notes(root, root / folder / "annotations", left_out)
        for stem in sorted(images.keys() - notes.keys()):
            left_out.add("no annotation", root / folder / "images" / images[stem])
        for stem in sorted(notes.keys() - images.keys()):
            left_out.add("annotated, but there is no image", root / folder / "images" / stem)
        keys, splits[split] = Keys(), []
        for stem in sorted(images.keys() & notes.keys()):
            label = _label(root, f"{folder}/annotations/{stem}_exp.npy")
            if _is_class(label, classes, left_out):
                source = f"{folder}/images/{images[stem]}", notes[stem]
                splits[split].append(Item(keys.make(stem), label, source))
    return splits


def _images(root: Path, folder: Path, left_out: LeftOut) -> dict[str, str]:
    """Number of an image → file name."""
    found: dict[str, str] = {}
    for entry in entries(folder, root, left_out):
        stem = Path(entry.name).stem
        if stem in found:
            left_out.add("a second image of its number", entry.path)
        else:
            found[stem] = entry.name
    return found


def _notes(root: Path, folder: Path, left_out: LeftOut) -> dict[str, int]:
    """Number of a labelled image → which NOTES there are of it, a bit each."""
    bits = {kind: 1 << k for k, kind in enumerate(("exp", *NOTES))}
    found: dict[str, int] = {}
    for entry in entries(folder, root, left_out):
        stem, _, kind = entry.name.removesuffix(".npy").rpartition("_")
        found[stem] = found.get(stem, 0) | bits.get(kind, 0)
    return {stem: own >> 1 for stem, own in found.items() if own & bits["exp"]}


def _label(root: Path, relative: str) -> int:
    return _checked(_array(root, relative), str(root / relative))


def _checked(value: Any, where: str) -> int:
    try:
        label = int(float(value))
        if label != float(value):
            raise ValueError(f"{value} is no whole number")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {value!r} is no label: {error}") from error
    if not 0 <= label <= max(NO_CLASS):
        raise ValueError(f"{where}: label {label}, expected 0 to {max(NO_CLASS)}")
    return label


def _array(root: Path, relative: str) -> Any:
    """A number or text array from an .npy file; pickled objects are refused."""
    data = read_file(root, relative)
    try:
        start = data.index(b"\n") + 1  # the header ends with it
        shape, dtype = _array_header(data[:start])
        return np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape)
    except Exception as error:  # the header is parsed as Python text: errors of many kinds
        raise ValueError(f"{relative}: no plain array: {error}") from error


@lru_cache(64)  # a release's million arrays have a handful of headers
def _array_header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not of npy format 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    return shape, dtype


def read_reduced(item: Item, root: Path, size: int | None) -> Content:
    """The crop's bytes, with the values of the annotations beside it."""
    image, notes = item.source
    data = read_file(root, image)
    folder, stem = image.split("/", 1)[0], Path(image).stem
    values: dict[str, Any] = {}
    for k, (kind, name) in enumerate(NOTES.items()):
        if notes >> k & 1:
            path = f"{folder}/annotations/{stem}_{kind}.npy"
            numbers = _array(root, path).astype(float).ravel()
            if numbers.size % 2 if name == "landmarks" else numbers.size != 1:
                raise ValueError(f"{path}: {numbers.size} numbers")
            values[name] = numbers
    original = plain_jpeg_size(data) or decode(data).size if "landmarks" in values else (1, 1)
    return Content(data, _meta(values, (0, 0), original, size))


def _meta(
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


Lists = dict[str, tuple[str, tuple[str, ...]]]  # split → list (relative to the source), columns


def _full(
    root: Path, home: Path, photos: Path, classes: int, left_out: LeftOut
) -> tuple[dict[str, list[Item]], Lists]:
    """Items whose source is the photo and its line of the list, which is read again for the rest.

    The 68 landmarks of 400,000 faces would fill half a gigabyte as text.
    """
    start = f"{photos.relative_to(root).as_posix()}/"
    present = {path.removeprefix(start) for path in walk(photos, root, left_out)}
    splits: dict[str, list[Item]] = {}
    lists: Lists = {}
    listed: set[str] = set()
    for split, name in (("train", "training.csv"), ("val", "validation.csv")):
        if not (home / name).is_file():
            raise FileNotFoundError(f"{home / name} not found")
        columns: tuple[str, ...] = ()
        keys, seen, splits[split] = Keys(), set(), []
        for where, at, line in lines(home / name, root):
            if not columns:
                columns, is_header = _columns(line, where)
                if is_header:
                    continue
            row = _row(line, columns, where)
            photo = row["subDirectory_filePath"]
            listed.add(photo)
            label = _checked(row["expression"], where)
            if not _is_class(label, classes, left_out):
                continue
            if leads_out(photo):
                raise ValueError(f"{where}: {photo} leads out of the source")
            if _box(row, where) is None:
                left_out.add("a box that is no face", f"{where}: {photo}")
            elif photo in seen:
                left_out.add("listed twice", f"{where}: {photo}")
            elif photo not in present:
                left_out.add("annotated, but there is no image", f"{where}: {photo}")
            else:
                source = photo, split, at, zlib.crc32(line.encode())
                names = (text.replace("/", "_") for text in (photo.rsplit(".", 1)[0], photo))
                splits[split].append(Item(keys.make(*names), label, source))
            seen.add(photo)
        lists[split] = (home / name).relative_to(root).as_posix(), columns
    for number, photo in enumerate(sorted(present - listed)):
        left_out.add("no annotation", photos / photo if number < NAMES_KEPT else None)
    return splits, lists


def _columns(line: str, where: str) -> tuple[tuple[str, ...], bool]:
    """The columns of a list, and whether its first line names them: some copies have no header."""
    names = _split(line, where)
    if "expression" not in names:
        return COLUMNS, False
    if missing := sorted(set(COLUMNS) - set(names)):
        raise ValueError(f"{where}: column {missing[0]} is missing")
    return names, True


def _split(line: str, where: str) -> tuple[str, ...]:
    try:
        return tuple(next(csv.reader([line])))
    except csv.Error as error:
        raise ValueError(f"{where}: {error}") from error


def _row(line: str, columns: tuple[str, ...], where: str) -> dict[str, str]:
    values = _split(line, where)
    if len(values) != len(columns):
        raise ValueError(f"{where}: {len(values)} columns, expected {len(columns)}")
    return dict(zip(columns, values, strict=True))


def _box(row: dict[str, str], where: str) -> tuple[int, int, int, int] | None:
    """x, y, width and height of the face, if there is one."""
    edges = [row[f"face_{edge}"] for edge in ("x", "y", "width", "height")]
    if "NULL" in edges:
        return None
    try:
        x, y, width, height = (int(float(edge)) for edge in edges)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: face box {edges}: {error}") from error
    return (x, y, width, height) if min(width, height) > 0 else None


def read_full(
    item: Item, root: Path, photos: str, lists: Lists, size: int | None, margin: float
) -> Content:
    """The face cut out of its photo; landmarks in pixels of the packed image."""
    photo, split, at, crc32 = item.source
    name, columns = lists[split]
    line = line_at(f"{root}/{name}", at)
    if zlib.crc32(line.encode()) != crc32:
        raise OSError(f"{root}/{name} was changed while it was packed")
    row = _row(line, columns, name)
    x, y, width, height = _box(row, name) or (0, 0, 0, 0)
    image = decode(read_file(root, f"{photos}/{photo}"))
    left, top = max(x - margin * width, 0), max(y - margin * height, 0)
    right = min(x + (1 + margin) * width, image.width)
    bottom = min(y + (1 + margin) * height, image.height)
    box = round(left), round(top), round(right), round(bottom)
    if box[2] - box[0] < 1 or box[3] - box[1] < 1:
        raise ValueError(f"the box {x, y, width, height} lies outside {image.size}")
    face: Image.Image = image.crop(box)
    notes = {
        "valence": row["valence"].split(),
        "arousal": row["arousal"].split(),
        "landmarks": [point for point in row["facial_landmarks"].split(";") if point],
    }
    numbers = {k: np.array([] if v == ["NULL"] else v, float) for k, v in notes.items()}
    return Content(face, _meta(numbers, box[:2], face.size, size))
