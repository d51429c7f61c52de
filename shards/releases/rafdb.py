"""RAF-DB, the basic (single-label) set: aligned 100×100 images and their partition list."""

import re
from functools import partial
from pathlib import Path

from shards.release import Item, LeftOut, Release
from shards.releases.source import Keys, check_counts, entries, lines, read

# The release's labels 1 to 7, in the configuration's words.
CLASSES = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")
OFFICIAL = {
    "train": (1290, 281, 717, 4772, 1982, 705, 2524),
    "test": (329, 74, 160, 1185, 478, 162, 680),
}
LISTS = ("list_patition_label.txt", "list_partition_label.txt")  # the first is the release's own
IMAGES = "Image/aligned"


def release(source: str | Path) -> Release:
    """The images named in the partition list; `source` is the folder `basic` or the one above."""
    root = Path(source)
    tried = [r / "EmoLabel" / name for r in (root, root / "basic") for name in LISTS]
    path = next((p for p in tried if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{tried[0]} not found; expected RAF-DB's folder 'basic'")
    root = path.parent.parent
    left_out = LeftOut(root)
    if not (root / IMAGES).is_dir():
        raise FileNotFoundError(f"{root / IMAGES} not found; unpack RAF-DB's aligned images there")
    splits: dict[str, list[Item]] = {"train": [], "test": []}
    present = {entry.name for entry in entries(root / IMAGES, root, left_out)}
    listed, keys = set(), Keys()
    for where, _, line in lines(path, root):
        found = re.fullmatch(r"((train|test)_\d+)\.jpg\s+([1-7])\s*", line)
        if not found:
            raise ValueError(f"{where}: {line!r}, expected <train|test>_<number>.jpg <1 to 7>")
        stem, split, label = found.groups()
        file = f"{stem}_aligned.jpg"
        if file in listed:
            left_out.add("listed twice", f"{where}: {stem}.jpg")
        elif file not in present:
            left_out.add("listed, but there is no image", f"{root / IMAGES / file}")
        else:
            splits[split].append(Item(keys.make(stem), int(label) - 1, f"{IMAGES}/{file}"))
        listed.add(file)
    for file in sorted(present - listed):
        left_out.add("not in the partition list", f"{root / IMAGES / file}")
    check_counts("RAF-DB", CLASSES, splits, OFFICIAL)
    return Release(
        "RAF-DB", "basic, aligned", CLASSES, splits, partial(read, root=root.absolute()), left_out
    )
