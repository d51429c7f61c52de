"""AffectNet's full release: whole photographs, and lists with each face's box.

`Manually_Annotated_Images/<folder>/<photo>`, `training.csv` and `validation.csv`.
"""

import csv
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from shards.images import decode
from shards.release import NAMES_KEPT, Content, Item, LeftOut
from shards.releases.affectnet_labels import check_label, is_class, make_meta
from shards.releases.boxes import crop_box
from shards.releases.layout import Names
from shards.releases.source import Keys, Source, leads_out, line_at, lines, read_file, walk

COLUMNS = ("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height",
           "facial_landmarks", "expression", "valence", "arousal")  # fmt: skip

Lists = dict[str, tuple[str, tuple[str, ...]]]  # split → list (relative to the source), columns


def list_photos(
    paths: Mapping[str, Path], photos: Path, source: Source, classes: int, left_out: LeftOut
) -> tuple[dict[str, list[Item]], Lists]:
    """Items whose source is the photo and its line of the list, which is read again for the rest.

    paths: split → its list. The 68 landmarks of 400,000 faces would fill half a gigabyte as text.
    """
    start = f"{source.relative(photos)}/"
    present = Names(path.removeprefix(start) for path in walk(photos, source, left_out))
    splits: dict[str, list[Item]] = {}
    lists: Lists = {}
    listed: set[str] = set()
    for split, path in paths.items():
        columns: tuple[str, ...] = ()
        keys, seen, splits[split] = Keys(), set(), []
        for where, at, line in lines(path, source):
            if not columns:
                columns, is_header = _columns(line, where)
                if is_header:
                    continue
            row = _row(line, columns, where)
            photo = row["subDirectory_filePath"].replace("\\", "/")
            file = present.find(photo)
            listed.add(file or photo)
            label = check_label(row["expression"], where)
            if not is_class(label, classes, left_out):
                continue
            if leads_out(photo):
                raise ValueError(f"{where}: {photo} leads out of the source")
            if _box(row, where) is None:
                left_out.add("a box that is no face", f"{where}: {photo}")
            elif photo in seen:
                left_out.add("listed twice", f"{where}: {photo}")
            elif file is None:
                left_out.add("annotated, but there is no image", f"{where}: {photo}")
            else:
                place = file, split, at, zlib.crc32(line.encode())
                names = (text.replace("/", "_") for text in (photo.rsplit(".", 1)[0], photo))
                splits[split].append(Item(keys.make(*names), label, place))
            seen.add(photo)
        lists[split] = source.relative(path), columns
    for number, photo in enumerate(sorted(present.present - listed)):
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


def read_photo(
    item: Item, source: Source, photos: str, lists: Lists, size: int | None, margin: float
) -> Content:
    """The face cut out of its photo; landmarks in pixels of the packed image."""
    photo, split, at, crc32 = item.source
    name, columns = lists[split]
    line = line_at(f"{source.root}/{name}", at)
    if zlib.crc32(line.encode()) != crc32:
        raise OSError(f"{source.root}/{name} was changed while it was packed")
    row = _row(line, columns, name)
    x, y, width, height = _box(row, name) or (0, 0, 0, 0)
    image = decode(read_file(source, f"{photos}/{photo}"))
    face, corner = crop_box(image, (x, y, width, height), margin)
    notes = {
        "valence": row["valence"].split(),
        "arousal": row["arousal"].split(),
        "landmarks": [point for point in row["facial_landmarks"].split(";") if point],
    }
    numbers = {k: np.array([] if v == ["NULL"] else v, float) for k, v in notes.items()}
    return Content(face, make_meta(numbers, corner, face.size, size))
