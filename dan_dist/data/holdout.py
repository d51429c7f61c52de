"""Training images that are held out of training, so that the best epoch is chosen on them.

A function of the index, the shares and the seed alone: the same at every number of ranks and after
every resume. Each class gives its share; images of one group stay on one side.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dan_dist.data.mixture import JoinedSet, JoinedSplit, bounds_of, groups_of
from shards.duplicates import duplicate_groups, join_groups
from shards.format import DRAWN, ShardSet, Split
from shards.index import recorded_groups
from shards.releases.sfew import film_of

HELD_OUT = "holdout"  # the name of the split that is held out
RELEASE_GROUPS = {"SFEW 2.0": film_of}  # data set → an image's group by its key
log = logging.getLogger(__name__)

STREAM = (1 << 63) + 1  # second Philox key word: apart from those of `sampler`


def hold_out(
    shards: ShardSet, split: Split, shares: Sequence[float], part: int, seed: int, option: str
) -> tuple[Split, Split]:
    """A training split without the images of part number `part`, and these.

    shares: of each part, together 1. option: the key that asks for it, for errors.

    Raises:
        ValueError: a class is left without an image on one side.
    """
    _log_unlooked(shards, split)
    is_held = deal(groups_of(split), image_groups(shards, split), shares, seed) == part
    labels = split.index["label"]
    for side, own in (("to train on", ~is_held), ("held out", is_held)):
        if len(gone := np.setdiff1d(labels, labels[own])):
            count = int((labels == gone[0]).sum())
            raise ValueError(
                f"{split.root}: {option} leaves class '{split.class_names[gone[0]]}', of which "
                f"there are {count} training images, without an image {side}"
            )
    kept, held = (take(split, np.flatnonzero(own)) for own in (~is_held, is_held))
    return kept, replace(held, name=HELD_OUT)


def deal(
    classes: NDArray[Any], groups: NDArray[Any], shares: Sequence[float], seed: int
) -> NDArray[np.int64]:
    """The part of each image: each part gets its share of every class, rounded to whole images.

    Groups of several images are dealt first, the largest first, each to the part that lacks the
    most images of its classes; the images without a group then fill what is left.
    """
    classes, groups = (np.unique(v, return_inverse=True)[1] for v in (classes, groups))
    counts, sizes = np.bincount(classes), np.bincount(groups)
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, STREAM], np.uint64)))
    drawn = rng.permutation(len(classes))
    ends = np.rint(np.cumsum(shares)[:, None] * counts)
    lacking = np.diff(ends, axis=0, prepend=0)  # (parts, classes)
    parts = np.empty(len(classes), np.int64)
    several = drawn[sizes[groups[drawn]] > 1]
    order = np.lexsort((groups[several], -sizes[groups[several]]))
    runs = np.split(several[order], np.flatnonzero(np.diff(groups[several][order])) + 1)
    for own in filter(len, runs):  # without groups, the one run is empty
        kinds = np.bincount(classes[own], minlength=len(counts))
        parts[own] = part = (lacking @ kinds).argmax()
        lacking[part] -= kinds
    single = drawn[sizes[groups[drawn]] == 1]
    for k in range(len(counts)):
        members = single[classes[single] == k]
        wanted = np.maximum(lacking[:, k], 0).astype(np.int64)
        while wanted.sum() > len(members):  # a part has more of its groups than its share
            wanted[wanted.argmax()] -= 1
        parts[members] = np.repeat(np.arange(len(wanted)), wanted)
    return parts


def image_groups(shards: ShardSet, split: Split) -> NDArray[np.int64]:
    """The group of each image: those of equal bytes, those of which the pack found that they show
    one photograph, and those of one film where the release has any.
    """
    groups: list[NDArray[Any]] = [duplicate_groups(split.index)]
    parts = _parts(shards)
    if split.shards and any(part.dataset in RELEASE_GROUPS for part in parts):
        keys, names = [*split.keys()], list[str]()
        for number, (part, own) in enumerate(zip(parts, bounds_of(split), strict=True)):
            group_of = RELEASE_GROUPS.get(part.dataset)
            names += [
                f"{number} {group_of(keys[k])}" if group_of else f"{number} alone {k}"
                for k in range(own.start, own.stop)
            ]
        groups.insert(0, np.array(names))  # in whose order they are dealt
    if (recorded := recorded_groups(split.index)) is not None:
        groups.append(recorded)
    return join_groups(groups)


def _parts(shards: ShardSet) -> list[ShardSet]:
    return [part.shards for part in shards.parts] if isinstance(shards, JoinedSet) else [shards]


def _log_unlooked(shards: ShardSet, split: Split) -> None:
    """A line on each set in which nobody has looked for copies that were saved anew."""
    for part in _parts(shards):
        own = split if part is shards else part.split(split.name)
        if own.shards and recorded_groups(own.index) is None and part.dataset != DRAWN:
            log.warning(
                "%s: its pack recorded no groups of one photograph; of such images, only those of "
                "the same bytes are held out together; python -m shards.pack … --overwrite records "
                "them", part.root,
            )  # fmt: skip


def take(split: Split, samples: NDArray[np.intp]) -> Split:
    """A split of some of another's samples, in order."""
    own = replace(split, index=np.asarray(split.index)[samples])
    if isinstance(own, JoinedSplit):
        return replace(own, ends=tuple(np.searchsorted(samples, own.ends).tolist()))
    return own
