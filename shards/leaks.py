"""Photographs of one split, or set, that another holds too, in whatever form.

The same bytes are found by `duplicates`; here are those that were saved anew, resized, cut by up
to 5 %, mirrored, made lighter or darker.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from shards.files import write_atomically
from shards.format import ShardSet, Split
from shards.images import decode
from shards.likeness import Likenesses, joined, likenesses, same_photographs
from shards.packing.pool import in_processes
from shards.release import Item, Read, Release
from shards.show import pair_sheet

ITEMS = 256  # of a release, that a process reads at once
NAMED, SHOWN = 3, 60  # pairs in a line, on a sheet
DRAFT = 48  # pixels: a JPEG is decoded at a half or a quarter of its size, but not below


class Leaks(NamedTuple):
    """The pairs of pictures of two splits that are one photograph."""

    names: tuple[str, str]  # of the splits, with the set's folder where there are two
    splits: tuple[Split, Split]
    samples: NDArray[np.int64]  # (N, 2)
    alike: NDArray[np.float32]  # (N,)

    def labels(self, pair: int) -> tuple[str, str]:
        """The names of both images' classes."""
        a, b = (s.class_names[int(s.index["label"][i])] for s, i in self._of(pair))
        return a, b

    def keys(self, pair: int) -> tuple[str, str]:
        """split/key of both images."""
        a, b = (
            f"{name}/{split.key(sample).split('/', 1)[-1]}"
            for name, (split, sample) in zip(self.names, self._of(pair), strict=True)
        )
        return a, b

    def _of(self, pair: int) -> list[tuple[Split, int]]:
        return [(s, int(i)) for s, i in zip(self.splits, self.samples[pair], strict=True)]


def find_leaks(shards: ShardSet, workers: int, against: ShardSet | None = None) -> list[Leaks]:
    """The leaks between the splits of a set, or between it and another one; drawn faces have none.

    Raises:
        OSError: a tar cannot be read.
    """
    if "synthetic" in (shards.dataset, against and against.dataset):
        return []  # they are alike without being copies
    own = {name: shards.split(name) for name in shards.splits}
    found = {name: of_split(split, workers) for name, split in own.items()}
    if against is None:
        return [
            _pairs((a, b), (own[a], own[b]), (found[a], found[b])) for a, b in combinations(own, 2)
        ]
    others = {f"{against.root}/{name}": against.split(name) for name in against.splits}
    leaks = []
    for other, split in others.items():
        theirs = of_split(split, workers)
        leaks += [_pairs((name, other), (own[name], split), (found[name], theirs)) for name in own]
    return leaks


def describe_leaks(found: Sequence[Leaks]) -> Iterator[str]:
    """A line on each two splits that share photographs: how many, by class, and the first ones."""
    for leaks in found:
        if not len(leaks.alike):
            continue
        a, b = leaks.names
        right = leaks.splits[1]
        images = np.unique(leaks.samples[:, 1])
        counts = np.bincount(right.index["label"][images], minlength=len(right.class_names))
        classes = ", ".join(
            f"{count} {name}"
            for name, count in zip(right.class_names, counts, strict=True)
            if count
        )
        torn = sum(len(set(leaks.labels(k))) > 1 for k in range(len(leaks.alike)))
        named = ", ".join(" = ".join(leaks.keys(k)) for k in range(min(NAMED, len(leaks.alike))))
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
            (a, b), (label_a, label_b) = leaks.keys(k), leaks.labels(k)
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


def without_leaks(release: Release, workers: int) -> Release:
    """A release without the training images that show a photograph of another split.

    They are counted among what is left out. All images of the release are read for it.

    Raises:
        ValueError: the release has no split 'train', or none beside it.
    """
    if "train" not in release.splits or len(release.splits) < 2:
        raise ValueError(f"{release.dataset}: --drop-leaks needs 'train' and another split, "
                         f"found {', '.join(release.splits)}")  # fmt: skip
    found = {name: _of_items(release.read, items, name, workers)
             for name, items in release.splits.items()}  # fmt: skip
    gone: dict[int, str] = {}
    for name, others in found.items():
        if name != "train":
            for k in same_photographs(found["train"], others).a.tolist():
                gone.setdefault(k, name)
    train = release.splits["train"]
    for k, name in sorted(gone.items()):
        release.left_out.add(f"shows a photograph of {name}", train[k].key)
    kept = [item for k, item in enumerate(train) if k not in gone]
    splits: Mapping[str, Sequence[Item]] = {**release.splits, "train": kept}
    return replace(release, splits=splits)


def _pairs(
    names: tuple[str, str], splits: tuple[Split, Split], found: tuple[Likenesses, Likenesses]
) -> Leaks:
    pairs = same_photographs(*found)
    return Leaks(names, splits, np.stack([pairs.a, pairs.b], 1), pairs.alike)


def of_split(split: Split, workers: int) -> Likenesses:
    """What is kept of all images of a split, in the order of the index."""
    rows = [np.flatnonzero(split.index["shard"] == k) for k in range(len(split.shards))]
    tasks = ((split.path(k), split.index[own]) for k, own in enumerate(rows))
    return _in_order(_of_shard, tasks, [len(own) for own in rows], split.name, workers)


def _of_items(read: Read, items: Sequence[Item], name: str, workers: int) -> Likenesses:
    """What is kept of a release's images; of one that cannot be read, an empty picture."""
    starts = range(0, len(items), ITEMS)
    tasks = ((read, list(items[k : k + ITEMS])) for k in starts)
    sizes = [min(ITEMS, len(items) - k) for k in starts]
    return _in_order(_read_items, tasks, sizes, name, workers)


def _in_order(
    function: Callable[..., Likenesses], tasks: Iterable[tuple[Any, ...]], sizes: list[int],
    name: str, workers: int,
) -> Likenesses:  # fmt: skip
    """What processes find, joined in the order of their tasks; sizes: pictures of each."""
    parts: dict[int, Likenesses] = {}
    bar = tqdm(desc=f"looking at {name}", total=sum(sizes), unit="img", leave=False, disable=None)
    with bar, in_processes(function, tasks, min(workers, len(sizes))) as finished:
        for number, part in finished:
            parts[number] = part
            bar.update(sizes[number])
    return joined([parts[k] for k in sorted(parts)])


def _of_shard(path: Path, rows: NDArray[np.void]) -> Likenesses:
    with path.open("rb") as file:

        def pictures() -> Iterator[Image.Image]:
            for row in rows:
                file.seek(int(row["offset"]))
                picture = Image.open(io.BytesIO(file.read(int(row["size"]))))
                picture.draft("L", (DRAFT, DRAFT))
                yield picture

        return likenesses(pictures())


def _read_items(read: Read, items: list[Item]) -> Likenesses:
    def pictures() -> Iterator[Image.Image]:
        for item in items:
            try:
                image = read(item).image
                yield decode(image) if isinstance(image, bytes) else image
            except ValueError:  # packing names it
                yield Image.new("L", (1, 1))

    return likenesses(pictures())
