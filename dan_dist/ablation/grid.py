"""The grid of an ablation: its axes, and a training run for each of its points and seeds.

Each has a folder of its own in the ablation's, and a run of its own in MLflow under the ablation's.
"""

import json
import os
import re
import uuid
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

from dan_dist.config import layered, load_config
from shards.files import write_atomically

IDENTITY = "ablation.json"
OWN_KEYS = ("train.output", "tracking.run_name", "tracking.parent")
OF_A_RUN = ("tracking.", "train.output", "train.seed", "data.fold")  # and of no setting

BASELINE = ["model.heads=0", "loss.fcn=none", "loss.afn=none"]  # no heads

# The paper's own: figure 5, table 1, table 2; and how heads are fused. An axis is a name, and the
# overrides of each point.
PRESETS: dict[str, dict[str, list[str]]] = {
    "heads": {"0": BASELINE} | {str(k): [f"model.heads={k}"] for k in range(1, 9)},
    "fcn-loss": {name: [f"loss.fcn={name}"] for name in ("none", "center", "affinity")},
    "afn-loss": {
        name: [f"loss.afn={name}"] for name in ("none", "partition", "partition_release")
    },
    "fusion": {"none": BASELINE}
    | {name: [f"model.fusion={name}"] for name in ("log_softmax", "mean")},
}  # fmt: skip


class Axis(NamedTuple):
    """What is varied."""

    name: str
    points: dict[str, list[str]]  # value → overrides

    @property
    def keys(self) -> set[str]:
        """The keys that any of its points sets."""
        return {o.partition("=")[0] for point in self.points.values() for o in point}


class AblationRun(NamedTuple):
    """One run of the grid."""

    name: str  # of its folder and of its MLflow run
    values: dict[str, str]  # axis → value
    seed: int
    overrides: list[str]  # of the configuration, its folder and its place in MLflow among them
    fold: str | None = None  # data.fold, where the grid goes over folds

    @property
    def setting(self) -> str:
        """The values alone: runs that differ by their seed or fold share it."""
        return ", ".join(f"{axis} {value}" for axis, value in self.values.items()) or "as it stands"


def parse(words: Sequence[str]) -> tuple[str, list[Axis], list[str]]:
    """Name, axes and further overrides of a command line: `heads`, `heads=1,4`, `k=a,b`, `k=v`.

    An unknown word, nothing varied, a key that two axes set, or a value that stands there twice is
    a ValueError.
    """
    axes: list[Axis] = []
    overrides: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            if key not in PRESETS:
                raise ValueError(
                    f"'{word}': expected {', '.join(PRESETS)}, or section.key=value,value …"
                )
            axes.append(Axis(key, PRESETS[key]))
        elif "," in text and not text.startswith(("[", "{", "'", '"')):
            values = [value.strip() for value in text.split(",")]
            if "" in values or len(set(values)) < len(values):
                raise ValueError(f"'{word}': a value is empty or stands there twice")
            points = PRESETS.get(key) or {value: [f"{key}={value}"] for value in values}
            if unknown := [value for value in values if value not in points]:
                raise ValueError(f"'{word}': {unknown[0]} is not of {key}: {', '.join(points)}")
            axes.append(Axis(key, {value: points[value] for value in values}))
        else:
            overrides.append(word)
    if not axes:
        raise ValueError(
            f"nothing is varied: name {', '.join(PRESETS)}, or section.key=value,value"
        )
    for axis in axes:
        varied = set.intersection(*({o.partition("=")[0] for o in p} for p in axis.points.values()))
        for word in overrides:
            if (key := word.partition("=")[0]) in varied:
                raise ValueError(f"'{word}': '{axis.name}' varies {key} already")
    for a, b in combinations(axes, 2):
        if both := a.keys & b.keys:
            raise ValueError(f"'{a.name}' and '{b.name}' both set {', '.join(sorted(both))}")
    short = [axis.name.rsplit(".", 1)[-1] for axis in axes]
    if len(set(short)) == len(axes):
        axes = [Axis(name, axis.points) for name, axis in zip(short, axes, strict=True)]
    return "-".join(axis.name for axis in axes), axes, overrides


