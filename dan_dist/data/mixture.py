"""Several sets of shards as one: classes meet by name; damage and judgement stay each set's.

A joined split is a split like any other: its shards are those of all sets, one set after another,
and its labels are the training's.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dan_dist.data import shares
from dan_dist.data.shares import Shares
from shards.format import Shard, ShardSet, Split, open_shardset
from shards.index import plain_rows, recorded_groups, soft_of, with_groups, with_soft


class Part(NamedTuple):
    """A set that is joined with others."""

    shards: ShardSet
    share: float  # of the training's images, against the other sets'
    classes: Mapping[str, str]  # its name of a class → the training's, where they differ


@dataclass(frozen=True)
class JoinedSplit(Split):
    """A split of several sets: samples of the k-th up to ends[k], from the end before."""

    sets: tuple[str, ...]  # names, each once
    ends: tuple[int, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class JoinedSet(ShardSet):
    """Several sets, opened as one."""

    parts: tuple[Part, ...]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.counts)

    def split(self, name: str) -> JoinedSplit:
        """Opens the split of each set."""
        shards, rows = list[Shard](), []
        splits = [part.shards.split(name) for part in self.parts]
        has_soft = all(soft_of(own.index) is not None for own in splits)
        has_groups = any(recorded_groups(own.index) is not None for own in splits)
        first_group = 0  # of a set: groups do not reach over sets
        for part, own in zip(self.parts, splits, strict=True):
            index = plain_rows(own.index)  # a copy in memory, as labels and shards change
            columns = [self.class_names.index(n) for n in _names(part)]
            index["label"] = np.array(columns)[index["label"]]
            index["shard"] += len(shards)
            if has_soft:
                shares = np.zeros((len(index), len(self.class_names)), np.float32)
                for column, share in zip(columns, own.index["soft"].T, strict=True):
                    shares[:, column] += share
                index = with_soft(index, shares)
            if has_groups:
                found = recorded_groups(own.index)
                groups = np.arange(len(own)) if found is None else np.array(found, np.int64)
                index = with_groups(index, first_group + np.unique(groups, return_inverse=True)[1])
                first_group += len(own)
            rows.append(index)
            shards += [replace(s, name=str(own.root / s.name), label=None) for s in own.shards]
        return JoinedSplit(
            name, Path(), tuple(shards), np.concatenate(rows), self.class_names, self.image_size,
            set_names(self.parts), tuple(np.cumsum([*map(len, rows)]).tolist()),
            tuple(part.share for part in self.parts),
        )  # fmt: skip


def join(parts: Sequence[Part], expected: Sequence[str] | None) -> JoinedSet:
    """Several sets as one, of the classes `expected`, or else of the first set's.

    Raises:
        ValueError: a class of a set meets none of these, or is renamed and not there.
    """
    wanted = tuple(expected or dict.fromkeys(_names(parts[0])))
    faults = []
    for part in parts:
        if gone := [name for name in part.classes if name not in part.shards.class_names]:
            faults.append(f"{part.shards.root} has no {_quoted(gone)}")
        if alone := [n for n, own in zip(part.shards.class_names, _names(part), strict=True)
                     if own not in wanted]:  # fmt: skip
            faults.append(f"{_quoted(alone)} of {part.shards.root} meet no class")
    if faults:
        raise ValueError(f"data.shards: {'; '.join(faults)}; classes are {_quoted(wanted)}")
    found = [part.shards for part in parts]
    described = [(p.shards.fingerprint, str(p.share), _names(p)) for p in parts]
    sizes, cuts = {s.image_size for s in found}, {s.face_cut for s in found}
    splits = [name for name in found[0].counts if all(name in s.counts for s in found)]
    return JoinedSet(
        root=Path(" + ".join(str(shards.root) for shards in found)),
        dataset=" + ".join(shards.dataset for shards in found),
        release=" + ".join(shards.release for shards in found),
        class_names=wanted,
        image_size=sizes.pop() if len(sizes) == 1 else None,
        fingerprint=(
            hashlib.sha256(json.dumps([wanted, described]).encode()).hexdigest()
            if all(shards.fingerprint for shards in found) else ""
        ),
        counts={name: _counts(name, parts, wanted) for name in splits},
        shards={}, index_names={}, index_sha256={}, dropped={}, parts=tuple(parts),
        face_cut=cuts.pop() if len(cuts) == 1 else None,
    )  # fmt: skip


def set_names(parts: Sequence[Part]) -> tuple[str, ...]:
    """The sets' data sets; where two are of one, with a number."""
    names: list[str] = []
    for part in parts:
        same = [p.shards.dataset for p in parts[: len(names)]].count(part.shards.dataset)
        names.append(part.shards.dataset + (f"-{same + 1}" if same else ""))
    return tuple(names)


