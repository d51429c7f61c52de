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
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.images import decode, plain_jpeg_size
from shards.release import Content, Item, LeftOut, Release
from shards.source import Keys, check_counts, entries, read_file

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
LISTS = (".", "Manually_Annotated_file_lists", "Manually_Annotated")  # where training.csv may lie

log = logging.getLogger(__name__)


def release(source: str | Path, *, classes: int = 8, size: int | None, margin: float) -> Release:
    """The images of either release, as 7 classes (without contempt) or 8.

    size: pixels of the packed images, into which landmarks are converted; None keeps sizes.
    margin: of the full release's face boxes, in parts of their width and height, on each side.

    Raises:
        FileNotFoundError: neither release's layout is there; ValueError: both, or a label that is
            no number from 0 to 10.
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
    kind, left_out = "reduced" if is_reduced else "full", LeftOut()
    log.info("%s: AffectNet, the %s release", root, kind)
    if is_reduced:
        if margin:
            raise ValueError("--margin: the reduced release's images are crops already")
        splits = _reduced(root, classes, left_out)
        read: Any = partial(read_reduced, root=root.absolute(), size=size)
    else:
        splits = _full(root, folders[0], classes, left_out)
        photos = next((p for p in (root, *folders) if (p / PHOTOS).is_dir()), root) / PHOTOS
        if not photos.is_dir():
            raise FileNotFoundError(f"{photos} not found; unpack the full release's images there")
        read = partial(read_full, root=photos.absolute(), size=size, margin=margin)
    official = {split: counts[:classes] for split, counts in OFFICIAL[kind].items()}
    check_counts(f"AffectNet's {kind} release", CLASSES[:classes], splits, official)
    described = f"{kind} release" + (f", boxes with margin {margin:g}" if kind == "full" else "")
    return Release(f"AffectNet-{classes}", described, CLASSES[:classes], splits, read, left_out)


def _wanted(label: int, classes: int, left_out: LeftOut) -> bool:
    """Whether an image of this label is packed; if not, it is counted."""
    if label < classes:
        return True
    left_out.add(f"label {label} ({NO_CLASS.get(label) or CLASSES[label]})")
    return False


def _reduced(root: Path, classes: int, left_out: LeftOut) -> dict[str, list[Item]]:
    folders = {"train": "train_set", "val": "val_set"}
    if not (root / "val_set").is_dir() and (root / "valid_set").is_dir():
        folders["val"] = "valid_set"
    splits: dict[str, list[Item]] = {}
    for split, folder in folders.items():
        for part in ("images", "annotations"):
            if not (root / folder / part).is_dir():
                raise FileNotFoundError(f"{root / folder / part} not found")
        images = {
            Path(entry.name).stem: entry.name
            for entry in entries(root / folder / "images", root, left_out)
        }
        notes = {
            entry.name.removesuffix("_exp.npy")
            for entry in entries(root / folder / "annotations", root, left_out)
            if entry.name.endswith("_exp.npy")
        }
        for stem in sorted(images.keys() - notes):
            left_out.add("no annotation", f"{root / folder / 'images' / images[stem]}")
        for stem in sorted(notes - images.keys()):
            left_out.add("annotated, but there is no image", f"{root / folder / 'images' / stem}")
        keys, splits[split] = Keys(), []
        for stem in sorted(images.keys() & notes):
            label = _label(root, f"{folder}/annotations/{stem}_exp.npy")
            if _wanted(label, classes, left_out):
                source = f"{folder}/images/{images[stem]}"
                splits[split].append(Item(keys.make(stem), label, source))
    return splits


def _label(root: Path, relative: str) -> int:
    value = _array(root, relative)
    try:
        label = int(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{root / relative}: {value!r} is no label") from error
    return _checked(label, str(root / relative))


def _checked(label: int, where: str) -> int:
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
        raise ValueError(f"{root / relative}: no plain array: {error}") from error


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
    """The crop's bytes, with what the annotations beside it hold."""
    data = read_file(root, item.source)
    folder, stem = item.source.split("/", 1)[0], Path(item.source).stem
    values: dict[str, Any] = {}
    for kind in ("val", "aro", "lnd"):
        try:
            values[kind] = _array(root, f"{folder}/annotations/{stem}_{kind}.npy").astype(float)
        except FileNotFoundError:
            values[kind] = None
    meta: dict[str, Any] = {}
    for kind, name in (("val", "valence"), ("aro", "arousal")):
        if values[kind] is not None:
            meta[name] = float(values[kind])
    if values["lnd"] is not None:
        scale = _scale(size, plain_jpeg_size(data) or decode(data).size)
        meta["landmarks"] = _rounded(values["lnd"].reshape(-1, 2) * scale)
    return Content(data, meta or None)


