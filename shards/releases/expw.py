"""ExpW, Expression in-the-Wild (Zhang et al. 2018): web photographs with the boxes of faces.

`label.lst` has a line for each face: image, number of the face in it, the box's top, left, right
and bottom, the detector's confidence, and the label. The release has no splits.
"""

from functools import partial
from pathlib import Path

from shards.cut import BOX, Cut
from shards.folders import is_file
from shards.images import decode
from shards.release import Content, Item, LeftOut, Release
from shards.releases.boxes import Box, crop_box
from shards.releases.layout import Names, contents, find_parts, only, part
from shards.releases.source import Keys, Source, check_total, entries, lines, open_source, read_file

CLASSES = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")  # labels 0 to 6
LIST = "label.lst"
FOLDERS = ("origin", "images", "image")  # the first is the archive's own
TOTALS = {"train": 91793}  # faces of label.lst, as the release's readme has it
FIELDS = ("image", "face", "top", "left", "right", "bottom", "confidence", "label")


def release(source: str | Path | Source, *, margin: float) -> Release:
    """All faces of the list, as the split "train"; `divide` makes others of it.

    Raises:
        FileNotFoundError: the list or the photographs are missing. ValueError: a line of another
            form.
    """
    source = open_source(source)
    found, left_out = find_parts(source, (LIST, *FOLDERS)), LeftOut(source.root)
    path = only(found[LIST], source)
    photos = only([path for name in FOLDERS for path in found[name]], source)
    photos = photos and (part(photos, FOLDERS[0], source) or photos)  # as image/origin/
    if path is None or photos is None:
        missing = LIST if path is None else f"{FOLDERS[0]}/"
        raise FileNotFoundError(f"{source.root / missing} not found; {contents(source)}")
    present = Names(e.name for e in entries(photos, source, left_out) if is_file(e))
    home, keys, items = source.relative(photos), Keys(), list[Item]()
    listed: set[str] = set()
    for where, _, line in lines(path, source):
        photo, face, box, label = _face(line, where)
        file = present.find(photo)
        listed.add(file or photo)
        if file is None:
            left_out.add("listed, but there is no image", f"{where}: {photo}")
        elif min(box[2:]) <= 0:
            left_out.add("a box that is no face", f"{where}: {photo}")
        else:
            key = keys.make(f"{Path(photo).stem}_{face}", f"{photo}_{face}")
            items.append(Item(key, label, (f"{home}/{file}", box)))
    for photo in sorted(present.present - listed):
        left_out.add("not in the list", photos / photo)
    check_total("ExpW", {"train": items}, TOTALS)
    described = f"boxes with margin {margin:g}"
    reader = partial(read, source=source.absolute(), margin=margin)
    return Release(
        "ExpW", described, CLASSES, {"train": items}, reader, left_out,
        face_cut=str(Cut(BOX, margin)),
    )  # fmt: skip


def _face(line: str, where: str) -> tuple[str, str, Box, int]:
    """Image, number of the face, its box and its label."""
    values = line.split()
    try:
        photo, face = values[:2]
        top, left, right, bottom = (int(float(value)) for value in values[2:6])
        label = int(values[7])
        if len(values) != len(FIELDS) or not 0 <= label < len(CLASSES) or "/" in photo:
            raise ValueError(line)
    except (ValueError, IndexError, OverflowError) as error:
        expected = " ".join(FIELDS)
        raise ValueError(f"{where}: {line[:80]!r}, expected {expected} (label 0 to 6)") from error
    return photo, face, (left, top, right - left, bottom - top), label


def read(item: Item, source: Source, margin: float) -> Content:
    """The face cut out of its photograph."""
    photo, box = item.source
    return Content(crop_box(decode(read_file(source, photo)), box, margin)[0])
