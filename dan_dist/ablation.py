"""Ablations: a grid of settings, each trained as a run of its own, and how they compare.

A child is one run of the grid: a folder of its own in the ablation's, and a run of its own in
MLflow under the ablation's. What there is to say of it is read from what its training left: its
last checkpoint, its journal, its outcome.
"""

import fcntl
import json
import logging
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dan_dist import checkpoint
from dan_dist.config import REPOSITORY, Config, flatten, load_config, resolve
from dan_dist.journal import read_records, read_sent
from dan_dist.shardset import write_atomically
from dan_dist.stop import OUTCOME, StopRequest, end_with_parent, write_outcome
from dan_dist.tracking import note_failure

log = logging.getLogger(__name__)

IDENTITY = "ablation.json"
STOP_POLL_S = 0.2
LENGTH_KEYS = ("train.epochs", "train.max_steps")  # a run of another length is not this child

# The paper's own: figure 5, table 1, table 2. An axis is a name, and the overrides of each point.
PRESETS: dict[str, dict[str, list[str]]] = {
    "heads": {"0": ["model.heads=0", "loss.fcn=none", "loss.afn=none"]}
    | {str(k): [f"model.heads={k}"] for k in range(1, 9)},
    "fcn-loss": {name: [f"loss.fcn={name}"] for name in ("none", "center", "affinity")},
    "afn-loss": {
        name: [f"loss.afn={name}"] for name in ("none", "partition", "partition_batch")
    },
}  # fmt: skip


class Axis(NamedTuple):
    """What is varied."""

    name: str
    points: dict[str, list[str]]  # value → overrides


class Child(NamedTuple):
    """One run of the grid."""

    name: str  # of its folder and of its MLflow run
    values: dict[str, str]  # axis → value
    seed: int
    overrides: list[str]  # of the configuration, its folder and its place in MLflow among them

    @property
    def setting(self) -> str:
        """The values alone: runs that differ by their seed share it."""
        return ", ".join(f"{axis} {value}" for axis, value in self.values.items()) or "as it stands"


class Result(NamedTuple):
    """What became of a child; the figures are empty unless it has finished."""

    child: Child
    status: str  # finished, preempted, failed, or missing: never started, or killed
    reason: str
    run_id: str | None
    last: dict[str, float]  # the last evaluation's metrics
    best: dict[str, float]  # the best one's, and its epoch
    right: NDArray[np.bool_] | None  # (what was judged,): which the last evaluation had right
    fingerprint: str  # of the data
    curves: dict[str, list[tuple[int, float]]]  # metric → (step, value), in order
    minutes: float  # of training, all its attempts together
    judged: str  # "validation images", or "pairs" of them


def parse(words: Sequence[str]) -> tuple[str, list[Axis], list[str]]:
    """Name, axes and further overrides of a command line: `heads`, `loss.fcn=none,center`, `k=v`.

    Raises:
        ValueError: an unknown word, nothing varied, a key set by two axes, a value given twice.
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
            axes.append(Axis(key, {value: [f"{key}={value}"] for value in values}))
        else:
            overrides.append(word)
    if not axes:
        raise ValueError(
            f"nothing is varied: name {', '.join(PRESETS)}, or section.key=value,value"
        )
    keys = [{o.partition("=")[0] for point in a.points.values() for o in point} for a in axes]
    for (a, own), (b, other) in combinations(zip(axes, keys, strict=True), 2):
        if both := own & other:
            raise ValueError(f"'{a.name}' and '{b.name}' both set {', '.join(sorted(both))}")
    short = [axis.name.rsplit(".", 1)[-1] for axis in axes]
    if len(set(short)) == len(axes):
        axes = [Axis(name, axis.points) for name, axis in zip(short, axes, strict=True)]
    return "-".join(axis.name for axis in axes), axes, overrides


def children(
    config: str, axes: Sequence[Axis], overrides: Sequence[str], seeds: int, folder: Path, name: str
) -> list[Child]:
    """All runs of the grid, the first seed's before the second's.

    Raises:
        ValueError: a configuration that cannot be; names the key.
    """
    first = load_config(config, overrides)
    if not first.tracking.enabled:
        raise ValueError("tracking.enabled=false: an ablation is compared in MLflow")
    parent = identity(folder, name)
    found = []
    for seed in range(first.train.seed, first.train.seed + seeds):
        for point in product(*(axis.points for axis in axes)):
            values = dict(zip((axis.name for axis in axes), point, strict=True))
            chosen = [
                o for axis, value in zip(axes, point, strict=True) for o in axis.points[value]
            ]
            words = [word for pair in values.items() for word in pair]
            own = re.sub(r"[^\w.-]", "_", "-".join([*words, "seed", str(seed)]))
            child = Child(own, values, seed, [
                *overrides, *chosen, f"train.seed={seed}", f"train.output={folder / own}",
                f"tracking.run_name={own}", f"tracking.parent={parent}",
                f"tracking.tags.ablation={name}",
            ])  # fmt: skip
            child.overrides.append(f"tracking.tags.setting={json.dumps(child.setting)}")
            load_config(config, child.overrides)
            found.append(child)
    return found


def identity(folder: Path, name: str) -> str:
    """What tells this ablation from others of its name: written once into its folder, then kept.

    Raises:
        ValueError: the folder is another ablation's. OSError: it cannot be written.
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


