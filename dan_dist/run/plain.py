"""Values from files that may come from anywhere: bounded, plain, printable, or refused by name."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from shards.command import escape

MOST_VALUES = 4_000_000  # a checkpoint of a million identities holds as many names
MOST_DEPTH = 32
LONGEST_TEXT = 10_000  # characters
LARGEST = 2**63

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32,
          torch.uint8, torch.bool)  # fmt: skip


class Other:
    """In place of a value of another kind, of which no more is known than its type's name."""

    def __init__(self, value: object) -> None:
        self._kind = type(value).__name__

    def __repr__(self) -> str:
        return f"a {self._kind}"


def plain_copy(content: Any, most_bytes: int) -> Any:
    """A copy of nested dicts, lists and tuples, whose values are plain, or tensors and no more.

    What a file gives can carry attributes that stand before a type's own (`get`, `shape`), or
    compare as arrays do. Values of other kinds become `Other`, keys of other kinds are left out.

    most_bytes: that all tensors together may take: those of the file. More of that, or more than
    the bounds of `leaves`, are a ValueError.
    """
    storages: dict[int, int] = {}  # address → bytes
    count = 0

    def copied(value: Any, place: Any, depth: int) -> Any:
        nonlocal count
        count += 1
        check_walk(count, depth)
        if isinstance(value, dict):
            pairs = [(_plain(key), own) for key, own in dict.items(value)]
            for key, _ in pairs:
                check_bounds(key, place)
            return {
                key: copied(own, (place, key), depth + 1)
                for key, own in pairs
                if not isinstance(key, Other)
            }
        if isinstance(value, list | tuple):
            kind = list if isinstance(value, list) else tuple
            return kind(copied(own, (place, k), depth + 1) for k, own in enumerate(value))
        if type(value) in (Tensor, torch.nn.Parameter):
            tensor = Tensor.detach(value)
            if _is_in_memory(tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor
        found = _plain(value)
        check_bounds(found, place)
        return found

    found = copied(content, (), 0)
    if (total := sum(storages.values())) > most_bytes:
        raise ValueError(f"its tensors take {total:,} bytes, more than the file")
    return found


def _plain(value: Any) -> Any:
    """A number, a text or nothing, without the type of an array library; or `Other`."""
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, float):  # NumPy's are Python's as well
        return float(value)
    if isinstance(value, str):
        return str(value)
    return bytes(value) if isinstance(value, bytes) else Other(value)


def _is_in_memory(tensor: Tensor) -> bool:
    is_dense = tensor.layout == torch.strided and not tensor.is_nested
    return is_dense and tensor.device.type == "cpu"


def leaves(content: Any) -> Iterator[tuple[Any, Any]]:
    """The values in nested dicts, lists and tuples with their places; keys are checked too.

    A place is the pair of the place around it and a key; `dotted` makes a name of it, which takes
    longer than the walk. A few bytes of a file can describe 2^34 values, a number or a name without
    end: more than the bounds above are a ValueError.
    """
    left: list[tuple[Any, Any, int]] = [(content, (), 0)]
    count = 0
    while left:
        value, place, depth = left.pop()
        count += 1
        check_walk(count, depth)
        if isinstance(value, Mapping):
            for key in value:
                check_bounds(key, place)
            left += [(v, (place, k), depth + 1) for k, v in value.items()]
        elif isinstance(value, list | tuple | set | frozenset):
            left += [(v, (place, k), depth + 1) for k, v in enumerate(value)]
        else:
            check_bounds(value, place)
            yield place, value


def check_walk(count: int, depth: int) -> None:
    """Refuses more values, or more levels of them, than a checkpoint holds."""
    if count > MOST_VALUES or depth > MOST_DEPTH:
        raise ValueError(
            f"it holds more than {MOST_VALUES:,} values, or deeper than {MOST_DEPTH} levels"
        )


def check_bounds(value: Any, place: Any) -> None:
    """Refuses a text or a whole number that is too long to be one of ours."""
    if isinstance(value, str | bytes) and len(value) > LONGEST_TEXT:
        raise ValueError(f"{dotted(place)}: a text of {len(value):,} characters")
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise ValueError(f"{dotted(place)}: a whole number of {value.bit_length():,} bits")


def entries_of(value: Any) -> Mapping[Any, Any] | None:
    """A mapping, or a list or tuple that holds some, by their numbers as texts; None: neither."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple) and any(isinstance(v, dict | list | tuple) for v in value):
        return {str(k): own for k, own in enumerate(value)}
    return None


def part_of(place: Any) -> Any:
    """The outermost key of a place that `leaves` gives."""
    key = None
    while place:
        place, key = place
    return key


def dotted(place: Any) -> str:
    """The name of a place that `leaves` gives."""
    keys = []
    while place:
        place, key = place
        keys.append(escape(str(key)[:200]))
    return ".".join(reversed(keys))


def refuse_odd(name: str, tensor: Tensor) -> None:
    """Refuses, as a ValueError, all but a dense tensor of numbers in memory that are all there."""
    kind = None
    if tensor.is_nested:
        kind = "nested"
    elif tensor.layout != torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
    elif tensor.device.type != "cpu":
        kind = f"on device {tensor.device.type}"
    elif tensor.is_quantized or tensor.dtype not in DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
    elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        kind = f"of shape {tuple(tensor.shape)}, of which the file holds only a part"
    if kind is not None:
        raise ValueError(f"{name} is a tensor {kind}, expected a dense one of numbers")


def refuse_not_finite(name: str, tensor: Tensor) -> None:
    """Refuses, as a ValueError, a tensor that holds NaN or infinity."""
    if tensor.is_floating_point() and (bad := int((~torch.isfinite(tensor)).sum())):
        raise ValueError(f"{name}: {bad} of {tensor.numel()} values are not finite")


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 on."""
    return type(value) is int and 0 <= value < LARGEST


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)
