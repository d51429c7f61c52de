"""Any folder tree train/<class>/*, val/<class>/* (test/ and other splits likewise)."""

import hashlib
import logging
import os
import re
from pathlib import Path

from shards.writer import Item, Release

MAX_STEM = 72  # characters of a key; a longer one is cut and ends in a hash of the whole

log = logging.getLogger(__name__)


def release(source: str | Path) -> Release:
    """The images of a folder tree; classes are train's folder names in alphabetical order.

    Hidden files are passed over, and links that lead out of `source` (with a warning). What is not
    an image is found by its content when it is packed.

    Raises:
        FileNotFoundError: `source` or its train/ folder does not exist.
        ValueError: no class folders, or a class in another split that train lacks.
    """
    root = Path(source)
    if not (root / "train").is_dir():
        raise FileNotFoundError(
            f"{root / 'train'} not found; expected {root}/train/<class>/<images>"
        )
    trees = {p.name: [c.name for c in _folders(p, root)] for p in _folders(root, root)}
    names = tuple(trees.get("train", ()))
    if not names:
        raise ValueError(f"{root / 'train'} holds no class folders")
    splits = {}
    for split, classes in trees.items():
        unknown = sorted(set(classes) - set(names))
        if unknown:
            raise ValueError(f"{root / split / unknown[0]}: class '{unknown[0]}' is not in train/")
        taken: set[str] = set()
        splits[split] = [
            item
            for name in classes
            for item in _items(root, root / split / name, names.index(name), taken)
        ]
    splits = {"train": splits.pop("train"), **splits}
    return Release("folder", root.resolve().name, names, splits, read)


def read(item: Item) -> bytes:
    """The file's bytes."""
    return Path(item.source).read_bytes()


def _folders(path: Path, root: Path) -> list[Path]:
    return [p for p in _entries(path, root) if p.is_dir()]


def _entries(path: Path, root: Path) -> list[Path]:
    """What lies in a folder, sorted, without hidden names and links that lead out of `root`."""
    home = root.resolve()
    found = []
    for entry in sorted(path.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and not entry.resolve().is_relative_to(home):
            log.warning("left out %s: a link that leads out of %s", entry, root)
            continue
        found.append(entry)
    return found


def _items(root: Path, folder: Path, label: int, taken: set[str]) -> list[Item]:
    """Keys are `<class>_<file stem>`; where one is `taken`, the ending is kept, then `_` added."""
    items: list[Item] = []
    for path in _entries(folder, root):
        if not path.is_file():
            continue
        key = _safe(f"{folder.name}_{path.stem}")
        if key in taken:
            key = _safe(f"{folder.name}_{path.name}")
        while key in taken:
            key += "_"
        taken.add(key)
        items.append(Item(key, label, os.fspath(path.absolute())))
    return items


def _safe(name: str) -> str:
    safe = re.sub(r"[^\w-]", "_", name, flags=re.ASCII)
    if len(safe) <= MAX_STEM:
        return safe
    return f"{safe[: MAX_STEM - 13]}_{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"
