"""SFEW 2.0: film frames to be aligned by landmarks, or the release's own aligned faces."""

import csv
import re
from functools import partial
from pathlib import Path

import numpy as np

from shards.images import decode
from shards.release import Content, Item, LeftOut, Release
from shards.releases.similarity import align
from shards.releases.source import Keys, entries, lines, read, read_file

# The release's folders, in label order; test labels are withheld.
CLASSES = {"Angry": "angry", "Disgust": "disgust", "Fear": "fear", "Happy": "happy",
           "Neutral": "neutral", "Sad": "sad", "Surprise": "surprise"}  # fmt: skip
LANDMARKS = ("key", *(f"{axis}{k}" for k in range(1, 6) for axis in "xy"))


def release(source: str | Path, *, landmarks: str | Path | None, size: int | None) -> Release:
    """`Train/<Class>/*` and `Val/<Class>/*`, or the same in `Train/Train_Aligned_Faces/` and so on.

    landmarks: a file that `python -m shards.align` wrote; frames need it, aligned faces may have
    it. Images that it does not name (no face was found) are left out.
    """
    root = Path(source)
    left_out = LeftOut(root)
    homes = {split: _home(root, folder) for split, folder in (("train", "Train"), ("val", "Val"))}
    is_aligned = all("_Aligned_Faces" in home.name for home in homes.values())
    if landmarks is None and not is_aligned:
        raise ValueError(
            f"{root} holds film frames, to be aligned: write their landmarks with "
            f"'python -m shards.align --source {root} --weights RETINAFACE.onnx --out FILE', then "
            "give --landmarks FILE"
        )
    if landmarks is not None and size is None:
        raise ValueError("--size native: faces are aligned to a size in pixels")
    points = {} if landmarks is None else read_landmarks(landmarks)
    splits: dict[str, list[Item]] = {}
    for split, home in homes.items():
        keys, splits[split] = Keys(), []
        for folder in entries(home, root, left_out):
            if not folder.is_dir() or "_Aligned_Faces" in folder.name:
                continue
            if folder.name not in CLASSES:
                raise ValueError(f"{folder.path}: expected one of {', '.join(CLASSES)}")
            label = list(CLASSES).index(folder.name)
            for image in entries(Path(folder.path), root, left_out):
                relative = Path(image.path).relative_to(root).as_posix()
                if not image.is_file():
                    left_out.add("no regular file", image.path)
                    continue
                if landmarks is not None and relative not in points:
                    left_out.add(f"not in {Path(landmarks).name}: no face found", image.path)
                    continue
                key = keys.make(f"{CLASSES[folder.name]}_{Path(image.name).stem}", image.name)
                splits[split].append(Item(key, label, (relative, points.get(relative))))
    listed = {item.source[0] for items in splits.values() for item in items}
    for relative in sorted(points.keys() - listed):  # of a withheld test set, or of no file
        if not (root / relative).is_file():
            left_out.add("landmarks, but there is no image", relative)
    if landmarks is not None and not any(splits.values()):
        raise ValueError(f"{landmarks}: names none of the images of {root}")
    kind = "frames, aligned by landmarks" if landmarks is not None else "the release's own aligned"
    reader = partial(read_aligned, root=root.absolute(), size=size)
    return Release("SFEW 2.0", kind, tuple(CLASSES.values()), splits, reader, left_out)


def film_of(key: str) -> str:
    """The film that a frame is of, with which its file's name begins: Film_hhmmssmmm_number."""
    first, _, rest = key.partition("_")
    return re.split(r"_\d", rest if first in CLASSES.values() else key, maxsplit=1)[0]


def read_aligned(item: Item, root: Path, size: int | None) -> Content:
    """The face's bytes, or the frame aligned to size×size pixels where there are landmarks."""
    relative, points = item.source
    if points is None or size is None:
        return read(item._replace(source=relative), root)
    image, pairs = decode(read_file(root, relative)), np.reshape(points, (5, 2))
    # A face may reach over the frame's edge, but the landmarks of another frame are an error.
    if not (np.abs(pairs / image.size - 0.5) <= 1).all():
        raise ValueError(f"landmarks {pairs.tolist()} lie far outside its {image.size} pixels")
    return Content(align(image, pairs, size))


def read_landmarks(path: str | Path) -> dict[str, tuple[float, ...]]:
    """Image path (relative to the source) → x1, y1 … x5, y5 in pixels."""
    found: dict[str, tuple[float, ...]] = {}
    path = Path(path).resolve()  # a file of the user's own, wherever it lies
    for where, _, line in lines(path, path):
        try:
            key, *values = next(csv.reader([line]))
            if (key, *values) == LANDMARKS:
                continue
            numbers = tuple(float(value) for value in values)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{where}: {error}") from error
        if len(numbers) != 10 or key in found:
            fault = "named twice" if key in found else f"{len(numbers)} numbers, expected 10"
            raise ValueError(f"{where}: {key}: {fault}")
        found[key] = numbers
    return found


def _home(root: Path, folder: str) -> Path:
    if not (root / folder).is_dir():
        raise FileNotFoundError(f"{root / folder} not found; expected SFEW's Train/ and Val/")
    aligned = sorted(p for p in (root / folder).glob("*_Aligned_Faces*") if p.is_dir())
    return next(iter(aligned), root / folder)
