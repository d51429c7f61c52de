"""Reading a release as downloaded: files, keys, and counts beside the official ones.

Nothing outside the source folder is read: links and relative paths that lead out of it are refused.
"""

import errno
import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from shards.release import Content, Item, LeftOut

MAX_STEM = 72  # characters of a key; a longer one is cut and ends in a hash of the whole

log = logging.getLogger(__name__)


def entries(folder: Path, root: Path, left_out: LeftOut) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name, without hidden names and links that lead out of `root`."""
    found = []
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and not _is_inside(entry.path, root):
            left_out.add("a link that leads out of the source", entry.path)
            continue
        found.append(entry)
    return found


def read_file(root: Path, relative: str) -> bytes:
    """The bytes of a file of the source.

    Raises:
        ValueError: the path, or a link, leads out of `root`.
        OSError: it cannot be read.
    """
    path = f"{root}/{relative}"  # text: pathlib takes as long as the reading
    if relative.startswith("/") or ".." in relative.split("/"):
        raise ValueError(f"{path} leads out of the source")
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        if not _is_inside(path, root):
            raise ValueError(f"{path} is a link that leads out of the source") from error
        file = os.open(path, os.O_RDONLY)
    with os.fdopen(file, "rb") as opened:
        return opened.read()


def plain_name(name: str) -> str:
    """A file name as text that any program prints: bytes that are no UTF-8 as `\\xe9`."""
    return os.fsencode(name).decode(errors="backslashreplace")


def read(item: Item, root: Path) -> Content:
    """The bytes of the file that an item names, for releases that keep nothing beside an image."""
    return Content(read_file(root, item.source))


def _is_inside(path: str | Path, root: Path) -> bool:
    return Path(path).resolve().is_relative_to(root.resolve())


class Keys:
    """Keys that a tar keeps as they are, each given once."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def make(self, *names: str) -> str:
        """A key after the first name that leaves it free; after the last one, `_` is added."""
        key = next((k for k in map(safe_key, names) if k not in self._taken), safe_key(names[-1]))
        while key in self._taken:
            key += "_"
        self._taken.add(key)
        return key


def safe_key(name: str) -> str:
    """`name` in letters, digits, `_` and `-`; a long one is cut and ends in a hash."""
    safe = re.sub(r"[^\w-]", "_", name, flags=re.ASCII)
    if len(safe) <= MAX_STEM:
        return safe
    return f"{safe[: MAX_STEM - 13]}_{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"


def check_counts(
    dataset: str,
    class_names: Sequence[str],
    splits: Mapping[str, Sequence[Item]],
    official: Mapping[str, Sequence[int]],
) -> None:
    """Warns, with a table, where a split's classes are not as many as the release's authors say."""
    for split, expected in official.items():
        labels = np.array([item.label for item in splits.get(split, ())], int)
        found = np.bincount(labels, minlength=len(class_names)).tolist()
        if found == list(expected):
            continue
        rows = [*zip(class_names, found, expected, strict=True), ("all", sum(found), sum(expected))]
        table = [f"{name:>12} {n:>9} {e:>9} {n - e:>+9}" for name, n, e in rows]
        log.warning(
            "WARNING: this is not all of %s: its %s images differ from the official counts\n%s\n%s",
            dataset, split, f"{'class':>12} {'found':>9} {'official':>9} {'differ':>9}",
            "\n".join(table),
        )  # fmt: skip
