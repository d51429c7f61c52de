"""Face identities, `<identity>/<image>` (MS-Celeb-1M's layout): millions of images of thousands.

Some identities are held out of training, as the split "val", by whose pairs a network is judged;
their labels follow those of the others. The list of images is kept as one byte string an identity,
and shards mix the labels: a class of this kind would be a shard of its own.
"""

import bisect
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import overload

import numpy as np

from shards.folders import is_file, is_folder, is_picture
from shards.release import Item, LeftOut, Release
from shards.releases.source import (
    Source,
    entries,
    open_source,
    plain_name,
    read,
    safe_key,
    walk,
)

HELD_OUT_SEED = 0
HELD_OUT_SHARE, HELD_OUT_MOST = 10, 1000  # by default one identity in ten, at most a thousand …
HELD_OUT_LEAST = 20  # … and as many as verification needs, where as many are left for training


class Images(Sequence[Item]):
    """The images of some identities, made when they are asked for: some 20 bytes each in memory.

    first_label: of the first identity; those of the others follow.
    """

    def __init__(self, first_label: int = 0) -> None:
        self.identities: list[str] = []
        self._first_label = first_label
        self._files: list[bytes] = []  # of each identity, joined by the byte that no name holds
        self._starts = [0]

    def add(self, identity: str, files: list[str]) -> None:
        self._add(identity, b"\0".join(os.fsencode(name) for name in files), len(files))

    def hold_out(self, held_out: int) -> tuple["Images", "Images"]:
        """The images without those of `held_out` identities, drawn by a seed, and those."""
        count = len(self.identities)
        drawn = np.random.Generator(np.random.Philox(HELD_OUT_SEED)).permutation(count)[:held_out]
        is_held = np.zeros(count, bool)
        is_held[drawn] = True
        rest, held = Images(), Images(count - held_out)
        for k, name in enumerate(self.identities):
            size = self._starts[k + 1] - self._starts[k]
            (held if is_held[k] else rest)._add(name, self._files[k], size)
        return rest, held

    def _add(self, identity: str, files: bytes, count: int) -> None:
        self.identities.append(identity)
        self._files.append(files)
        self._starts.append(self._starts[-1] + count)

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[Item]:
        for label in range(len(self.identities)):
            files = self._files[label].split(b"\0")
            yield from (self._item(label, k, name) for k, name in enumerate(files))

    @overload
    def __getitem__(self, at: int) -> Item: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Item]: ...
    def __getitem__(self, at: int | slice) -> Item | Sequence[Item]:
        if isinstance(at, slice):
            return [self[k] for k in range(*at.indices(len(self)))]
        if not 0 <= at < len(self):
            raise IndexError(at)
        label = bisect.bisect_right(self._starts, at) - 1
        k = at - self._starts[label]
        return self._item(label, k, self._files[label].split(b"\0")[k])

    def _item(self, label: int, k: int, name: bytes) -> Item:
        file = os.fsdecode(name)
        number = self._first_label + label
        key = f"{number:06d}_{k:05d}_{safe_key(Path(file).stem)}"
        return Item(key, number, f"{self.identities[label]}/{file}")


def release(source: str | Path | Source, held_out: int | None = None) -> Release:
    """All identities, which are the classes: first those of the split "train", then those of "val".

    Both stand in the order of their names. held_out: identities of "val"; without any there is no
    such split. None: a tenth of all, at least 20 and at most 1,000; none of fewer than 40.
    """
    source, images = open_source(source), Images()
    root, left_out = source.root, LeftOut(source.root)
    for folder in entries(root, source, left_out):
        if not folder.is_dir():
            continue
        content = entries(Path(folder.path), source, left_out)
        files = [
            entry.name for entry in content
            if is_file(entry) and is_picture(entry, left_out.passed_over)
        ]  # fmt: skip
        for inner in (entry.path for entry in content if is_folder(entry)):
            if deeper := sum(1 for _ in walk(Path(inner), source, left_out)):
                left_out.add("deeper than an identity's folder", inner, images=deeper)
        if files:
            images.add(folder.name, files)
        else:
            left_out.add("an identity without images", folder.path)
    if not images.identities:
        raise ValueError(f"{root} holds no folders with images; expected <identity>/<images>")
    count = len(images.identities)
    if held_out is None:
        tenth = min(max(count // HELD_OUT_SHARE, HELD_OUT_LEAST), HELD_OUT_MOST)
        held_out = tenth if count >= 2 * HELD_OUT_LEAST else 0
    if not 0 <= held_out < count:
        raise ValueError(f"--held-out {held_out}: {root} holds {count} identities")
    train, val = images.hold_out(held_out)
    return Release(
        "identities", "<identity>/<images>",
        tuple(map(plain_name, [*train.identities, *val.identities])),
        {"train": train, "val": val} if held_out else {"train": train},
        partial(read, source=source.absolute()), left_out, mixed=True,
    )  # fmt: skip
