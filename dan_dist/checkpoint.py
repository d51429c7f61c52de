"""Checkpoints: whole or absent, and refused by name where they belong to something else."""

import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

FORMAT = "dan_dist checkpoint, version 1"
BEST = "best.pt"
_STEP = re.compile(r"step-(\d+)\.pt")

# Keys of the configuration that may change when a run goes on: they say how long, where and how
# quickly it computes, not what.
FREE_KEYS = (
    "data.shards", "data.synthetic", "data.threads", "data.max_bad_images", "data.classes",
    "train.epochs", "train.max_steps", "train.device", "train.compile", "train.output",
    "train.resume", "train.keep_checkpoints", "train.checkpoint_every", "train.log_every",
    "train.timeout_s", "tracking.", "model.backbone",
)  # fmt: skip


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a checkpoint under a temporary name, flushes it to disk, renames it."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU; only tensors and plain values, no code is run.

    Raises:
        ValueError: not one of our checkpoints, or damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling garbage raises nearly anything
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this project, expected '{FORMAT}'")
    return content


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimiser steps lies."""
    return folder / f"step-{step:08d}.pt"


def steps_saved(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    names = [p for p in folder.glob("step-*.pt") if _STEP.fullmatch(p.name)]
    return sorted(names, reverse=True)


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints; the best one is another file and stays."""
    for path in steps_saved(folder)[keep:]:
        path.unlink()


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that can be read; damaged ones are named and passed over."""
    for path in steps_saved(folder):
        try:
            return path, load(path)
        except ValueError as error:
            log.warning("%s; trying the one before", error)
    return None


def check_continues(
    path: Path, saved: Mapping[str, Any], config: Mapping[str, Any], *, same_data: bool
) -> None:
    """Refuses a checkpoint of another data set or another (flattened) configuration.

    Raises:
        ValueError: names the first difference and the way on.
    """
    if not same_data:
        raise ValueError(
            f"{path} was trained on other images than data.shards holds; give another train.output"
        )
    for key in sorted({*saved, *config}):
        if not key.startswith(FREE_KEYS) and saved.get(key) != config.get(key):
            raise ValueError(
                f"{path} is of another configuration: {key} was {saved.get(key)!r}, "
                f"is {config.get(key)!r}; give another train.output"
            )


def check_writable(folder: Path) -> None:
    """Creates `folder`, and a file in it that goes at once.

    Raises:
        OSError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"train.output {folder} cannot be written: {error.strerror}") from error