@contextmanager
def alone(folder: Path, purpose: str, *, wait: bool) -> Iterator[None]:
    """One process at a time does this in a folder.

    Raises:
        OSError: another does, and this one is not to wait.
    """
    with (folder / f"{purpose}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise OSError(f"another process works on {folder} ({purpose})") from error
        yield


def read(child: Child, config: Config) -> Result:
    """What became of a child; one that finished with another length counts as missing.

    Raises:
        ValueError: its folder holds a run of another configuration.
    """
    folder = Path(config.train.output)
    outcome = folder / OUTCOME
    found = json.loads(outcome.read_text()) if outcome.is_file() else {}
    status, reason = found.get("status", "missing"), found.get("reason", "")
    judged = "pairs" if config.task == "identity" else "validation images"
    empty = Result(child, status, reason, read_sent(folder)[1], {}, {}, None, "", {}, 0.0, judged)
    newest = checkpoint.newest(folder)
    if newest is None:
        return empty if status != "finished" else empty._replace(status="missing")
    path, content = newest
    saved, wanted = resolve(content["config"]), flatten(config.model_dump())
    checkpoint.check_continues(path, saved, wanted, same_data=True)
    if status != "finished":
        return empty
    if content["step"] != found["step"] or any(saved[k] != wanted[k] for k in LENGTH_KEYS):
        return empty._replace(status="missing", reason="")
    records, right = read_records(folder), content.get("right")
    return empty._replace(
        last=content["metrics"],
        best=content["best"],
        right=None if right is None else right.numpy(),
        fingerprint=content["fingerprint"],
        curves=_curves(records),
        minutes=_minutes(records),
    )


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record["kind"] == "metrics":
            for key, value in record["values"].items():
                curves.setdefault(key, []).append((record["step"], value))
    return curves


def _minutes(records: Sequence[Mapping[str, Any]]) -> float:
    """From each start to the last sign of that attempt, all attempts together."""
    attempts: list[list[int]] = []
    for record in records:
        if record["kind"] == "status" and record["status"] == "RUNNING":
            attempts.append([])
        if attempts and "time_ms" in record:
            attempts[-1].append(record["time_ms"])
    return sum(times[-1] - times[0] for times in attempts) / 60_000


def train_missing(
    config: str, grid: Sequence[Child], folder: Path, ranks: int, stop: StopRequest
) -> None:
    """Trains the children that have not finished, one after another, each under torchrun.

    One that fails does not keep the others from being trained. A stop signal is passed on to the
    one that is under way, which writes a checkpoint, and ends this.

    Raises:
        ValueError: a child's folder holds a run of another configuration; nothing was started.
    """
    results = [read(child, load_config(config, child.overrides)) for child in grid]
    stop.wait_for_step = True
    for number, result in enumerate(results, 1):
        name = f"{number} of {len(grid)}: {result.child.name}"
        if result.status == "finished":
            log.info("%s has finished", name)
            continue
        log.info("%s", name)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={ranks}", str(REPOSITORY / "launch" / "train.py"), config,
            *result.child.overrides,
        ]  # fmt: skip
        code = _run(command, stop)
        if stop.signal:
            return
        if code:
            log.warning("%s failed", result.child.name)
            note_end(folder / result.child.name, code)


def _run(command: Sequence[str], stop: StopRequest) -> int:
    """Runs a training, to which a stop signal is passed on; returns its exit code."""
    # In a session of its own, so that Ctrl-C comes from here alone; killed along with this.
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent)
    asked = False
    while True:
        if stop.signal and not asked:
            process.terminate()
            asked = True
        try:
            return process.wait(STOP_POLL_S)
        except subprocess.TimeoutExpired:
            continue


def note_end(folder: Path, code: int) -> None:
    """Writes for a run that was killed what it could not write itself."""
    if not (folder / OUTCOME).is_file():
        reason = f"it ended with exit code {code}, and said nothing"
        write_outcome(folder, "failed", step=None, reason=reason)
        note_failure(folder)
