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
        if count > MOST_VALUES or depth > MOST_DEPTH:
            raise ValueError(
                f"it holds more than {MOST_VALUES:,} values, or deeper than {MOST_DEPTH} levels"
            )
        if isinstance(value, Mapping):
            for key in value:
                check_bounds(key, place)
            left += [(v, (place, k), depth + 1) for k, v in value.items()]
        elif isinstance(value, list | tuple | set | frozenset):
            left += [(v, (place, k), depth + 1) for k, v in enumerate(value)]
        else:
            check_bounds(value, place)
            yield place, value


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
