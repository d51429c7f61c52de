"""Reading a release as downloaded: files, lists, keys, and counts beside the official ones.

Nothing outside the source folder is read: links and relative paths that lead out of it are refused,
but for links into a folder that the user names. Messages name files relative to the source, as they
may go into the manifest.
"""

import errno
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from shards import folders
from shards.files import NO_FILE, read_regular
from shards.images import MAX_BYTES
from shards.release import Content, Item, LeftOut

MAX_STEM = 72  # characters of a key; a longer one is cut

LEADS_OUT = "a link that leads out of the source"
FOLLOW = "--follow-links FOLDER follows links into FOLDER"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A release's folder; links are followed within it, and into another folder where one is named.

    Raises:
        FileNotFoundError: a folder that is named is not there.
    """

    root: Path
    links: Path | None = None

    def __post_init__(self) -> None:
        if self.links is not None and not self.links.is_dir():
            raise FileNotFoundError(f"--follow-links {self.links} not found, expected a folder")

    def absolute(self) -> "Source":
        """The same, whatever a worker's working folder."""
        return Source(self.root.absolute(), self.links and self.links.absolute())

    def holds(self, path: str | Path) -> bool:
        """Whether a path, its links followed, lies where this source may be read."""
        found = _is_inside(str(path), str(self.root))
        return found or (self.links is not None and _is_inside(str(path), str(self.links)))

    def relative(self, path: str | Path) -> str:
        """The path of a file, relative to the folder, as items and lists have it."""
        return Path(path).relative_to(self.root).as_posix()


def open_source(source: str | Path | Source) -> Source:
    """The folder as a source, that there is such a folder being checked.

    Raises:
        FileNotFoundError: there is none.
    """
    found = source if isinstance(source, Source) else Source(Path(source))
    if not found.root.is_dir():
        raise FileNotFoundError(f"{found.root} not found, expected the release's folder")
    return found


def entries(folder: Path, source: Source, left_out: LeftOut) -> list[os.DirEntry[str]]:
    """The entries of a folder, by name, without hidden ones and links that lead out of `source`."""
    if not source.holds(folder):
        raise ValueError(f"{folder} is {LEADS_OUT}; {FOLLOW}")
    found = []
    for entry in folders.entries(folder, left_out.passed_over):
        if entry.is_symlink() and not source.holds(entry.path):
            left_out.add(LEADS_OUT, entry.path)
            continue
        found.append(entry)
    return found


def walk(folder: Path, source: Source, left_out: LeftOut) -> Iterator[str]:
    """The pictures of a folder and all below it, as paths relative to the source's."""
    for path in folders.walk(folder, lambda f: entries(f, source, left_out), left_out.passed_over):
        yield source.relative(path)


def read_file(source: Source, relative: str) -> bytes:
    """The bytes of a file of the source; ValueError: it lies outside, is no file, or a huge one."""
    path = f"{source.root}/{relative}"  # text: pathlib takes as long as the reading
    if leads_out(relative) or not source.holds(os.path.dirname(path)):  # noqa: PTH120
        raise ValueError(f"{relative} leads out of the source")
    try:
        try:
            return read_regular(path, MAX_BYTES, follow=False)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            if not source.holds(path):
                raise ValueError(f"{LEADS_OUT}; {FOLLOW}") from error
            return read_regular(path, MAX_BYTES)
    except ValueError as error:
        raise ValueError(f"{relative}: {error}") from error


def leads_out(relative: str) -> bool:
    """Whether a path, by its text alone, is not one below the source."""
    return relative.startswith("/") or ".." in relative.split("/")


@lru_cache(1 << 16)  # a release's million files lie in some thousand folders
def _is_inside(path: str, root: str) -> bool:
    # Not pathlib, which fails on links that lead round.
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def lines(path: Path, source: Source) -> Iterator[tuple[str, int, str]]:
    """(where it stands, byte at which it begins, text) of each line that is not blank."""
    if not source.holds(path):
        raise ValueError(f"{path} is {LEADS_OUT}; {FOLLOW}")
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: {NO_FILE}")
    with path.open("rb") as file:
        at = len(b"\xef\xbb\xbf") if file.read(3) == b"\xef\xbb\xbf" else 0  # a byte order mark
        file.seek(at)
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                text = line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: {line[:80]!r} is no UTF-8") from error
            if text.strip():
                yield where, at, text
            at += len(line)


def line_at(path: str, at: int) -> str:
    """The text of one line, as `lines` gives it."""
    with Path(path).open("rb") as file:
        file.seek(at)
        return file.readline().decode(errors="replace").rstrip("\r\n")


def plain_name(name: str) -> str:
    """A file name as text that any program prints: bytes that are no UTF-8 as `\\xe9`."""
    return os.fsencode(name).decode(errors="backslashreplace")


def read(item: Item, source: Source) -> Content:
    """The bytes of the file that an item names, for releases that keep nothing beside an image."""
    return Content(read_file(source, item.source))


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
    """`name` in letters, digits, `_` and `-`; one that had others, or is long, ends in a hash."""
    safe = re.sub(r"[^\w-]", "_", name, flags=re.ASCII)
    if safe == name and len(name) <= MAX_STEM:
        return name
    return f"{safe[: MAX_STEM - 13]}_{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"


def check_counts(
    dataset: str,
    class_names: Sequence[str],
    splits: Mapping[str, Sequence[Item]],
    official: Mapping[str, Sequence[int]],
) -> None:
    """Warns, with a table, where a split's classes differ from the official counts."""
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


def check_total(
    dataset: str, splits: Mapping[str, Sequence[Item]], official: Mapping[str, int]
) -> None:
    """Warns where splits differ from official totals, of sets whose classes nobody has counted."""
    for split, expected in official.items():
        if (found := len(splits.get(split, ()))) != expected:
            log.warning("WARNING: this is not all of %s: %d images in %s, officially %d", dataset,
                        found, split, expected)  # fmt: skip
