"""The file of a checkpoint: tensors and plain values, written whole, read without running code."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.command import words
from shards.files import replacing

FORMAT = "dan_dist checkpoint, version 1"
BEST = "best.pt"
NETWORK = "network."  # what the names of the network's tensors begin with, among the objective's
KEYS = ("step", "config", "fingerprint", "class_names", "objective", "best", "metrics")
RESUMED = (*KEYS, "optimizer", "run_id", "evaluated", "replaced", "replaced_since",
           "figures")  # fmt: skip


class ForeignError(ValueError):
    """A whole file, but not one of our checkpoints."""


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` as a file of torch's, which is whole or absent (`shards.files.replacing`).

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's writer makes one of a full disk's
            raise disk_error(error, path) from error


def disk_error(error: Exception, path: Path) -> OSError:
    """The error of the disk from which one of torch's writers followed."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return OSError(f"{path} cannot be written: {words(error)}")
    return OSError(cause.errno, cause.strerror, str(path))


def read(path: Path) -> dict[str, Any]:
    """What torch has saved in a file, onto the CPU; only tensors and plain values, no code is run.

    Raises:
        ValueError: damaged, or not a dict of such. OSError: it cannot be read.
    """
    try:
        # torch writes a checksum of every part, but does not look at them.
        if zipfile.is_zipfile(path):  # files of torch before 1.6, which others may hold, are none
            with zipfile.ZipFile(path) as parts:
                if (damaged := parts.testzip()) is not None:
                    raise ValueError(f"{damaged} does not have its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # unpickling garbage raises nearly anything
        reason = str(error).split("\n")[0] or "it is empty or cut off"
        if isinstance(error, pickle.UnpicklingError):  # torch's text is on how to run it after all
            reason = "it is cut off, or holds more than tensors and plain values"
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not tensors by name")
    return content


def load(path: Path, *, keys: tuple[str, ...] = KEYS) -> dict[str, Any]:
    """Reads a checkpoint of ours.

    Raises:
        ValueError, OSError: as `read`, or it lacks one of `keys`. ForeignError: not one of ours.
    """
    content = read(path)
    if content.get("format") != FORMAT:
        raise ForeignError(f"{path}: not a checkpoint of this project, expected '{FORMAT}'")
    if missing := [key for key in keys if key not in content]:
        raise ValueError(f"{path}: not a readable checkpoint (it lacks {', '.join(missing)})")
    return content


def learned(content: Mapping[str, Any], *, average: bool = True) -> dict[str, Any]:
    """The objective's tensors by name; with the average of the weights where one was kept."""
    own: dict[str, Any] = content["objective"]
    return own | content["average"] if average and "average" in content else own


def to_cpu(value: Any) -> Any:
    """A copy in the CPU's memory of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_cpu(item) for item in value)
    return value
