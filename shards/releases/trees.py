"""Folder trees <split>/<class>/<images>: read alike for every release that comes as one."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from shards.folders import is_file, is_folder, is_picture
from shards.release import Item, LeftOut
from shards.releases.layout import fold, inner
from shards.releases.source import Keys, Source, entries, walk

OTHER_NAMES = "class folders of any names are packed as `folder`"


class Skip:
    """The folders that are passed over, by their names or their paths in the source."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._given = {fold(name.strip("/")): name for name in names}
        self._met: set[str] = set()

    def takes(self, path: Path, source: Source) -> bool:
        """Whether a folder is one of them."""
        met = {fold(path.name), fold(source.relative(path))} & self._given.keys()
        self._met |= met
        return bool(met)

    def check(self) -> None:
        """Refuses a name that no folder has had: a misspelt one would go unnoticed."""
        for name in self._given.keys() - self._met:
            raise ValueError(f"--skip {self._given[name]}: no such folder beside splits or classes")


def subfolders(
    folder: Path, source: Source, left_out: LeftOut, skip: Skip | None = None
) -> dict[str, Path]:
    """The folders in a folder by their folded names, in the order of their names.

    Those that are skipped are counted.

    Raises:
        ValueError: two folders have one name but for case or Unicode form.
    """
    found: dict[str, Path] = {}
    for entry in entries(folder, source, left_out):
        if not is_folder(entry):
            continue
        name, path = fold(entry.name), Path(entry.path)
        if skip is not None and skip.takes(path, source):
            images = sum(1 for _ in walk(path, source, left_out))
            left_out.add("in a folder that --skip names", path, images=images)
        elif name in found:
            raise ValueError(f"{found[name]} and {path}: one name but for case or Unicode form; "
                             "merge them")  # fmt: skip
        else:
            found[name] = path
    return found


def images_of(folder: Path, source: Source, left_out: LeftOut) -> Iterator[Path]:
    """The pictures of a class's folder; what lies deeper, or is no file, is counted."""
    for entry in entries(inner(folder, source), source, left_out):
        path = Path(entry.path)
        if is_file(entry):
            if is_picture(entry, left_out.passed_over):
                yield path
        elif not is_folder(entry):
            left_out.add("no regular file", path)
        elif deeper := sum(1 for _ in walk(path, source, left_out)):
            left_out.add("deeper than a class's folder", path, images=deeper)


def list_classes(
    folder: Path, labels: Mapping[str, int], source: Source, left_out: LeftOut, *,
    ignored: str = "",
) -> list[Item]:  # fmt: skip
    """The images of a split whose class folders a release names; keys are <class>_<stem>.

    labels: name of a folder → label. ignored: folders that are not classes, as a pattern.

    Raises:
        ValueError: a folder of another name.
    """
    keys, items = Keys(), []
    known = {fold(name): label for name, label in labels.items()}
    for name, home in subfolders(folder, source, left_out).items():
        if fnmatchcase(name, ignored):
            continue
        if name not in known:
            raise ValueError(f"{home}: expected one of {', '.join(labels)}; {OTHER_NAMES}")
        for image in images_of(home, source, left_out):
            key = keys.make(f"{name}_{image.stem}", f"{name}_{image.name}")
            items.append(Item(key, known[name], source.relative(image)))
    return items
