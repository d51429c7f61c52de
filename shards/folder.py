"""Any folder tree train/<class>/*, val/<class>/* (test/ and other splits likewise)."""

import os
import re
from pathlib import Path

from shards.writer import Item, Release


def release(source: str | Path) -> Release:
    """The images of a folder tree; classes are train's folder names in alphabetical order.

    Hidden files are passed over, and links that lead out of `source`. What is not an image is found
    by its content when it is packed.

    Raises:
        FileNotFoundError: `source` or its train/ folder does not exist.
        ValueError: no class folders, or a class in another split that train lacks.
    """
    root = Path(source)
    if not (root / "train").is_dir():
        raise FileNotFoundError(
            f"{root / 'train'} not found; expected {root}/train/<class>/<images>"
        )
    names = tuple(p.name for p in _folders(root / "train"))
    if not names:
        raise ValueError(f"{root / 'train'} holds no class folders")
    splits = {}
    for folder in _folders(root):
        classes = [p.name for p in _folders(folder)]
        unknown = sorted(set(classes) - set(names))
        if unknown:
            raise ValueError(f"{folder / unknown[0]}: class '{unknown[0]}' is not in train/")
        splits[folder.name] = [
            item for name in classes for item in _items(root, folder / name, names.index(name))
        ]
    splits = {"train": splits.pop("train"), **splits}
    return Release("folder", root.resolve().name, names, splits, read)


def read(item: Item) -> bytes:
    """The file's bytes."""
    return Path(item.source).read_bytes()


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _items(root: Path, folder: Path, label: int) -> list[Item]:
    """Keys are `<class>_<file stem>`; files that would share one keep their ending, or a number."""
    home = root.resolve()
    items: list[Item] = []
    taken: set[str] = set()
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(home):
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
    return re.sub(
        r"[^\w-]", "_", name.encode("utf-8", "replace").decode("ascii", "replace"), flags=re.ASCII
    )
