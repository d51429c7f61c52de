"""SFEW 2.0: film frames to be aligned by landmarks, or the release's own aligned faces."""

import csv
import re
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np

from shards.cut import AS_RELEASED, SIMILARITY
from shards.folders import is_folder
from shards.images import decode
from shards.release import Content, Item, LeftOut, Release
from shards.releases.layout import contents, find_parts, fold, inner, only, visible
from shards.releases.similarity import align
from shards.releases.source import Source, lines, open_source, read, read_file
from shards.releases.trees import list_classes

# The release's folders, in label order; test labels are withheld.
CLASSES = {"Angry": "angry", "Disgust": "disgust", "Fear": "fear", "Happy": "happy",
           "Neutral": "neutral", "Sad": "sad", "Surprise": "surprise"}  # fmt: skip
LABELS = {name: label for label, name in enumerate(CLASSES)}
LANDMARKS = ("key", *(f"{axis}{k}" for k in range(1, 6) for axis in "xy"))

Points = dict[str, tuple[float, ...]]  # image (relative to the source) → x1, y1 … x5, y5 in pixels


def release(
    source: str | Path | Source, *, landmarks: str | Path | None, size: int | None
) -> Release:
    """`Train/<Class>/*` and `Val/<Class>/*`, or aligned faces: `Train_Aligned_Faces/<Class>/*`.

    Those lie in `Train/`, as the whole release has them, or as their two archives unpack side by
    side. landmarks: a file that `python -m shards.align` wrote; frames need it, aligned faces may
    have it. Images that it does not name (no face was found) are left out.
    """
    source = open_source(source)
    left_out, homes = LeftOut(source.root), _homes(source)
    is_aligned = all("_aligned_faces" in fold(home.name) for home in homes.values())
    if landmarks is None and not is_aligned:
        raise ValueError(
            f"{source.root} holds film frames, to be aligned: write their landmarks with "
            f"'python -m shards.align --source {source.root} --weights RETINAFACE.onnx --out FILE'"
            ", then give --landmarks FILE"
        )
    if landmarks is not None and size is None:
        raise ValueError("--size native: faces are aligned to a size in pixels")
    points = {} if landmarks is None else read_landmarks(landmarks)
    splits = {}
    for split, home in homes.items():
        items = list_classes(home, LABELS, source, left_out, ignored="*_aligned_faces*")
        splits[split] = match_points(items, points, landmarks, source, left_out)
    listed = {item.source[0] for items in splits.values() for item in items}
    for relative in sorted(points.keys() - listed):  # of a withheld test set, or of no file
        if not (source.root / relative).is_file():
            left_out.add("landmarks, but there is no image", relative)
    if landmarks is not None and not any(splits.values()):
        raise ValueError(f"{landmarks}: names none of the images of {source.root}")
    kind = "frames, aligned by landmarks" if landmarks is not None else "the release's own aligned"
    reader = partial(read_aligned, source=source.absolute(), size=size)
    return Release(
        "SFEW 2.0", kind, tuple(CLASSES.values()), splits, reader, left_out,
        face_cut=AS_RELEASED if landmarks is None else SIMILARITY,
    )  # fmt: skip


def film_of(key: str) -> str:
    """The film that a frame is of, with which its file's name begins: Film_hhmmssmmm_number."""
    first, _, rest = key.partition("_")
    return re.split(r"_\d", rest if first in CLASSES.values() else key, maxsplit=1)[0]


def match_points(
    items: list[Item], points: Points, landmarks: str | Path | None, source: Source,
    left_out: LeftOut,
) -> list[Item]:  # fmt: skip
    """Items whose source is a file and its landmarks; those without are left out, if any have."""
    matched = []
    for item in items:
        if landmarks is not None and item.source not in points:
            reason = f"not in {Path(landmarks).name}: no face found"
            left_out.add(reason, source.root / item.source)
            continue
        matched.append(item._replace(source=(item.source, points.get(item.source))))
    return matched


def read_aligned(item: Item, source: Source, size: int | None) -> Content:
    """The face's bytes, or the frame aligned to size×size pixels where there are landmarks."""
    relative, points = item.source
    if points is None or size is None:
        return read(item._replace(source=relative), source)
    image, pairs = decode(read_file(source, relative)), np.reshape(points, (5, 2))
    # A face may reach over the frame's edge, but the landmarks of another frame are an error.
    if not (np.abs(pairs / image.size - 0.5) <= 1).all():
        raise ValueError(f"landmarks {pairs.tolist()} lie far outside its {image.size} pixels")
    return Content(align(image, pairs, size))


def read_landmarks(path: str | Path) -> Points:
    """Image path (relative to the source) → x1, y1 … x5, y5 in pixels."""
    found: Points = {}
    path = Path(path).resolve()  # a file of the user's own, wherever it lies
    for where, _, line in lines(path, Source(path)):
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


def _homes(source: Source) -> dict[str, Path]:
    """The folder of each split that holds its class folders."""
    splits = ("train", "val")
    aligned = "{}_aligned_faces*"
    found = find_parts(source, (*map(aligned.format, splits), *splits))
    homes: dict[str, Path] = {}
    for split in splits:
        own = [path for path in found[aligned.format(split)] if path.is_dir()]
        home = only(own or [p for p in found[split] if p.is_dir()], source)
        if home is None:
            raise FileNotFoundError(
                f"{source.root / split.capitalize()} not found; expected SFEW's Train/ and Val/, "
                f"or Train_Aligned_Faces/ and Val_Aligned_Faces/; {contents(source)}"
            )
        folders = sorted(Path(entry.path) for entry in visible(home) if is_folder(entry))
        deeper = [path for path in folders if fnmatch(fold(path.name), aligned.format(split))]
        homes[split] = inner(deeper[0], source) if deeper else home
    return homes