def _scale(size: int | None, original: tuple[int, int]) -> Any:
    return np.array([1.0, 1.0]) if size is None else size / np.array(original)


def _rounded(points: Any) -> list[float]:
    flat: list[float] = np.round(points, 2).ravel().tolist()
    return flat


def _full(root: Path, lists: Path, classes: int, left_out: LeftOut) -> dict[str, list[Item]]:
    splits: dict[str, list[Item]] = {}
    for split, name in (("train", "training.csv"), ("val", "validation.csv")):
        if not (lists / name).is_file():
            raise FileNotFoundError(f"{lists / name} not found")
        seen: set[str] = set()
        keys, splits[split] = Keys(), []
        for where, row in _rows(lists / name):
            photo = row["subDirectory_filePath"]
            try:
                label = _checked(int(row["expression"]), where)
                box = tuple(int(float(row[f"face_{k}"])) for k in ("x", "y", "width", "height"))
                affect = float(row["valence"]), float(row["arousal"])
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            if not _wanted(label, classes, left_out):
                continue
            if min(box[2:]) <= 0:
                left_out.add("a box that is no face", f"{where}: {photo}")
            elif photo in seen:
                left_out.add("listed twice", f"{where}: {photo}")
            else:
                names = str(Path(photo).with_suffix("")), photo
                source = (photo, box, *affect, row["facial_landmarks"])
                splits[split].append(Item(keys.make(*names), label, source))
            seen.add(photo)
    return splits


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(where it stands, columns) of each row; some copies of the lists have no header."""
    with path.open(newline="", encoding="utf-8") as file:
        for number, values in enumerate(csv.reader(file), start=1):
            if number == 1 and "expression" in values:
                missing = sorted(set(COLUMNS) - set(values))
                if missing:
                    raise ValueError(f"{path}: column {missing[0]} is missing")
                columns = tuple(values)
                continue
            if number == 1:
                columns = COLUMNS
            if len(values) != len(columns):
                raise ValueError(
                    f"{path}, line {number}: {len(values)} columns, expected {len(columns)}"
                )
            yield f"{path}, line {number}", dict(zip(columns, values, strict=True))


def read_full(item: Item, root: Path, size: int | None, margin: float) -> Content:
    """The face cut out of its photo; landmarks in pixels of the packed image.

    Raises:
        ValueError: the box lies outside the photo, or the photo cannot be decoded.
    """
    photo, (x, y, width, height), valence, arousal, landmarks = item.source
    image = decode(read_file(root, photo))
    left, top = max(x - margin * width, 0), max(y - margin * height, 0)
    right = min(x + (1 + margin) * width, image.width)
    bottom = min(y + (1 + margin) * height, image.height)
    box = tuple(round(edge) for edge in (left, top, right, bottom))
    if box[2] - box[0] < 1 or box[3] - box[1] < 1:
        raise ValueError(f"{root / photo}: the box {x, y, width, height} lies outside {image.size}")
    face: Image.Image = image.crop(box)
    meta: dict[str, Any] = {"valence": valence, "arousal": arousal}
    points = np.array([float(p) for p in landmarks.split(";") if p])
    if points.size and points.size % 2 == 0:
        meta["landmarks"] = _rounded((points.reshape(-1, 2) - box[:2]) * _scale(size, face.size))
    return Content(face, meta)
