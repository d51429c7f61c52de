"""Photographs of one split, or set, that another holds too, in whatever form.

The same bytes are found by `duplicates`; here are those that were saved anew, resized, cut by up
to 5 %, mirrored, made lighter or darker. A pack records which images show one photograph (`group`
of an index); `find_leaks` looks at the images again.
"""

import csv
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from shards.duplicates import join_groups
from shards.files import write_atomically
from shards.format import ShardSet, Split
from shards.images import to_jpeg
from shards.index import recorded_groups
from shards.likeness import (
    Likenesses,
    jpeg_picture_or_blank,
    likenesses,
    same_photographs,
)
from shards.packing.pool import in_processes
from shards.release import Item, Read, Release
from shards.show import pair_sheet

ITEMS = 256  # of a release, that a process reads at once
NAMED, SHOWN = 3, 60  # pairs in a line, on a sheet

T = TypeVar("T")


class Leaks(NamedTuple):
    """The pairs of pictures of two splits that are one photograph."""

    splits: tuple[Split, Split]
    samples: NDArray[np.int64]  # (N, 2)
    alike: NDArray[np.float32]  # (N,); not a number where the images were not looked at

    def classes(self, pair: int) -> tuple[str, str]:
        """The names of both images' classes."""
        a, b = (split.class_of(sample) for split, sample in self._of(pair))
        return a, b

    def names(self, pair: int) -> tuple[str, str]:
        """split/key of both images."""
        a, b = (split.name_of(sample) for split, sample in self._of(pair))
        return a, b

    def _of(self, pair: int) -> list[tuple[Split, int]]:
        return [(s, int(i)) for s, i in zip(self.splits, self.samples[pair], strict=True)]


def find_leaks(
    own: Sequence[tuple[Split, Likenesses]], others: Sequence[tuple[Split, Likenesses]] | None,
    workers: int,
) -> list[Leaks]:  # fmt: skip
    """The leaks between the splits of a set, or between these and those of another one."""
    leaks = []
    for (a, of_a), (b, of_b) in combinations(own, 2) if others is None else product(own, others):
        pairs = same_photographs(of_a, of_b, workers)
        leaks.append(Leaks((a, b), np.stack([pairs.a, pairs.b], 1), pairs.alike))
    return leaks


def recorded_leaks(shards: ShardSet) -> list[Leaks] | None:
    """The leaks between the splits of a set, by the groups that its pack recorded; None: by none.

    Each image once, with the first of its group; others of it may stand between the two.
    """
    leaks = []
    for a, b in combinations(map(shards.split, shards.splits), 2):
        left, right = recorded_groups(a.index), recorded_groups(b.index)
        if left is None or right is None:
            return None
        groups, first = np.unique(left, return_index=True)
        images = np.flatnonzero(np.isin(right, groups))
        partners = first[np.searchsorted(groups, right[images])]
        alike = np.full(len(images), np.nan, np.float32)
        leaks.append(Leaks((a, b), np.stack([partners, images], 1), alike))
    return leaks


def describe_leaks(found: Sequence[Leaks]) -> Iterator[str]:
    """A line on each two splits that share photographs: how many, by class, and the first ones."""
    for leaks in found:
        if not len(leaks.alike):
            continue
        a, b = (split.name for split in leaks.splits)
        right = leaks.splits[1]
        images = np.unique(leaks.samples[:, 1])
        counts = np.bincount(right.index["label"][images], minlength=len(right.class_names))
        classes = ", ".join(
            f"{count} {name}"
            for name, count in zip(right.class_names, counts, strict=True)
            if count
        )
        torn = sum(len(set(leaks.classes(k))) > 1 for k in range(len(leaks.alike)))
        named = ", ".join(" = ".join(leaks.names(k)) for k in range(min(NAMED, len(leaks.alike))))
        more = f" and {len(leaks.alike) - NAMED} more pairs" if len(leaks.alike) > NAMED else ""
        yield (f"leaks: {len(images)} of {len(right)} images of {b} show photographs of {a} "
               f"({classes}); {torn} of {len(leaks.alike)} pairs under two labels "
               f"({named}{more})")  # fmt: skip


