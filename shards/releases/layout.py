"""Finding the parts of a release, however its archives were unpacked and copied.

A part is found by its name, in any case and Unicode form, at the top or up to DEPTH folders down.
"""

import fnmatch
import itertools
import os
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from filecmp import cmp
from pathlib import Path

from shards.folders import LITTER, is_folder
from shards.releases.source import Source

DEPTH = 5  # levels that are searched: an archive's own three, and one folder too deep
NAMES_SHOWN = 8
ARCHIVES = (".zip", ".rar", ".tar", ".gz", ".tgz", ".7z", ".001")

Found = dict[str, list[Path]]


def fold(name: str) -> str:
    """A name as the same name in another case or Unicode form is folded too."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


class Names:
    """The files of a folder, found by the names that a list of the release gives them.

    Copies change a name's case, its Unicode form and the direction of its slashes.
    """

    def __init__(self, present: Iterable[str]) -> None:
        self.present = frozenset(present)
        self._folded: dict[str, str] | None = None  # made where a name needs it: it may be large

    def find(self, listed: str) -> str | None:
        """The file of this name, of which one spelt the same comes first."""
        if listed in self.present:
            return listed
        if self._folded is None:
            self._folded = {fold(name): name for name in sorted(self.present, reverse=True)}
        return self._folded.get(fold(listed))


def visible(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder in no order, without hidden ones and litter: to look at names."""
    with os.scandir(folder) as found:
        for entry in found:
            if not entry.name.startswith(".") and entry.name.lower() not in LITTER:
                yield entry


def find_parts(source: Source, patterns: Sequence[str]) -> Found:
    """Where the entries are that match each of the folded patterns, the least deep first.

    What is found is not searched itself: a folder of a million images is looked at by its name.
    Links are searched where the source names a folder for them. What several paths lead to is found
    once.
    """
    found: Found = {pattern: [] for pattern in patterns}
    waiting, met = deque([(source.root, 1)]), set[tuple[str | None, str]]()
    while waiting:
        folder, depth = waiting.popleft()
        if _is_met(folder, None, met):
            continue
        for entry in sorted(visible(folder), key=lambda e: e.name):
            name = fold(entry.name)
            own = next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)
            if own is not None and not _is_met(entry.path, own, met):
                found[own].append(Path(entry.path))
            elif own is None and depth < DEPTH and is_folder(entry) and _is_searched(entry, source):
                waiting.append((Path(entry.path), depth + 1))
    return found


def _is_met(path: str | Path, pattern: str | None, met: set[tuple[str | None, str]]) -> bool:
    """Whether a path leads to what a former one of this pattern has led to; if not, notes it."""
    place = pattern, os.path.realpath(path)
    is_met = place in met
    met.add(place)
    return is_met


def _is_searched(entry: os.DirEntry[str], source: Source) -> bool:
    """Links within the source lead to folders that are searched anyway."""
    return not entry.is_symlink() or (source.links is not None and source.holds(entry.path))


def only(found: Sequence[Path], source: Source) -> Path | None:
    """The one place where a part is, if any, within folders of its own name; of equal files, one.

    Raises:
        ValueError: there are two: which of them is meant cannot be known.
    """
    if any(not path.is_file() or not cmp(found[0], path, shallow=False) for path in found[1:]):
        raise ValueError(f"{found[0]} and {found[1]}: two of one name; give --source the folder "
                         "that holds the one that is meant")  # fmt: skip
    return inner(found[0], source) if found else None


def inner(folder: Path, source: Source) -> Path:
    """A folder, or the one of the same name that an unpacked archive has made within it.

    Of links that lead round, the system follows 40.
    """
    name = fold(folder.name)
    while deeper := [p for p in _few(folder, source) if fold(p.name) == name and p.is_dir()]:
        folder = deeper[0]
    return folder


def part(folder: Path, name: str, source: Source) -> Path | None:
    """The folder of this name in a folder, in any case, within folders of its own name."""
    found = sorted(entry.name for entry in visible(folder) if fold(entry.name) == name)
    return inner(folder / found[0], source) if found else None


def _few(folder: Path, source: Source) -> list[Path]:
    """The entries of a folder that holds one or two, as one with an unpacked folder does."""
    if not folder.is_dir() or not source.holds(folder):
        return []
    with os.scandir(folder) as found:
        own = (entry for entry in found if not entry.name.startswith("."))
        few = [Path(entry.path) for entry in itertools.islice(own, 3)]
    return few if len(few) < 3 else []


def contents(source: Source) -> str:
    """What is in a source, as the end of an error that did not find what it expected there."""
    entries = sorted(visible(source.root), key=lambda e: e.name)
    names = [f"{entry.name}/" if is_folder(entry) else entry.name for entry in entries]
    archives = [name for name in names if name.lower().endswith(ARCHIVES)]
    shown = ", ".join(names[:NAMES_SHOWN]) + (" …" if len(names) > NAMES_SHOWN else "")
    text = f"it holds {shown}" if names else "it is empty"
    return f"{text}; unpack {archives[0]}" if archives else text
