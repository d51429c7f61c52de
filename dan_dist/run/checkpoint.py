"""The file of a checkpoint: tensors and plain values, written whole, read without running code."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from dan_dist.run import pickled
from dan_dist.run.plain import (
    Other,
    dotted,
    entries_of,
    is_count,
    leaves,
    part_of,
    plain_copy,
    refuse_not_finite,
    refuse_odd,
)
from dan_dist.run.state import TrainState
from shards.command import escape, is_printable, words
from shards.cut import parse_cut
from shards.files import read_regular, replacing

FORMAT = "dan_dist checkpoint, version 1"
BEST = "best.pt"
NETWORK = "network."  # what the names of the network's tensors begin with, among the objective's
KEYS = ("step", "config", "fingerprint", "class_names", "objective", "best", "metrics")
RESUMED = (*KEYS, "optimizer", "run_id", "evaluated", "replaced", "replaced_since",
           "figures")  # fmt: skip


_STATE = TypeAdapter(TrainState)


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
    """What torch or safetensors has saved in a file, onto the CPU; no code in it is run.

    Dicts, lists, tuples, tensors and plain values, in bounds (`run.pickled`, `run.plain`); of a
    list or tuple of dicts, each by its number as a text.

    Raises:
        ValueError: damaged, or not a dict of such. OSError: it cannot be read.
    """
    content: Any
    try:
        if _is_safetensors(path):
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = pickled.load(path)
        if isinstance(content, list | tuple):  # as of torch.save((state, epoch), …)
            content = entries_of(content) or content
        if isinstance(content, dict):
            content = plain_copy(content, path.stat().st_size)
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # unpickling garbage raises nearly anything
        reason = str(error).split("\n")[0] or "it is empty or cut off"
        if isinstance(error, pickle.UnpicklingError):  # torch's text is on how to run it after all
            reason = "it is cut off, or holds more than tensors and plain values"
            reason += pickled.unknown_names(path)
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not tensors by name")
    return content


def is_ours(content: Mapping[str, Any]) -> bool:
    """Whether what `read` gives is a checkpoint of ours."""
    found = content.get("format")
    return isinstance(found, str) and found == FORMAT


def load(path: Path, *, keys: tuple[str, ...] = KEYS) -> dict[str, Any]:
    """Reads a checkpoint of ours.

    Raises:
        ValueError, OSError: as `read`, or it lacks one of `keys`. ForeignError: not one of ours.
    """
    content = read(path)
    if not is_ours(content):
        raise ForeignError(f"{path}: not a checkpoint of this project, expected '{FORMAT}'")
    check(path, content, keys)
    return content


def check(path: Path, content: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Refuses a checkpoint of ours, wherever it comes from, that no training of ours has written.

    Types, tensors that are dense and whole, weights that are finite, names that are printable.

    Raises:
        ValueError: names the file, the value and the expectation; or it lacks one of `keys`.
    """
    try:
        if missing := [key for key in keys if key not in content]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        _check_kinds(content)
        seen: set[tuple[Any, int]] = set()  # a few bytes can give one tensor a million names
        for place, value in leaves(content):
            part = part_of(place)
            is_weight = part in ("objective", "average")
            if not (is_weight or isinstance(value, Tensor)) or (part, id(value)) in seen:
                continue
            seen.add((part, id(value)))
            name = dotted(place)
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} is {_short(value)}, expected a tensor")
            if part in ("config", "class_names"):
                raise ValueError(f"{name} is a tensor, expected a plain value")
            refuse_odd(name, value)
            if is_weight:
                refuse_not_finite(name, value)
    except ValueError as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error})") from error


def _check_kinds(content: Mapping[str, Any]) -> None:
    """The kinds of the values that a checkpoint of ours may hold, where it holds them."""
    for keys, kind in ((("config", "objective", "average", "optimizer", "scaler"), dict),
                       (("class_names", "sets"), list), (("fingerprint",), str)):  # fmt: skip
        for key in keys:
            if key in content and not isinstance(content[key], kind):
                raise ValueError(f"{key} is {_short(content[key])}, expected a {kind.__name__}")
    for part in ("objective", "average"):
        if odd := [key for key in content.get(part, ()) if not isinstance(key, str)]:
            raise ValueError(f"{part} holds {_short(odd[0])}, expected names of tensors")
    for key in ("class_names", "sets"):
        for name in content.get(key, ()):
            if not isinstance(name, str) or not is_printable(name):
                raise ValueError(f"{key} holds {_short(name)}, expected printable names")
    for key in ("step", "evaluated", "replaced", "replaced_since"):
        if key in content and not is_count(content[key]) and (
            content[key] is not None or key in ("step", "replaced")
        ):  # fmt: skip
            raise ValueError(f"{key} is {_short(content[key])}, expected a whole number")
    if (face_cut := content.get("face_cut")) is not None:
        try:
            parse_cut(face_cut)
        except ValueError as error:
            raise ValueError(f"face_cut is {error}") from error
    run_id = content.get("run_id")
    if not (run_id is None or (isinstance(run_id, str) and is_printable(run_id))):
        raise ValueError(f"run_id is {_short(run_id)}, expected a name")
    try:
        _STATE.validate_python(TrainState.from_checkpoint(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where} is {_short(first['input'])}: {first['msg']}") from error


def _short(value: Any) -> str:
    """A value from a file in a line: numbers and texts as they are, others by their kind."""
    if value is None or isinstance(value, bool | int | float | Other):
        return repr(value)
    if isinstance(value, str):
        return f"'{escape(value[:80])}'"
    return f"a {type(value).__name__}"


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors' do: eight bytes for the length of its JSON."""
    head = read_regular(path, 9, cut=True)  # a pipe would be waited for
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


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
