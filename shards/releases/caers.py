"""CAER-S (Lee et al. 2019): whole frames of television, {train,test}/<Class>/*.png.

The release has no face boxes: a file of them, of any detector, is to be given.
"""

import csv
from functools import partial
from pathlib import Path

from shards.cut import BOX, Cut
from shards.images import decode
from shards.release import Content, Item, LeftOut, Release
from shards.releases.boxes import Box, crop_box
from shards.releases.layout import contents, find_parts, only
from shards.releases.source import Source, lines, open_source, read_file
from shards.releases.trees import list_classes

# The release's folders, in label order
CLASSES = {"Anger": "anger", "Disgust": "disgust", "Fear": "fear", "Happy": "happy",
           "Neutral": "neutral", "Sad": "sad", "Surprise": "surprise"}  # fmt: skip
BOXES = ("path", "x", "y", "width", "height")


def release(source: str | Path | Source, *, boxes: str | Path | None, margin: float) -> Release:
    """The faces of the frames that `boxes` names, the others being left out.

    boxes: lines of `path,x,y,width,height`, the path relative to the source.

    Raises:
        FileNotFoundError: a split is missing. ValueError: no boxes, or a line of another form.
    """
    source = open_source(source)
    if boxes is None:
        raise ValueError(
            f"{source.root}: CAER-S holds whole frames; give --boxes FILE with a face's box in "
            f"each, lines of {','.join(BOXES)} (the path relative to {source.root})"
        )
    left_out, found = LeftOut(source.root), find_parts(source, ("train", "test"))
    named, labels = read_boxes(boxes), {name: label for label, name in enumerate(CLASSES)}
    splits: dict[str, list[Item]] = {}
    for split in ("train", "test"):
        home = only(found[split], source)
        if home is None:
            raise FileNotFoundError(f"{source.root / split} not found; {contents(source)}")
        splits[split] = []
        for item in list_classes(home, labels, source, left_out):
            if item.source in named:
                place = item.source, named[item.source]
                splits[split].append(item._replace(source=place))
            else:
                left_out.add(f"not in {Path(boxes).name}: no face found", source.root / item.source)
    listed = {item.source[0] for items in splits.values() for item in items}
    for relative in sorted(named.keys() - listed):
        left_out.add("a box, but there is no image", relative)
    if not listed:
        raise ValueError(f"{boxes}: names none of the images of {source.root}")
    described = f"boxes of {Path(boxes).name} with margin {margin:g}"
    reader = partial(read, source=source.absolute(), margin=margin)
    return Release(
        "CAER-S", described, tuple(CLASSES.values()), splits, reader, left_out,
        face_cut=str(Cut(BOX, margin)),
    )  # fmt: skip


def read_boxes(path: str | Path) -> dict[str, Box]:
    """Image (relative to the source) → box of its face."""
    found: dict[str, Box] = {}
    path = Path(path).resolve()  # a file of the user's own, wherever it lies
    for where, _, line in lines(path, Source(path)):
        try:
            name, *values = next(csv.reader([line]))
            if (name, *values) == BOXES:
                continue
            x, y, width, height = (int(float(value)) for value in values)
        except (ValueError, OverflowError, csv.Error) as error:
            raise ValueError(f"{where}: {line[:80]!r}, expected {','.join(BOXES)}") from error
        if name in found or min(width, height) <= 0:
            fault = "named twice" if name in found else f"a box of {width}×{height} pixels"
            raise ValueError(f"{where}: {name}: {fault}")
        found[name] = (x, y, width, height)
    return found


def read(item: Item, source: Source, margin: float) -> Content:
    """The face cut out of its frame."""
    frame, box = item.source
    return Content(crop_box(decode(read_file(source, frame)), box, margin)[0])
