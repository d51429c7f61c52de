"""python -m shards.show DIR: a table of the classes, and a contact sheet of each as PNG."""

from shards import command

if __name__ == "__main__":  # before numpy is imported: a signal may come meanwhile
    command.show()

import argparse
import io
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shards.files import write_atomically
from shards.format import ShardSet, Split, open_shardset
from shards.images import decode
from shards.jpeg import lost_data
from shards.packing.claim import CONTACT_SHEET
from shards.releases.source import plain_name, safe_key

CELL = 112  # pixels of a picture on a sheet, at most
NAME_WIDTH, FONT_SIZE, LINE = 120, 16, 24
MAX_ROWS = 20  # classes in tables and overviews; a set of identities has thousands

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (2 for bad input, in one line)."""
    parser = argparse.ArgumentParser(prog="python -m shards.show", description=__doc__)
    parser.add_argument("shards", help="folder with manifest.json")
    parser.add_argument("--out", default="sheets", help="folder for the sheets (default sheets)")
    parser.add_argument("--split", help="default: the first one")
    parser.add_argument("--images", type=int, default=96, help="a sheet (default 96)")
    parser.add_argument("--classes", type=int, default=100, help="with sheets (default 100)")
    options = parser.parse_args(arguments)
    return command.guarded(partial(_run, options))


def _run(options: argparse.Namespace) -> int:
    for option in ("images", "classes"):
        if (value := getattr(options, option)) < 1:
            raise ValueError(f"--{option} {value}: expected at least 1")
    shards = open_shardset(options.shards)
    split = shards.split(options.split or shards.splits[0])
    print(table(shards))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for label, name in list(enumerate(shards.class_names))[: options.classes]:
        path = out / f"{split.name}-{label:02d}-{safe_key(name)}.png"
        if class_sheet(split, label, path, images=options.images):
            print(plain_name(str(path)))
    if (more := len(shards.class_names) - options.classes) > 0:
        print(f"{more} more classes; --classes {len(shards.class_names)} draws them all")
    return 0


def table(shards: ShardSet) -> str:
    """Images by class and split, and images of the release left out, by reason."""
    names, splits = shards.class_names, shards.splits
    rows = [("class", *splits)]
    rows += [(name, *(str(shards.counts[s][k]) for s in splits)) for k, name in enumerate(names)]
    if len(names) > MAX_ROWS:
        rows[MAX_ROWS:] = [(f"… of {len(names)}", *("…" for _ in splits))]
    rows.append(("all", *(str(sum(shards.counts[s])) for s in splits)))
    width = max(len(row[0]) for row in rows)
    lines = [row[0].ljust(width) + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows]
    left_out = [f"left out: {count} × {reason}" for reason, count in shards.dropped.items()]
    return "\n".join([f"{shards.dataset}, {shards.release}", *lines, *left_out])


def class_sheet(split: Split, label: int, path: Path, *, images: int, columns: int = 12) -> bool:
    """A sheet of one class, its images taken evenly from first to last; False if it has none."""
    ids = np.flatnonzero(split.index["label"] == label)
    if not len(ids):
        return False
    chosen = _evenly(ids, images)
    title = f"{split.class_names[label]} (label {label}): {len(chosen)} of {len(ids)}, {split.name}"
    pictures = _pictures(split, chosen)
    side = _side(pictures)
    rows = [pictures[k : k + columns] for k in range(0, len(pictures), columns)]
    sheet = Image.new("RGB", (columns * side, LINE + len(rows) * side), "white")
    _write(sheet, (4, 2), title)
    _paste(sheet, rows, side, (0, LINE))
    _save(sheet, path)
    return True


def draw_overview(shards: ShardSet) -> None:
    """The contact sheet in a set's folder, where it is not yet.

    A disk that is full or read-only costs the set nothing else.
    """
    path = shards.root / CONTACT_SHEET
    try:
        if not path.exists():
            overview(shards, path)
    except OSError as error:
        log.warning("no contact sheet: %s", command.words(error))


def overview(shards: ShardSet, path: Path, *, columns: int = 12) -> None:
    """One sheet of the first split: a row of images for each class, its name at the left."""
    split = shards.split(shards.splits[0])
    names = shards.class_names[:MAX_ROWS]
    rows = [
        _pictures(split, _evenly(np.flatnonzero(split.index["label"] == label), columns))
        for label in range(len(names))
    ]
    side = _side([picture for row in rows for picture in row])
    sheet = Image.new("RGB", (NAME_WIDTH + columns * side, len(names) * side), "white")
    for row, name in enumerate(names):
        _write(sheet, (8, row * side + side // 2 - FONT_SIZE // 2), name)
    _paste(sheet, rows, side, (NAME_WIDTH, 0))
    _save(sheet, path)


def pair_sheet(
    pairs: Sequence[tuple[str, tuple[Split, Split], tuple[int, int]]], path: Path, columns: int = 5
) -> None:
    """A sheet of pairs of images beside each other, each under its title."""
    side, gap = CELL, 8
    width, height = 2 * side + gap, side + LINE
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for number, (title, splits, samples) in enumerate(pairs):
        row, column = divmod(number, columns)
        corner = (column * width, row * height)
        _write(sheet, (corner[0] + 2, corner[1] + 2), title)
        two = [_picture(split, sample) for split, sample in zip(splits, samples, strict=True)]
        even = [picture.resize((side, side)) for picture in two]
        _paste(sheet, [even], side, (corner[0], corner[1] + LINE))
    _save(sheet, path)


def _save(sheet: Image.Image, path: Path) -> None:
    png = io.BytesIO()
    sheet.save(png, "PNG")
    write_atomically(path, png.getvalue())


def _evenly(ids: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    chosen: NDArray[np.int64] = ids[np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int)]
    return chosen


def _pictures(split: Split, ids: NDArray[np.int64]) -> list[Image.Image]:
    return [_picture(split, int(sample)) for sample in ids]


def _picture(split: Split, sample: int) -> Image.Image:
    """The image, or a red square with its name: damage is to be seen."""
    data = split.encoded(sample)
    try:
        if fault := lost_data(data):  # `decode` completes a JPEG as it comes, a packed one is whole
            raise ValueError(fault)
        return decode(data)
    except ValueError:
        placeholder = Image.new("RGB", (CELL, CELL), "red")
        shard, _, key = split.key(sample).partition("/")
        lines = [text[k : k + 14] for text in (shard, key) for k in range(0, len(text), 14)]
        _write(placeholder, (2, 2), "\n".join(lines), size=12)
        return placeholder


def _side(pictures: Sequence[Image.Image]) -> int:
    return min(CELL, max(max(picture.size) for picture in pictures))


def _paste(
    sheet: Image.Image, rows: Sequence[Sequence[Image.Image]], side: int, corner: tuple[int, int]
) -> None:
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            if picture.size != (side, side):
                picture.thumbnail((side, side))
            sheet.paste(picture, (corner[0] + c * side, corner[1] + r * side))


def _write(sheet: Image.Image, at: tuple[int, int], text: str, size: int = FONT_SIZE) -> None:
    font = ImageFont.load_default(size)
    ImageDraw.Draw(sheet).text(at, text, fill="black", font=font)
