"""Images that stand in a set more than once, byte for byte, and groups of images.

`duplicate_groups` and `join_groups` are the place where images of one index are found to belong
together; whoever keeps such images on one side of a cut needs nothing else.
"""

import hashlib
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.format import ShardSet, Split

NAMED = 3  # pairs named in a line


class _Image(NamedTuple):
    """An image of which there is another."""

    split: Split
    sample: int

    @property
    def label(self) -> str:
        return self.split.class_of(self.sample)

    @property
    def name(self) -> str:
        return self.split.name_of(self.sample)


def duplicate_groups(index: NDArray[Any]) -> NDArray[np.int64]:
    """A number for each image of an index, the same for images of one size and checksum."""
    marks = index["crc32"].astype(np.uint64) << np.uint64(32) | index["size"].astype(np.uint64)
    groups: NDArray[np.int64] = np.unique(marks, return_inverse=True)[1]
    return groups


def join_groups(
    groups: Sequence[NDArray[Any]], pairs: Sequence[NDArray[np.int64]] = ()
) -> NDArray[np.int64]:
    """One number for images that belong together by any of several groupings, be it over others.

    groups: of each grouping, a number or name for each image. The joined groups stand in the order
    of the first grouping's. pairs: places of two images that belong together, in two arrays.
    """
    from scipy.sparse import coo_array  # takes a second to import, which few trainings need
    from scipy.sparse.csgraph import connected_components

    numbers = [np.unique(own, return_inverse=True)[1] for own in groups]
    size = len(numbers[0])
    # The parts of a graph of images, and of the groups that each of them is in
    one, other = pairs or (np.empty(0, np.int64),) * 2
    one = np.concatenate([one, *[np.arange(size)] * len(numbers)])
    other = np.concatenate([other, *(own + (k + 1) * size for k, own in enumerate(numbers))])
    graph = coo_array((np.ones(len(one)), (one, other)), ((len(numbers) + 1) * size,) * 2)
    parts = connected_components(graph, directed=False)[1][:size]
    first = np.full(parts.max(initial=0) + 1, size, np.int64)
    np.minimum.at(first, parts, numbers[0])
    joined: NDArray[np.int64] = first[parts]
    return joined


def describe_duplicates(shards: ShardSet) -> list[str]:
    """A line on each two splits that share images, each split that repeats some, and labels.

    Raises:
        OSError, ValueError: a tar cannot be read, or is not what its index describes.
    """
    groups = _equal_images(shards)
    lines = []
    for a, b in combinations(shards.splits, 2):
        own = [[[i for i in g if i.split.name == name] for name in (a, b)] for g in groups]
        both = [(left, right) for left, right in own if left and right]
        if count := sum(len(right) for _, right in both):
            total = sum(shards.counts[b])
            pairs = [(left[0], right[0]) for left, right in both]
            lines.append(f"duplicates, {b} and {a}: {count} of the {total} images of {b} are also "
                         f"in {a} ({_named(pairs)})")  # fmt: skip
    for name in shards.splits:
        inside = [[i for i in group if i.split.name == name] for group in groups]
        repeated = [own for own in inside if len(own) > 1]
        if count := sum(len(own) - 1 for own in repeated):
            pairs = [(own[0], own[1]) for own in repeated]
            lines.append(f"duplicates, {name}: {count} beside the first of each image "
                         f"({_named(pairs)})")  # fmt: skip
    torn = [group for group in groups if len({image.label for image in group}) > 1]
    if torn:
        pairs = [(g[0], next(i for i in g if i.label != g[0].label)) for g in torn]
        lines.append(f"duplicates, labels: {len(torn)} with more than one label "
                     f"({_named(pairs, labels=True)})")  # fmt: skip
    return lines


def _named(pairs: Sequence[tuple[_Image, _Image]], *, labels: bool = False) -> str:
    """The first pairs by name, and the number of the others."""
    texts = [
        " = ".join(f"{i.name} ({i.label})" if labels else i.name for i in pair)
        for pair in pairs[:NAMED]
    ]
    rest = f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
    return ", ".join(texts) + rest


def _equal_images(shards: ShardSet) -> list[list[_Image]]:
    """The images of a set that have equals, in groups; checksums find them, their bytes decide."""
    splits = [shards.split(name) for name in shards.splits]
    owner = np.repeat(np.arange(len(splits)), [*map(len, splits)])
    numbers = np.concatenate([np.arange(len(split)) for split in splits])
    marks = duplicate_groups(np.concatenate([np.asarray(split.index) for split in splits]))
    found: dict[bytes, list[_Image]] = {}
    for k in np.flatnonzero(np.bincount(marks)[marks] > 1).tolist():
        image = _Image(splits[owner[k]], int(numbers[k]))
        found.setdefault(_digest(image), []).append(image)
    return [group for group in found.values() if len(group) > 1]


def _digest(image: _Image) -> bytes:
    return hashlib.blake2b(image.split.encoded(image.sample), digest_size=16).digest()
