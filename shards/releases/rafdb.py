"""RAF-DB: its basic (single-label) set and its compound set, aligned 100×100 images.

As the archives unpack, with a partition list, or as it circulates: {train,test}/1…7/<images>.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from shards.release import Item, LeftOut, Release
from shards.releases.layout import Found, Names, contents, find_parts, fold, only
from shards.releases.source import (
    Keys,
    Source,
    check_counts,
    check_total,
    entries,
    lines,
    open_source,
    read,
)
from shards.releases.trees import OTHER_NAMES, images_of, subfolders

# The release's labels 1 to 7, in the configuration's words.
CLASSES = ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")
OFFICIAL = {
    "train": (1290, 281, 717, 4772, 1982, 705, 2524),
    "test": (329, 74, 160, 1185, 478, 162, 680),
}
# The labels 1 to 11 of the compound set, as its readme lists them
COMPOUND = (
    "happily surprised", "happily disgusted", "sadly fearful", "sadly angry", "sadly surprised",
    "sadly disgusted", "fearfully angry", "fearfully surprised", "angrily surprised",
    "angrily disgusted", "disgustedly surprised",
)  # fmt: skip
COMPOUND_TOTAL = 3954  # of both splits, as public descriptions have it; none counts them apart
LISTS = ("list_patition_label.txt", "list_partition_label.txt")  # the first is the release's own
SETS = ("basic", "compound")  # the release's folders


class Subset(NamedTuple):
    """One of the release's two sets."""

    name: str
    classes: tuple[str, ...]


def release(source: str | Path | Source, *, compound: bool = False) -> Release:
    """The images of a set; `source` is its folder, or one above it.

    Raises:
        FileNotFoundError: neither a list with aligned images nor folders 1, 2, … are there.
        ValueError: a list of another form, or the list of the other set.
    """
    source = open_source(source)
    subset = Subset("compound", COMPOUND) if compound else Subset("basic", CLASSES)
    found = find_parts(source, (*LISTS, "aligned", "original", "train", "test"))
    path = only([p for name in LISTS for p in found[name] if _is_of(p, source, subset)], source)
    if path is not None:
        images = only([p for p in found["aligned"] if _is_of(p, source, subset)], source)
        if images is None:
            raise FileNotFoundError(_no_images(source, found))
        # Paths of items are relative to the set's folder, wherever that lies in the source.
        home = path.parent.parent
        if home.is_relative_to(source.root) and images.is_relative_to(home):
            source = Source(home, source.links)
        left_out = LeftOut(source.root)
        splits = _listed(path, images, source, subset, left_out)
    else:
        left_out = LeftOut(source.root)
        splits = _folders(found, source, subset, left_out)
    if compound:
        both = [item for items in splits.values() for item in items]
        check_total("RAF-DB's compound set", {"both splits": both}, {"both splits": COMPOUND_TOTAL})
    else:
        check_counts("RAF-DB", CLASSES, splits, OFFICIAL)
    name = "RAF-DB compound" if compound else "RAF-DB"
    reader = partial(read, source=source.absolute())
    return Release(name, f"{subset.name}, aligned", subset.classes, splits, reader, left_out)


def _is_of(path: Path, source: Source, subset: Subset) -> bool:
    """Whether a part is not in the folder of the other set."""
    return not any(fold(part) in SETS and fold(part) != subset.name
                   for part in Path(source.relative(path)).parts)  # fmt: skip


def _no_images(source: Source, found: Found) -> str:
    if found["original"]:
        return (f"{found['original'][0]} holds whole photographs, which are not packed; unpack "
                "RAF-DB's aligned images (Image/aligned) beside it")  # fmt: skip
    return f"{source.root / 'Image/aligned'} not found; unpack RAF-DB's aligned images there"


def _listed(
    path: Path, images: Path, source: Source, subset: Subset, left_out: LeftOut
) -> dict[str, list[Item]]:
    """The images that a partition list names."""
    splits: dict[str, list[Item]] = {"train": [], "test": []}
    most, home = len(subset.classes), source.relative(images)
    present = Names(entry.name for entry in entries(images, source, left_out))
    listed, keys = set(), Keys()
    for where, _, line in lines(path, source):
        found = re.fullmatch(r"((train|test)_\d+)\.jpg\s+(\d{1,2})\s*", line)
        label = int(found[3]) if found else 0
        if not found or not 1 <= label <= most:
            hint = "; the compound set is packed as rafdb-compound" if 7 < label <= 11 else ""
            raise ValueError(
                f"{where}: {line!r}, expected <train|test>_<number>.jpg <1 to {most}>{hint}"
            )
        stem, split = found[1], found[2]
        name = f"{stem}_aligned.jpg"
        file = present.find(name) or present.find(f"{stem}.jpg")
        if file in listed:
            left_out.add("listed twice", f"{where}: {stem}.jpg")
        elif file is None:
            left_out.add("listed, but there is no image", f"{images / name}")
        else:
            splits[split].append(Item(keys.make(stem), label - 1, f"{home}/{file}"))
        listed.add(file or name)
    for file in sorted(present.present - listed):
        left_out.add("not in the partition list", f"{images / file}")
    return splits


def _folders(
    found: Mapping[str, list[Path]], source: Source, subset: Subset, left_out: LeftOut
) -> dict[str, list[Item]]:
    """The images in {train,test}/1, 2, …, whose folders' names are their labels."""
    splits: dict[str, list[Item]] = {}
    numbers = [str(k) for k in range(1, len(subset.classes) + 1)]
    for split in ("train", "test"):
        home = only([p for p in found[split] if _is_of(p, source, subset)], source)
        if home is None:
            raise FileNotFoundError(
                f"{source.root / 'EmoLabel' / LISTS[0]} not found; expected RAF-DB's folder "
                f"'{subset.name}', or {{train,test}}/1…{numbers[-1]}; {contents(source)}"
            )
        keys, splits[split] = Keys(), []
        for name, folder in subfolders(home, source, left_out).items():
            if name not in numbers:
                raise ValueError(f"{folder}: expected folders 1 to {numbers[-1]}; {OTHER_NAMES}")
            for image in images_of(folder, source, left_out):
                key = keys.make(image.stem.removesuffix("_aligned"), image.name)
                splits[split].append(Item(key, int(name) - 1, source.relative(image)))
    return splits
