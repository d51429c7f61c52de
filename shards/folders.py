"""Folders of pictures: which entries count, by one rule for packing, align, predict and explain.

A folder's pictures are its files, searched to the bottom, that have a picture's ending or begin as
a picture does. Hidden entries, what systems leave beside files, and other files are passed over and
counted. What is no regular file, and what cannot be read, is given: whoever reads it names it. Of
files that a person names, only what systems leave is passed over.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from shards.files import read_regular
from shards.images import SUFFIXES
from shards.kinds import HEAD_BYTES, begins_as_picture

LITTER = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "icon\r", "@eadir", "$recycle.bin",
     "system volume information")
)  # fmt: skip
HIDDEN_LITTER = frozenset((".ds_store", ".appledouble", ".ipynb_checkpoints"))
COMPANION = "._"  # begins the name of macOS's file beside another

Entries = list[os.DirEntry[str]]


def entries(folder: Path, passed_over: Counter[str]) -> Entries:
    """The entries of a folder, by name, without hidden ones and those that systems leave."""
    found = []
    with os.scandir(folder) as scan:
        for entry in sorted(scan, key=lambda e: e.name):
            if reason := _reason(entry.name):
                passed_over[reason] += 1
            else:
                found.append(entry)
    return found


def _reason(name: str) -> str:
    """Why an entry of a folder is passed over; "": it is not."""
    if name.startswith("."):
        return "hidden"
    return "left by a file manager" if name.lower() in LITTER else ""


def left_by_systems(path: Path) -> str:
    """Why a path is passed over even where it is named; "": it is not.

    It, or a folder around it, is what a system leaves beside files; other hidden ones are meant.
    """
    for name in path.parts:
        if name.startswith(COMPANION) or name.lower() in LITTER | HIDDEN_LITTER:
            return _reason(name)
    return ""


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or leads to one; a link that leads round is none."""
    try:
        return entry.is_dir()
    except OSError:  # it cannot be followed
        return False


def is_file(entry: os.DirEntry[str]) -> bool:
    """Likewise, whether it is a regular file."""
    try:
        return entry.is_file()
    except OSError:
        return False


def is_picture(entry: os.DirEntry[str], passed_over: Counter[str]) -> bool:
    """Whether an entry that is no folder may be a picture; a file that is none is counted."""
    _, dot, ending = entry.name.lower().rpartition(".")  # pathlib takes ten times as long
    if dot + ending in SUFFIXES or not is_file(entry):
        return True
    try:
        head = read_regular(entry.path, HEAD_BYTES, cut=True)
    except (OSError, ValueError):
        return True
    if begins_as_picture(head):
        return True
    passed_over[f"no picture ({dot + ending if dot else 'without an ending'})"] += 1
    return False


def walk(
    folder: Path,
    listed: Callable[[Path], Entries],
    passed_over: Counter[str],
    *,
    once: bool = False,
) -> Iterator[Path]:
    """The pictures of a folder and all below it, in the order of their paths' parts.

    listed: gives the entries of a folder; its OSError stops the walk. once: a folder that links
    lead to again is passed over, and one that cannot be listed is given like a file.
    """
    seen: set[tuple[int, int]] = set()
    # Of what is still to come: a path, and the folders around it, None for a picture.
    coming: list[tuple[Path, frozenset[tuple[int, int]] | None]] = [(folder, frozenset())]
    while coming:
        path, around = coming.pop()
        if around is None:
            yield path
            continue
        try:
            status = path.stat()
            own = status.st_dev, status.st_ino
            if own in (seen if once else around):
                passed_over["links to a folder that is walked already"] += 1
                continue
            found = listed(path)
        except OSError:
            if not once:
                raise
            yield path
            continue
        seen.add(own)
        for entry in reversed(found):
            if is_folder(entry):
                coming.append((Path(entry.path), around | {own}))
            elif is_picture(entry, passed_over):
                coming.append((Path(entry.path), None))


def describe(passed_over: Counter[str]) -> str:
    """What was passed over, in words."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(passed_over.items()))
