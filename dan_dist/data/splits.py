"""The splits of a training: what it learns from, what chooses its best epoch, what judges it."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from dan_dist.data.holdout import HELD_OUT, hold_out
from dan_dist.data_schema import Data
from shards.format import ShardSet, Split

log = logging.getLogger(__name__)


class Splits(NamedTuple):
    """The images of a training; no two of these hold the same ones."""

    train: Split
    val: Split  # chooses the best epoch
    test: Split | None  # looked at once, after training


def open_splits(shards: ShardSet, data: Data, seed: int) -> Splits:
    """Opens the splits that a configuration names, without reading an image.

    Raises:
        ValueError, FileNotFoundError: a split is not there, or a class is left without an image.
    """
    train = shards.split("train")
    test = None if data.test_split is None else shards.split(data.test_split)
    if data.fold is not None:
        part, parts = map(int, data.fold.split("/"))
        shares = [1 / parts] * parts
        return Splits(*hold_out(shards, train, shares, part - 1, seed, "data.fold"), test)
    if data.holdout is not None:
        shares = [data.holdout, 1 - data.holdout]
        return Splits(*hold_out(shards, train, shares, 0, seed, "data.holdout"), test)
    return Splits(train, shards.split(data.val_split), test)


def selected_on(data: Mapping[str, Any]) -> str:
    """What chose a run's best epoch: holdout, val or test.

    data: the section of a configuration, as a checkpoint holds it; an earlier version's lacks keys.
    """
    if data.get("holdout") is not None or data.get("fold") is not None:
        return HELD_OUT
    is_test = data.get("protocol") == "paper" or data["val_split"] == "test"
    return "test" if is_test else "val"


def log_selection(data: Data, select: str, val: Split) -> None:
    """A line on what chooses the best epoch, where that is not simply the split `val`."""
    if (chosen_on := selected_on(data.model_dump())) == "test":
        log.info(
            "protocol: the best epoch is chosen on the test split '%s', as in the paper; such a "
            "result is too good: data.holdout and data.test_split keep the two apart",
            data.val_split,
        )  # fmt: skip
    elif chosen_on == HELD_OUT or data.test_split is not None:
        where = "held-out training images" if chosen_on == HELD_OUT else f"split '{val.name}'"
        once = f"; split '{data.test_split}' is looked at once, after training"
        log.info(
            "selection: by %s on %s%s", select.replace("_", " "), where,
            once if data.test_split is not None else "",
        )  # fmt: skip
