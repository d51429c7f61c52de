"""The tasks of a training, expressions and identities: classes, validation images, judge."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dan_dist.data.mixture import JoinedSplit, bounds_of
from dan_dist.data.splits import open_splits
from dan_dist.data_schema import Data
from dan_dist.evaluation.judge import (
    EvaluationResult,
    Rows,
    judge_classes,
    judge_pairs,
    judge_sets,
)
from dan_dist.evaluation.verification import FAR, Pairs, draw_pairs, read_pairs
from dan_dist.model.dan import Output, features, probabilities
from shards.format import ShardSet, Split

log = logging.getLogger(__name__)


class Task(NamedTuple):
    """All that a training knows of its task, beside the objective."""

    classes: int  # of the network: the first ones of the shards
    images: Split  # that its evaluations look at
    select: Callable[[Output], Tensor]  # see `engine.evaluate`
    judge: Callable[[Rows], EvaluationResult]
    chance: float  # the accuracy of guessing
    is_backbone: bool  # a finished run leaves a backbone file, not a model in MLflow


def open_tasks(
    shards: ShardSet, data: Data, seed: int, *, is_identity: bool
) -> tuple[Split, Task, Task | None]:
    """The images to train on, the task on those that choose the best epoch, and on the test split.

    Splits that are not there, or cannot judge the task, are a ValueError that names the reason.
    """
    if is_identity:
        train = shards.split("train")
        task = identities(
            shards, train, data.val_split, pairs=data.pairs, pairs_file=data.pairs_file
        )
        return train, task, None
    train, val, test = open_splits(shards, data, seed)
    judged = None if test is None else expressions(shards, train, test)
    return train, expressions(shards, train, val), judged


def expressions(shards: ShardSet, train: Split, val: Split) -> Task:
    """Each image's class. A split that cannot judge it is a ValueError that names the reason."""
    classes = len(shards.class_names)
    if any(own.start == own.stop for own in bounds_of(val)):  # of any set
        raise ValueError(f"{shards.root}: split '{val.name}' is empty")
    if len(untrained := np.setdiff1d(np.arange(classes), _present(train))):
        names = ", ".join(shards.class_names[k] for k in untrained)
        log.warning("%s: no training images of %s", shards.root, names)
    unknown = np.setdiff1d(_present(val), _present(train))
    if len(unknown):
        raise ValueError(
            f"{shards.root}: '{shards.class_names[unknown[0]]}' of split '{val.name}' has no "
            "training images; task=identity is judged by persons whom training does not know"
        )
    title = title_of(shards, val)
    judge = partial(judge_classes, split=val, title=title)
    if isinstance(val, JoinedSplit):
        judge = partial(judge_sets, split=val, title=title)
    return Task(classes, val, probabilities, judge, 1 / classes, False)


def identities(
    shards: ShardSet, train: Split, val_split: str, *, pairs: int, pairs_file: str | None
) -> Task:
    """The person of an image; judged by pairs of images of persons whom training does not know.

    pairs, pairs_file: how many are drawn, or the file that lists them.
    """
    if val_split not in shards.splits:
        raise ValueError(
            f"{shards.root}: no split '{val_split}' of identities that are held out of training; "
            "python -m shards.pack identities --held-out N makes one"
        )
    val = shards.split(val_split)
    trained = _present(train)
    both = np.intersect1d(trained, _present(val))
    if len(both):
        raise ValueError(
            f"{shards.root}: {len(both)} identities of split '{val_split}' are in training as "
            f"well, '{shards.class_names[both[0]]}' for one"
        )
    own, chosen = pairs_of(val, pairs=pairs, pairs_file=pairs_file)
    classes = int(trained[-1]) + 1
    judge = partial(judge_pairs, pairs=chosen, title=title_of(shards, val))
    return Task(classes, own, features, judge, 0.5, True)


def title_of(shards: ShardSet, split: Split) -> str:
    """The images of an evaluation, in the titles of its figures."""
    return f"{shards.dataset}, split '{split.name}'"


def _present(split: Split) -> NDArray[np.intp]:
    """The labels that images of a split have, in order: counted, as sorting them takes longer."""
    return np.flatnonzero(np.bincount(split.index["label"]))


def pairs_of(split: Split, *, pairs: int, pairs_file: str | None) -> tuple[Split, Pairs]:
    """The images of a split that are in pairs, as a split of its own, and the pairs in it."""
    if pairs_file is not None:
        found = read_pairs(Path(pairs_file), split)
    else:
        try:
            found = draw_pairs(split.index["label"], pairs)
        except ValueError as error:
            raise ValueError(f"{split.root}: split '{split.name}': {error}") from error
    ids = np.union1d(found.first, found.second)
    own = replace(split, index=split.index[ids])
    persons = len(_present(own))
    log.info("judged by %d pairs of %d images of %d persons", len(found.same), len(ids), persons)
    if (impostors := int((~found.same).sum())) < 1 / FAR:
        log.warning("%d pairs are of two persons: of fewer than %.0f, a false accept rate of %g is "
                    "none at all", impostors, 1 / FAR, FAR)  # fmt: skip
    first, second = (np.searchsorted(ids, samples) for samples in (found.first, found.second))
    return own, found._replace(first=first, second=second)
