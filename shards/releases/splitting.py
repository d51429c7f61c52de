"""Splits that a release does not have: made by a rule, or as a published list has them."""

import csv
import hashlib
import logging
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from shards.files import sha256_of
from shards.release import Item, Release
from shards.releases.source import Keys, Source, lines

HEADERS = ("split", "usage", "partition")  # of the second column, where the first line names them

log = logging.getLogger(__name__)


def divide(release: Release, share: float) -> Release:
    """A release without splits, cut into "train" (`share` of each class) and "val".

    The rule, a function of the files' names alone: the images of each class are ordered by the
    sha256 of their file's name (in Unicode's composed form); the first share × count of them,
    rounded, are for training, and at least one each where there are two. Faces of one photograph
    stay together, counted with the class of the first. A share of 1 leaves all in "train".

    Raises:
        ValueError: the release has splits.
    """
    if len(release.splits) > 1:
        names = ", ".join(release.splits)
        raise ValueError(f"--split {share:g}: {release.dataset} has splits, {names}")
    photos: dict[str, list[Item]] = defaultdict(list)
    for item in release.splits["train"]:
        photos[_path(item)].append(item)
    classes: dict[int, list[str]] = defaultdict(list)
    for path, items in photos.items():
        classes[items[0].label].append(path)
    trained: set[str] = set()
    for paths in classes.values():
        count = sum(len(photos[path]) for path in paths)
        wanted = int(share * count + 0.5)
        if share < 1 and len(paths) > 1:
            wanted = min(wanted, count - 1)
        taken = 0
        for path in sorted(paths, key=_order)[: None if share == 1 or len(paths) == 1 else -1]:
            if taken < max(wanted, 1):
                trained.add(path)
                taken += len(photos[path])
    splits: dict[str, list[Item]] = {"train": [], "val": []}
    for item in release.splits["train"]:  # in the order of the release
        splits["train" if _path(item) in trained else "val"].append(item)
    if not splits["val"]:
        del splits["val"]
    described = f"{release.release}, {share:g} of each class for training"
    return replace(release, release=described, splits=splits)


def _order(path: str) -> tuple[str, str]:
    name = unicodedata.normalize("NFC", path.rpartition("/")[2])
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest(), path


def assign(release: Release, path: Path) -> Release:
    """A release in the splits of a list, whose lines are `<image>,<split>`.

    An image is named by its path in the source or by its key; by <split>/<key> where several of the
    release's own splits have that key. Images that the list does not name are left out.

    Raises:
        ValueError: a line of another form, an image in two splits, or no line that names an image.
    """
    names, ambiguous = _names(release)
    splits: dict[str, list[Item]] = {}
    keys: dict[str, Keys] = defaultdict(Keys)
    taken: dict[tuple[str, int], str] = {}
    matched = missed = 0
    for where, name, split in _rows(path):
        if name in ambiguous:
            raise ValueError(f"{where}: {name} names several images; name its path")
        place = names.get(name)
        if place is None:
            missed += 1
            release.left_out.add("in the list of splits, but there is no image", f"{where}: {name}")
            continue
        matched += 1
        if (before := taken.setdefault(place, split)) != split:
            raise ValueError(f"{where}: {name} is in '{split}', and in '{before}' before")
    for own, items in release.splits.items():
        for number, item in enumerate(items):
            split = taken.get((own, number), "")
            if not split:
                release.left_out.add(f"not in {path.name}", _path(item))
                continue
            key = keys[split].make(item.key, f"{own}_{item.key}")
            splits.setdefault(split, []).append(item._replace(key=key))
    log.info("%s: %d lines name an image, %d do not", path, matched, missed)
    if "train" not in splits:
        found = ", ".join(splits) or "nothing that is there"
        raise ValueError(f"{path}: no image is in 'train', the list has {found}")
    splits = {"train": splits.pop("train"), **splits}
    described = f"{release.release}, splits of {path.name} ({sha256_of(path)[:8]})"
    return replace(release, release=described, splits=splits)


def _path(item: Item) -> str:
    """The file that an item is read from, as its release names it."""
    return str(item.source if isinstance(item.source, str) else item.source[0])


def _names(release: Release) -> tuple[dict[str, tuple[str, int]], set[str]]:
    """Name → an image's split and place in it; and the names that several images have."""
    found: dict[str, tuple[str, int]] = {}
    counts: Counter[str] = Counter()
    for split, items in release.splits.items():
        for number, item in enumerate(items):
            for name in {_path(item), item.key, f"{split}/{item.key}"}:
                counts[name] += 1
                found[name] = split, number
    return found, {name for name, count in counts.items() if count > 1}


def _rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """Where each line stands, the image and the split; train, val and test in lower case."""
    path = path.resolve()  # a file of the user's own, wherever it lies
    is_first = True
    for where, _, line in lines(path, Source(path)):
        try:
            values = [value.strip() for value in next(csv.reader([line]))]
        except csv.Error as error:
            raise ValueError(f"{where}: {error}") from error
        was_first, is_first = is_first, False
        if was_first and values[1:2] and values[1].lower() in HEADERS:
            continue
        if len(values) != 2 or not all(values):
            raise ValueError(f"{where}: {line[:80]!r}, expected <path or key>,<split>")
        name, split = values
        lower = split.lower()
        yield where, name.removeprefix("./"), lower if lower in ("train", "val", "test") else split
