"""The plan of a pack: which image goes into which shard, before any image is read."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.cut import AS_RELEASED, cut_of_release, parse_cut
from shards.files import check_form, read_json
from shards.format import DRAWN, check_key
from shards.release import Release, common_name

MIXING_SEED = 0
STATE_BYTES = 2**28  # of an unfinished pack's plan, at most
MOST_COMPARED = 1_000_000  # images: the time grows with their square

_FORM = {"dataset": str, "release": str, "class_names": list, "size": int | None, "listed": dict,
         "list_sha256": str, "left_out": dict, "left_out_names": list, "shards": dict}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One shard to be written: the images of `split` at these positions of its list."""

    name: str
    split: str
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """The list and the options of a pack: continuing another plan's would mix the two."""

    dataset: str
    release: str
    class_names: list[str]
    size: int | None
    listed: dict[str, int]  # split → images
    list_sha256: str
    left_out: dict[str, int]  # reason → images
    left_out_names: list[str]
    shards: dict[str, list[str]]  # split → names of its jobs
    face_cut: str = AS_RELEASED

    @property
    def sha256(self) -> str:
        """The same in one part and in several; the manifest keeps it."""
        described = asdict(self)
        if self.face_cut in (AS_RELEASED, cut_of_release(self.dataset, self.release)):
            del described["face_cut"]  # as in plans of former versions, whose packs are the same
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    @property
    def is_compared(self) -> bool:
        """Whether photographs that stand there twice are looked for; drawn faces are no such."""
        return self.dataset != DRAWN and self.images <= MOST_COMPARED

    @property
    def images(self) -> int:
        return sum(self.listed.values())


def read_plan(path: Path) -> Plan:
    """The plan of an unfinished pack, as `claim` wrote it.

    Raises:
        ValueError: it is damaged.
    """
    try:
        state = read_json(path, STATE_BYTES, _FORM, _check_state)
    except ValueError as error:
        raise ValueError(f"{error}; pack again with --overwrite") from error
    return Plan(**{field.name: state[field.name] for field in fields(Plan) if field.name in state})


def _check_state(state: Mapping[str, Any]) -> None:
    """Checks what the plan's lists hold: it comes to names of files, and numbers of classes."""
    for key in ("class_names", "left_out_names"):
        listed = {f"{key}.{number}": name for number, name in enumerate(state[key])}
        check_form(listed, dict.fromkeys(listed, str))
    for key in ("listed", "left_out"):
        check_form(state[key], dict.fromkeys(state[key], int))
    shards, classes = state["shards"], len(state["class_names"])
    check_form(shards, dict.fromkeys({**shards, **state["listed"]}, list))
    check_form(state["listed"], dict.fromkeys(shards, int))
    for split, names in shards.items():
        form = re.compile(rf"{re.escape(Path(split).name)}(-\d\d+)?-\d{{5,}}")
        for name in map(str, names):
            found = form.fullmatch(name)
            if not found or int((found[1] or "-0")[1:]) >= classes:
                raise ValueError(f"{name!r} is a shard of '{split}' in {classes} classes")
    parse_cut(state.get("face_cut", AS_RELEASED))


def plan_pack(release: Release, size: int | None, shard_size: int) -> tuple[Plan, list[Job]]:
    """The plan and its shards; refuses what could not be packed or trained on."""
    _check_classes(release)
    digest, jobs = hashlib.sha256(), []
    for split, items in release.splits.items():
        # It is part of files' names.
        if not split or not split.isprintable() or Path(split).name != split:
            raise ValueError(f"{release.dataset}: split {split!r} has no plain printable name, "
                             "rename it")  # fmt: skip
        if not len(items):
            raise ValueError(f"{release.dataset}: split '{split}' holds no images")
        labels = np.empty(len(items), np.int32)
        hashes = np.empty(len(items), np.int64)  # 8 bytes an image, where a set of keys takes 100
        for k, item in enumerate(items):
            check_key(item.key)
            if not 0 <= item.label < len(release.class_names):
                raise ValueError(f"'{item.key}' has label {item.label}, outside class_names")
            labels[k], hashes[k] = item.label, hash(item.key)
            line = f"{split} {item.key} {item.label} {item.source}\n"
            digest.update(line.encode(errors="surrogateescape"))
        _check_unique(release, split, hashes)
        present = np.bincount(labels, minlength=len(release.class_names)) > 0
        if split == "train" and not present.all() and not release.mixed:  # there, some are held out
            name = release.class_names[int(np.argmin(present))]
            raise ValueError(f"{release.dataset}: class '{name}' has no training images")
        jobs += _cut(split, labels, shard_size, mixed=release.mixed)
    plan = Plan(
        dataset=release.dataset,
        release=release.release,
        class_names=list(release.class_names),
        size=size,
        listed={split: len(items) for split, items in release.splits.items()},
        list_sha256=digest.hexdigest(),
        left_out=dict(release.left_out.counts),
        left_out_names=list(release.left_out.names),
        shards={split: [j.name for j in jobs if j.split == split] for split in release.splits},
        face_cut=release.face_cut,
    )
    return plan, jobs


def _check_classes(release: Release) -> None:
    """Two names for one class tear it: the network would have to tell the data's sources apart."""
    met: dict[str, str] = {}
    for name in release.class_names if not release.mixed else ():  # those are persons
        if (other := met.setdefault(common_name(name), name)) != name:
            raise ValueError(
                f"{release.dataset}: classes '{other}' and '{name}' are two names for one class; "
                "move the images of one folder into the other, or leave one out with --skip"
            )


def _check_unique(release: Release, split: str, hashes: NDArray[np.int64]) -> None:
    values, counts = np.unique(hashes, return_counts=True)
    suspects = np.isin(hashes, values[counts > 1])
    items = release.splits[split]
    keys = Counter(items[int(k)].key for k in np.flatnonzero(suspects))
    for key, count in keys.most_common(1):
        if count > 1:
            raise ValueError(f"{release.dataset}: key '{key}' stands {count} times in '{split}'")


def _cut(split: str, labels: NDArray[np.int32], shard_size: int, *, mixed: bool) -> list[Job]:
    """Shards of one class each, or of samples drawn from all of them."""
    if mixed:
        order = np.random.Generator(np.random.Philox(MIXING_SEED)).permutation(len(labels))
        groups = {f"{split}": order}
    else:
        order, classes = np.argsort(labels, kind="stable"), np.unique(labels)
        own = np.split(order, np.searchsorted(labels[order], classes[1:]))
        groups = {f"{split}-{c:02d}": ids for c, ids in zip(classes.tolist(), own, strict=True)}
    return [
        Job(f"{name}-{k:05d}", split, positions[start : start + shard_size])
        for name, positions in groups.items()
        for k, start in enumerate(range(0, len(positions), shard_size))
    ]