def describe_sets(shards: ShardSet) -> list[str]:
    """The sets that a training is of, by names that tell one from another."""
    parts = shards.parts if isinstance(shards, JoinedSet) else (Part(shards, 1, {}),)
    names = zip(set_names(parts), parts, strict=True)
    return [f"{name} ({part.shards.fingerprint[:8]})" for name, part in names]


def replaced_folders(shards: ShardSet) -> list[Path]:
    """The folders that by now hold another set, or none, than was opened in them."""
    parts = [p.shards for p in shards.parts] if isinstance(shards, JoinedSet) else [shards]
    found = []
    for part in parts:
        with suppress(OSError, ValueError):
            if open_shardset(part.root).fingerprint == part.fingerprint:
                continue
        found.append(part.root)
    return found


def set_of(split: Split, sample: int) -> int:
    """The number of the set that a sample is of."""
    ends = split.ends if isinstance(split, JoinedSplit) else ()
    return int(np.searchsorted(ends, sample, side="right"))


def bounds_of(split: Split) -> list[slice]:
    """The samples of each set."""
    ends = split.ends if isinstance(split, JoinedSplit) else (len(split),)
    return [slice(a, b) for a, b in zip((0, *ends), ends, strict=False)]


def groups_of(split: Split, *, by_class: bool = True) -> NDArray[np.int32]:
    """A number for each sample: of its class in its set, or of its set alone."""
    labels: NDArray[np.int32] = split.index["label"]
    if not isinstance(split, JoinedSplit):
        return labels if by_class else np.zeros(len(split), np.int32)
    sizes = np.diff((0, *split.ends))
    sets = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    return sets * len(split.class_names) + labels if by_class else sets


def shares_of(split: Split, sampling: str | Mapping[str, Any]) -> Shares | None:
    """The shares of `groups_of` a split, where `data.sampling` or several sets ask for any.

    Raises:
        ValueError: explicit shares leave a class out, or name one that is not there.
    """
    if not isinstance(split, JoinedSplit) and isinstance(sampling, str):
        return None
    inner = []
    for own in bounds_of(split):
        counts = np.bincount(split.index["label"][own], minlength=len(split.class_names))
        present = np.flatnonzero(counts)
        names = [split.class_names[c] for c in present]
        if sampling == "shuffle":
            inner.append(shares.balanced(1))
        else:
            inner.append(_shares(sampling, names, counts[present].tolist(), split.class_names))
    return shares.combine(split.shares if isinstance(split, JoinedSplit) else [1], inner)


def _shares(
    sampling: str | Mapping[str, Any], names: Sequence[str], counts: Sequence[int],
    known: Sequence[str],
) -> Shares:  # fmt: skip
    """The shares of a set's classes, by `data.sampling`."""
    if isinstance(sampling, str):
        return shares.balanced(len(counts)) if sampling == "balanced" else shares.power(counts, 1)
    if "power" in sampling:
        return shares.power(counts, sampling["power"])
    if "effective" in sampling:
        return shares.effective(counts, sampling["effective"])
    if "shares" in sampling:
        given = sampling["shares"]
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"data.sampling.shares: no class {_quoted(unknown)}; there are "
                             f"{_quoted(known)}")  # fmt: skip
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"data.sampling.shares: {_quoted(missing)} missing; every class has "
                             "a share, be it 0")  # fmt: skip
        return shares.explicit([given[name] for name in names])
    ends = [_shares(sampling[key], names, counts, known) for key in ("from", "to")]
    return shares.scheduled(ends[0], ends[1], sampling["epochs"])


def _names(part: Part) -> list[str]:
    """The training's name of each class of a set."""
    return [part.classes.get(name, name) for name in part.shards.class_names]


def _counts(split: str, parts: Sequence[Part], wanted: Sequence[str]) -> tuple[int, ...]:
    total = dict.fromkeys(wanted, 0)
    for part in parts:
        for name, count in zip(_names(part), part.shards.counts[split], strict=True):
            total[name] += count
    return tuple(total.values())


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