def write_leaks(found: Sequence[Leaks], folder: Path) -> None:
    """leaks.csv of all pairs, and leaks.png of the least alike ones, for the eye."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "label", "also", "label there", "alike"))
    for leaks in found:
        for k, alike in enumerate(leaks.alike.tolist()):
            (a, b), (label_a, label_b) = leaks.names(k), leaks.classes(k)
            writer.writerow((b, label_b, a, label_a, f"{alike:.3f}"))
    write_atomically(folder / "leaks.csv", text.getvalue().encode(errors="replace"))
    pairs = [(float(leaks.alike[k]), leaks, k) for leaks in found for k in range(len(leaks.alike))]
    pairs.sort(key=lambda pair: pair[0])
    shown = [
        (f"{alike:.3f}", leaks.splits, (int(leaks.samples[k, 0]), int(leaks.samples[k, 1])))
        for alike, leaks, k in pairs[:SHOWN]
    ]
    if shown:
        pair_sheet(shown, folder / "leaks.png")


def without_leaks(release: Release, size: int | None, workers: int) -> Release:
    """A release without the training images that show a photograph of another split.

    They are counted among what is left out. All images of the release are read for it, and compared
    as a pack at this size will have them.

    Raises:
        ValueError: the release has no split 'train', or none beside it.
    """
    if "train" not in release.splits or len(release.splits) < 2:
        raise ValueError(f"{release.dataset}: --drop-leaks needs 'train' and another split, "
                         f"found {', '.join(release.splits)}")  # fmt: skip
    owner = np.repeat([*release.splits], [*map(len, release.splits.values())])
    found = [_of_items(release.read, items, size, name, workers)
             for name, items in release.splits.items()]  # fmt: skip
    kept, marks = (np.concatenate(part) for part in zip(*found, strict=True))
    pairs = same_photographs(kept, workers=workers)
    groups = join_groups([marks], (pairs.a, pairs.b))
    is_train = owner == "train"
    other = dict(
        zip(groups[~is_train][::-1].tolist(), owner[~is_train][::-1].tolist(), strict=True)
    )
    train = []
    for item, group in zip(release.splits["train"], groups[is_train].tolist(), strict=True):
        if group in other:
            release.left_out.add(f"shows a photograph of {other[group]}", item.key)
        else:
            train.append(item)
    splits: Mapping[str, Sequence[Item]] = {**release.splits, "train": train}
    return replace(release, splits=splits)


def of_split(split: Split, workers: int) -> Likenesses:
    """What is kept of all images of a split, in the order of the index."""
    rows = [np.flatnonzero(split.index["shard"] == k) for k in range(len(split.shards))]
    tasks = ((split.path(k), split.index[own]) for k, own in enumerate(rows))
    return np.concatenate(
        _in_order(_of_shard, tasks, [len(own) for own in rows], split.name, workers)
    )


def _of_items(
    read: Read, items: Sequence[Item], size: int | None, name: str, workers: int
) -> tuple[Likenesses, NDArray[np.uint64]]:
    """What is kept of a release's images, and a mark of the bytes of each.

    Of one that cannot be read, an empty picture: packing names it.
    """
    starts = range(0, len(items), ITEMS)
    tasks = ((read, list(items[k : k + ITEMS]), size) for k in starts)
    sizes = [min(ITEMS, len(items) - k) for k in starts]
    parts = _in_order(_read_items, tasks, sizes, name, workers)
    kept, marks = (np.concatenate(part) for part in zip(*parts, strict=True))
    return kept, marks


def _in_order(
    function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], sizes: list[int], name: str,
    workers: int,
) -> list[T]:  # fmt: skip
    """What processes find, in the order of their tasks; sizes: pictures of each."""
    parts: dict[int, T] = {}
    bar = tqdm(desc=f"looking at {name}", total=sum(sizes), unit="img", leave=False, disable=None)
    with bar, in_processes(function, tasks, min(workers, len(sizes))) as finished:
        for number, part in finished:
            parts[number] = part
            bar.update(sizes[number])
    return [parts[k] for k in sorted(parts)]


def _of_shard(path: Path, rows: NDArray[np.void]) -> Likenesses:
    with path.open("rb") as file:

        def jpegs() -> Iterator[bytes]:
            for row in rows:
                file.seek(int(row["offset"]))
                yield file.read(int(row["size"]))

        return likenesses(map(jpeg_picture_or_blank, jpegs()))


def _read_items(
    read: Read, items: list[Item], size: int | None
) -> tuple[Likenesses, NDArray[np.uint64]]:
    marks: list[int] = []

    def pictures() -> Iterator[Image.Image]:
        for item in items:
            try:
                jpeg = to_jpeg(read(item).image, size)[0]
            except ValueError:
                jpeg = b""
            marks.append(zlib.crc32(jpeg or item.key.encode()) << 32 | len(jpeg))
            yield jpeg_picture_or_blank(jpeg)

    kept = likenesses(pictures())
    return kept, np.array(marks, np.uint64)
