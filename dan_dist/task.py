"""What is learned and how it is judged: a value that training takes. Expressions, or identities."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from dan_dist.engine import features, probabilities
from dan_dist.figures import confusion_figure, verification_figure
from dan_dist.metrics import confusion, summarise
from dan_dist.model import Output
from dan_dist.shardset import ShardSet, Split
from dan_dist.verification import Pairs, draw_pairs, read_pairs, similarities, verify

Kept = NDArray[np.float32]  # (images, D): what an evaluation keeps of the network's output


class Verdict(NamedTuple):
    """What an evaluation says of a network."""

    metrics: dict[str, float]  # "accuracy" chooses the best
    right: NDArray[np.bool_]  # of each image, or pair
    figure: tuple[str, Callable[..., Figure], tuple[Any, ...]]  # name, what draws it, of what


class Task(NamedTuple):
    """One of the two."""

    classes: int  # of the network: the first ones of the shards
    val: Split  # the images that are looked at in an evaluation
    keep: Callable[[Output], Tensor]  # see `engine.evaluate`
    judge: Callable[[Kept], Verdict]
    chance: float  # the accuracy of guessing
    is_backbone: bool  # a finished run leaves a backbone file, not a model in MLflow


def expressions(shards: ShardSet, val_split: str) -> Task:
    """Each image's class."""
    val, classes = shards.split(val_split), len(shards.class_names)
    if not len(val):
        raise ValueError(f"{shards.root}: split '{val_split}' is empty")
    return Task(classes, val, probabilities, partial(_expressions_told, val), 1 / classes, False)


def _expressions_told(val: Split, kept: Kept) -> Verdict:
    labels = val.index["label"]
    matrix = confusion(kept, labels)
    return Verdict(
        summarise(matrix, val.class_names),
        kept.argmax(axis=1) == labels,
        ("confusion_matrix.png", confusion_figure, (matrix, val.class_names)),
    )


def identities(shards: ShardSet, val_split: str, *, pairs: int, pairs_file: str | None) -> Task:
    """Who an image shows; judged by pairs of images of persons that training does not know.

    pairs, pairs_file: how many are drawn, or the file that lists them.

    Raises:
        FileNotFoundError, ValueError: no such split or file, a person of it is in training as well,
            or no such pairs.
    """
    trained = np.flatnonzero(shards.counts["train"])
    if val_split not in shards.splits:
        raise ValueError(
            f"{shards.root}: no split '{val_split}' of identities that are held out of training; "
            "python -m shards.pack identities makes one, unless --held-out is 0"
        )
    both = np.intersect1d(trained, np.flatnonzero(shards.counts[val_split]))
    if len(both):
        raise ValueError(
            f"{shards.root}: {len(both)} identities of split '{val_split}' are in training as "
            f"well, '{shards.class_names[both[0]]}' for one"
        )
    val, chosen = pairs_of(shards.split(val_split), pairs=pairs, pairs_file=pairs_file)
    judge = partial(_pairs_told, chosen)
    return Task(int(trained[-1]) + 1, val, features, judge, 0.5, True)


def pairs_of(split: Split, *, pairs: int, pairs_file: str | None) -> tuple[Split, Pairs]:
    """The images of a split that are in pairs, as a split of its own, and the pairs in it.

    Raises:
        as `read_pairs` and `draw_pairs`.
    """
    if pairs_file is not None:
        found = read_pairs(Path(pairs_file), split)
    else:
        try:
            found = draw_pairs(split.index["label"], pairs)
        except ValueError as error:
            raise ValueError(f"{split.root}: split '{split.name}': {error}") from error
    ids = np.union1d(found.first, found.second)
    first, second = (np.searchsorted(ids, own) for own in (found.first, found.second))
    own = replace(split, index=split.index[ids])
    return own, found._replace(first=first, second=second)


def _pairs_told(pairs: Pairs, kept: Kept) -> Verdict:
    similarity = similarities(kept, pairs)
    found = verify(similarity, pairs)
    return Verdict(
        found.metrics, found.right, ("roc.png", verification_figure, (found, similarity, pairs))
    )