def grid_runs(
    config: str, axes: Sequence[Axis], overrides: Sequence[str], seeds: int, folder: Path,
    name: str, folds: int = 0,
) -> list[AblationRun]:  # fmt: skip
    """All runs of the grid, the first seed's before the second's, with checked configurations.

    folds: parts of the training images, each of which is held out once with each seed; 0: none.
    """
    given = [word.partition("=")[0] for word in overrides]
    for key in given:
        if key in OWN_KEYS:
            raise ValueError(f"{key}: an ablation sets it itself; --output names its folder")
        if given.count(key) > 1:
            raise ValueError(f"{key} is given twice; write it once")
    for key in sorted(set[str]().union(*(axis.keys for axis in axes))):
        if key == "train.seed" or (key == "data.fold" and folds):
            raise ValueError(f"{key} is no axis: --seeds and --folds give each run its own")
    first = load_config(config, overrides)
    if not first.tracking.enabled:
        raise ValueError("tracking.enabled=false: an ablation is compared in MLflow")
    parent = ablation_id(folder, name)
    found = list[AblationRun]()
    parts: list[str | None] = [f"{k}/{folds}" for k in range(1, folds + 1)]
    numbers = range(first.train.seed, first.train.seed + seeds)
    for seed, fold in product(numbers, parts or [None]):
        for point in product(*(axis.points for axis in axes)):
            values = dict(zip((axis.name for axis in axes), point, strict=True))
            chosen = [
                o for axis, value in zip(axes, point, strict=True) for o in axis.points[value]
            ]
            words = [word for pair in values.items() for word in pair]
            words += ["seed", str(seed), *(["fold", fold.split("/")[0]] if fold else [])]
            own = re.sub(r"[^\w.-]", "_", "-".join(words))
            if any(run.name == own for run in found):
                raise ValueError(f"two runs of the grid would both have the folder {own}: give "
                                 "values that differ in a letter or digit")  # fmt: skip
            lasting = [f"train.seed={seed}", *([f"data.fold={fold}"] if fold else [])]
            run = AblationRun(own, values, seed, layered(overrides, chosen, lasting), fold)
            output = str(folder / own).replace("$", "$$")
            run.overrides.extend([
                f"train.output={output}", f"tracking.run_name={own}", f"tracking.parent={parent}",
                f"tracking.tags.ablation={name}",
                f"tracking.tags.setting={json.dumps(run.setting)}",
            ])  # fmt: skip
            load_config(config, run.overrides)
            found.append(run)
    return found


def varied(runs: Sequence[AblationRun]) -> list[str]:
    """The keys of the configuration in which the settings of a grid differ, in its order."""
    given = [dict(word.split("=", 1) for word in run.overrides) for run in runs]
    keys = dict.fromkeys(key for own in given for key in own)
    different = [key for key in keys if len({own.get(key) for own in given}) > 1]
    return [key for key in different if not key.startswith(OF_A_RUN)]


def ablation_id(folder: Path, name: str) -> str:
    """The ablation's name and a number of its own, which is drawn once and kept in its folder.

    A folder of another ablation is a ValueError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / IDENTITY
    draft = folder / f"{IDENTITY}.{uuid.uuid4().hex}"
    write_atomically(draft, json.dumps({"name": name, "id": uuid.uuid4().hex[:8]}) + "\n")
    try:
        os.link(draft, path)  # fails where another was first
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    try:
        found = json.loads(path.read_text())
        own_name, number = found["name"], found["id"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the identity of an ablation ({error})") from error
    if own_name != name:
        raise ValueError(f"{folder} holds the ablation '{own_name}'; give another --output")
    return f"{name}-{number}"
