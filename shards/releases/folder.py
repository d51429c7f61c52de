"""Any folder tree train/<class>/*, val/<class>/* (test/ and other splits likewise)."""

import unicodedata
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from shards.folders import is_folder
from shards.release import Item, LeftOut, Release
from shards.releases.layout import contents, inner, visible
from shards.releases.source import Keys, Source, open_source, plain_name, read
from shards.releases.trees import Skip, images_of, subfolders

SPLITS = ("train", "val", "test")  # their folders may be written in any case


def release(
    source: str | Path | Source, *, skip: Sequence[str] = (), is_divided: bool = False
) -> Release:
    """The images of a folder tree; classes are train's folder names in alphabetical order.

    Names meet in any case and Unicode form. The tree may lie in a folder of its own. Hidden files
    are passed over; links that lead out of `source`, and files deeper than a class's folder, are
    left out. A file that is no image is found by its content when it is packed.

    skip: names of folders that are passed over. is_divided: the tree may have no splits, as the
    caller divides it: all images are then those of "train".

    Raises:
        FileNotFoundError: no train/, and none is to be made. ValueError: a class that train/ lacks,
            a name twice, a folder without classes, or a name in `skip` that no folder has.
    """
    source = open_source(source)
    left_out, skipped = LeftOut(source.root), Skip(skip)
    trees = _splits(source, left_out, skipped, is_divided=is_divided)
    folders = {
        split: subfolders(inner(home, source), source, left_out, skipped)
        for split, home in trees.items()
    }
    if not folders["train"]:
        raise ValueError(f"{trees['train']} holds no class folders")
    labels = {name: label for label, name in enumerate(folders["train"])}
    splits: dict[str, list[Item]] = {}
    for split, classes in folders.items():
        if not classes:
            raise ValueError(
                f"{trees[split]} holds no class folders; --skip {plain_name(split)} passes it over"
            )
        for name in classes.keys() - labels.keys():
            raise ValueError(
                f"{classes[name]}: class '{plain_name(classes[name].name)}' is not in train/; "
                f"--skip {plain_name(split)} passes a side folder over"
            )
        keys, splits[split] = Keys(), []
        for name in filter(classes.__contains__, labels):
            own = _composed(folders["train"][name].name)
            for image in images_of(classes[name], source, left_out):
                key = keys.make(f"{own}_{image.stem}", f"{own}_{image.name}")
                splits[split].append(Item(key, labels[name], source.relative(image)))
    skipped.check()
    names = tuple(plain_name(_composed(home.name)) for home in folders["train"].values())
    splits = {"train": splits.pop("train"), **splits}
    reader = partial(read, source=source.absolute())
    return Release("folder", "train/<class>/<images>", names, splits, reader, left_out)


def _splits(source: Source, left_out: LeftOut, skip: Skip, *, is_divided: bool) -> dict[str, Path]:
    """The folder of each split: of the source, or of the one folder in it that holds train/."""
    own = subfolders(source.root, source, left_out, skip)
    while "train" not in own and len(own) == 1:
        only = next(iter(own.values()))
        if not _holds_one_folder(only, source):
            break
        own = subfolders(only, source, left_out, skip)
    if "train" not in own:
        homes = {home: subfolders(home, source, LeftOut(source.root), skip)
                 for home in (inner(home, source) for home in own.values())}  # fmt: skip
        deeper = [home for home, found in homes.items() if "train" in found]
        if len(deeper) > 1:
            raise ValueError(f"{deeper[0]} and {deeper[1]} both hold train/; --source is one tree")
        if not deeper and is_divided:
            return {"train": _undivided(source, own)}
        if not deeper:
            raise FileNotFoundError(_no_train(source, own))
        own = homes[deeper[0]]
    return {name if name in SPLITS else home.name: home for name, home in own.items()}


def _holds_one_folder(home: Path, source: Source) -> bool:
    """Whether there is nothing in a folder but another one, as archives unpack."""
    if not source.holds(home):
        return False
    held = [*islice(visible(home), 2)]
    return len(held) == 1 and is_folder(held[0])


def _undivided(source: Source, own: dict[str, Path]) -> Path:
    """The folder that holds the class folders: the source, or the one folder in it."""
    only = next(iter(own.values())) if len(own) == 1 else None
    return only if only and any(is_folder(entry) for entry in visible(only)) else source.root


def _no_train(source: Source, own: dict[str, Path]) -> str:
    home = source.root / "train"
    text = f"{home} not found; expected {home}/<class>/<images>, {contents(source)}"
    if len(own) > 1:
        text += "; where these are classes, --split 0.8 makes splits of them"
    return text


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
