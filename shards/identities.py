"""Face identities, `<identity>/<image>` (MS-Celeb-1M's layout): millions of images of thousands.

The list of images is kept as one byte string an identity, and shards mix the labels: a class of
this kind would be a shard of its own.
"""

import bisect
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import overload

from shards.release import Item, LeftOut, Release
from shards.source import entries, plain_name, read, safe_key, walk


class Images(Sequence[Item]):
    """The images of all identities, made when they are asked for: some 20 bytes each in memory."""

    def __init__(self) -> None:
        self.identities: list[str] = []
        self._files: list[bytes] = []  # of each identity, joined by the byte that no name holds
        self._starts = [0]

    def add(self, identity: str, files: list[str]) -> None:
        self.identities.append(identity)
        self._files.append(b"\0".join(os.fsencode(name) for name in files))
        self._starts.append(self._starts[-1] + len(files))

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
        key = f"{label:06d}_{k:05d}_{safe_key(Path(file).stem)}"
        return Item(key, label, f"{self.identities[label]}/{file}")


def release(source: str | Path) -> Release:
    """One training split of all identities, which are the classes, in the order of their names.

    Raises:
        FileNotFoundError: no such folder. ValueError: it holds no folders with images.
    """
    root, images = Path(source), Images()
    left_out = LeftOut(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} not found; expected {root}/<identity>/<images>")
    for folder in entries(root, root, left_out):
        if not folder.is_dir():
            continue
        content = entries(Path(folder.path), root, left_out)
        files = [entry.name for entry in content if entry.is_file()]
        for inner in (entry.path for entry in content if entry.is_dir()):
            if deeper := sum(1 for _ in walk(Path(inner), root, left_out)):
                left_out.add("deeper than an identity's folder", inner, images=deeper)
        if files:
            images.add(folder.name, files)
        else:
            left_out.add("an identity without images", folder.path)
    if not images.identities:
        raise ValueError(f"{root} holds no folders with images; expected <identity>/<images>")
    names = tuple(map(plain_name, images.identities))
    return Release(
        "identities", "<identity>/<images>", names, {"train": images},
        partial(read, root=root.absolute()), left_out, mixed=True,
    )  # fmt: skip
