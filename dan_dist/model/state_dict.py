"""State dicts from files that may come from anywhere, and networks filled from them.

Files name a network's tensors as its authors do, under whatever a wrapper has put before the names
(`module.`, `_orig_mod.`, `encoder_q.`, `student_`), at the file's top, or up to two dicts, lists or
tuples deeper.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dan_dist.model.classes import join_names
from dan_dist.model.dan import DAN, WIDTH, Fusion
from dan_dist.run.plain import entries_of, refuse_not_finite, refuse_odd
from shards.command import escape

USUAL = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
)  # of the dicts in a file, looked at first
DEEPEST, MOST_PLACES, LONGEST_NAME = 3, 16, 500


class Place(NamedTuple):
    """The tensors at one place of a file, some of which stand under a prefix."""

    name: str  # where they stand, for people; empty at the top, without prefix
    prefix: str
    tensors: dict[str, Tensor]  # all of that place, by their names in the file


class Match(NamedTuple):
    """How the tensors at a place fit a network."""

    place: Place
    found: dict[str, Tensor]  # that fit, by the network's own names
    missing: list[str]  # or of another shape or kind, by their names in the file
    left: list[str]  # of which the network has no such tensor, by their names in the file
    strange: list[str]  # those of `left` that belong to the modules of a larger network

    @property
    def is_whole(self) -> bool:
        return not self.missing and not self.strange

    def describe(self) -> str:
        """What fits, what is missing and what is left over, in a line."""
        total = len(self.found) + len(self.missing)
        return (
            f"{len(self.found)} of {total} tensors match{self.place.name}; missing or of another "
            f"shape: {join_names(self.missing, 5)}; unknown: {join_names(self.left, 5)}"
        )


def find_places(content: Mapping[str, Any], names: Collection[str]) -> list[Place]:
    """Where tensors of these names stand in a file; the place that has the most of them first."""
    found: list[tuple[int, Place]] = []
    for where, tensors in _dicts_of_tensors(content):
        counts = Counter(
            key[:start]
            for key in tensors
            if len(key) <= LONGEST_NAME
            for start in (0, *(k + 1 for k, letter in enumerate(key) if letter in "._"))
            if key[start:] in names
        )
        for prefix, count in counts.items():
            parts = [f"in '{where}'"] * bool(where) + [f"under '{escape(prefix)}'"] * bool(prefix)
            name = f" ({' '.join(parts)})" if parts else ""
            found.append((count, Place(name, prefix, tensors)))
    found.sort(key=lambda pair: -pair[0])  # keeps the order of those that have as many
    return [place for _, place in found[:MOST_PLACES]]


def _dicts_of_tensors(content: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The dicts in a file that hold tensors by name, the usual ones first, with their own names."""
    level: list[tuple[str, Mapping[Any, Any]]] = [("", content)]
    for _ in range(DEEPEST):
        for where, own in level:
            tensors = {str(k): v for k, v in own.items() if isinstance(v, Tensor)}
            if tensors:
                yield where, tensors
        inner = [
            (f"{where}.{escape(str(key)[:80])}".lstrip("."), entries)
            for where, own in level
            for key, value in own.items()
            if (entries := entries_of(value)) is not None
        ]
        order = {name: k for k, name in enumerate(USUAL)}
        level = sorted(inner, key=lambda pair: order.get(pair[0], len(USUAL)))


def match(
    place: Place,
    wanted: Mapping[str, Tensor],
    name_of: Callable[[str], str],
    modules: Collection[str],
) -> Match:
    """How a place fits a network whose tensors are `wanted`, on the meta device.

    name_of: a tensor's name in the file, without the prefix, from its own. modules: what the names
    of the network's modules begin with there.
    """
    names = {key: place.prefix + name_of(key) for key in wanted}
    found, missing = {}, []
    for key, own in wanted.items():
        tensor = place.tensors.get(names[key])
        if tensor is not None and _fits(tensor, own):
            found[key] = tensor
        elif tensor is not None or not key.endswith("num_batches_tracked"):  # not in all files
            missing.append(names[key])
    known = set(names.values())
    left = [key for key in place.tensors if key not in known]
    strange = [
        key
        for key in left
        if key.startswith(place.prefix)
        and key.removeprefix(place.prefix).partition(".")[0] in modules
    ]
    return Match(
        place, found, [escape(k) for k in missing], [escape(k) for k in sorted(left)], strange
    )


def fill_network(
    classes: int, heads: int, tensors: dict[str, Tensor], path: Path, *, width: int = WIDTH,
    cosine: bool = False, fusion: Fusion = "log_softmax",
) -> DAN:  # fmt: skip
    """A network of all these tensors, by our names, in evaluation mode.

    Tensors that are missing, of another shape or kind, too many, or not finite, and a network that
    gives for a gray image what is not finite, are a ValueError that names them.
    """
    network = empty_network(classes, heads, width=width, cosine=cosine, fusion=fusion)
    own = network.state_dict()
    found = match(Place("", "", tensors), own, str, ())
    if found.missing or found.left:
        raise ValueError(f"{path}: {found.describe()}")
    double = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    dtype = torch.float64 if double else torch.float32
    state = {k: torch.tensor(0) for k in own if k not in found.found}
    state |= {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.found.items()}
    for name, tensor in state.items():
        try:
            refuse_not_finite(name, tensor)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    network.load_state_dict(state, assign=True)
    with torch.no_grad():  # weights that overflow, a variance below 0
        output = network.eval()(torch.zeros(1, 3, 32, 32, dtype=dtype))
    if not all(torch.isfinite(part).all() for part in output if part is not None):
        raise ValueError(f"{path}: the network's output for a gray image is not finite")
    return network


def empty_network(
    classes: int, heads: int, *, width: int = WIDTH, cosine: bool = False,
    fusion: Fusion = "log_softmax",
) -> DAN:  # fmt: skip
    """A network without memory, whose tensors a file is to give."""
    with torch.device("meta"):
        return DAN(classes, heads, width=width, cosine=cosine, fusion=fusion)


def _fits(tensor: Tensor, wanted: Tensor) -> bool:
    """Whether it can replace a tensor of the network, and its storage holds its whole shape."""
    try:
        refuse_odd("", tensor)
    except ValueError:
        return False
    return tensor.shape == wanted.shape and tensor.is_floating_point() == wanted.is_floating_point()
