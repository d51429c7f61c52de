"""The runs of an ablation: their training, and the summary of each."""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dan_dist.ablation.grid import AblationRun
from dan_dist.config import Config, flatten, load_config, resolve
from dan_dist.data.holdout import HELD_OUT
from dan_dist.data.splits import selected_on
from dan_dist.evaluation.records import PREDICTIONS, Predictions, read_predictions
from dan_dist.evaluation.result import read_result
from dan_dist.run.folder import check_continues, newest_checkpoint
from dan_dist.run.outcome import OUTCOME, read_outcome, write_outcome
from dan_dist.run.signals import StopRequest, end_with_parent
from dan_dist.tracking.journal_files import read_records, read_sent
from dan_dist.tracking.tracker import record_failure
from dan_dist.values import variables

log = logging.getLogger(__name__)

CODE = Path(__file__).resolve().parent.parent.parent  # where dan_dist and shards lie
STOP_POLL_S = 0.2
LENGTH_KEYS = (
    "train.epochs",
    "train.max_steps",
    "train.patience",
)  # a run of another length is not the grid's


class RunSummary(NamedTuple):
    """What a run's folder holds of it; without numbers unless it has finished."""

    run: AblationRun
    status: str  # finished, preempted, failed, or missing: never started, or killed
    reason: str
    run_id: str | None
    last: dict[str, float]  # the last evaluation's metrics
    best: dict[str, float]  # the best one's, and its epoch
    right: NDArray[np.bool_] | None  # (what was judged,): which the last evaluation had right
    fingerprint: str  # of the data
    curves: dict[str, list[tuple[int, float]]]  # metric → (step, value), in order
    tags: dict[str, str]  # of the run in MLflow
    minutes: float  # of training, all its attempts together
    judged: str  # "validation images", "held-out images", or "pairs" of images
    test: Mapping[str, float] | None = None  # the test split's metrics, where there is one
    predictions: Predictions | None = None  # of the test split, or else of the last evaluation
    selected_on: str = "val"


def read_summary(run: AblationRun, config: Config) -> RunSummary:
    """The summary of a run; one that finished with another length counts as missing.

    A folder that holds a run of another configuration is a ValueError.
    """
    folder = Path(config.train.output)
    found = read_outcome(folder)
    status, reason = found.get("status", "missing"), found.get("reason", "")
    chosen = selected_on(config.data.model_dump())
    images = "held-out images" if chosen == HELD_OUT else "validation images"
    judged = "pairs" if config.task == "identity" else images
    empty = RunSummary(
        run, status, reason, read_sent(folder)[1], {}, {}, None, "", {}, {}, 0.0, judged
    )
    newest = newest_checkpoint(folder)
    if newest is None:
        return empty if status != "finished" else empty._replace(status="missing")
    path, content = newest
    saved, wanted = resolve(content["config"]), flatten(config.model_dump())
    check_continues(path, saved, wanted, same_data=True)
    if status != "finished":
        return empty
    if content["step"] != found["step"] or any(saved[k] != wanted[k] for k in LENGTH_KEYS):
        return empty._replace(status="missing", reason="")
    records, right = read_records(folder), content.get("right")
    test = read_result(folder)
    if config.data.test_split is not None and test.get("step") != content["step"]:
        return empty._replace(status="missing", reason="its test split has not been looked at")
    return empty._replace(
        test=test.get("metrics"),
        predictions=_predictions(folder, content["step"]),
        selected_on=chosen,
        last=content["metrics"],
        best=content["best"],
        right=None if right is None else right.numpy(),
        fingerprint=content["fingerprint"],
        curves=_curves(records),
        tags=_tags(records),
        minutes=_minutes(records),
    )


def _predictions(folder: Path, step: int) -> Predictions | None:
    """A run's file of predictions; None: it has none of this step, as earlier versions' runs."""
    path = folder / PREDICTIONS
    found = read_predictions(path) if path.is_file() else None
    return found if found is not None and found.facts.get("step") == step else None


def train_missing(
    config: str, grid: Sequence[AblationRun], folder: Path, ranks: int, stop: StopRequest
) -> None:
    """Trains the runs that have not finished, one after another; several ranks under torchrun.

    One that fails does not keep the others from being trained. A stop signal is passed on to the
    one that is under way, which writes a checkpoint, and ends this. Where a folder holds a run of
    another configuration, nothing is started.
    """
    summaries = [read_summary(run, load_config(config, run.overrides)) for run in grid]
    stop.wait_for_step = True
    for number, summary in enumerate(summaries, 1):
        name = f"{number} of {len(grid)}: {summary.run.name}"
        if summary.status == "finished":
            log.info("%s has finished", name)
            continue
        log.info("%s", name)
        agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        training = ["-m", "dan_dist", "train", config, *summary.run.overrides]
        code = _run([sys.executable, *(agent if ranks > 1 else []), *training], stop)
        if stop.signal:
            return
        if code:
            log.warning("%s failed", summary.run.name)
            try:
                record_end(folder / summary.run.name, code)
            except (OSError, ValueError) as error:  # the other runs are trained
                log.warning("its end is not recorded: %s", error)


def _run(command: Sequence[str], stop: StopRequest) -> int:
    """Runs a training, to which a stop signal is passed on; returns its exit code."""
    path = os.pathsep.join(filter(None, (str(CODE), os.environ.get("PYTHONPATH"))))
    # SAFEPATH: `python -m` would import another clone's code where that is the working folder.
    environment = {**variables(), "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    # In a session of its own, so that Ctrl-C comes from here alone; killed along with this.
    process = subprocess.Popen(
        command, start_new_session=True, preexec_fn=end_with_parent, env=environment
    )
    asked = False
    while True:
        if stop.signal and not asked:
            process.terminate()
            asked = True
        try:
            return process.wait(STOP_POLL_S)
        except subprocess.TimeoutExpired:
            continue


def record_end(folder: Path, code: int) -> None:
    """Writes for a run that was killed what it could not write itself."""
    if not (folder / OUTCOME).is_file():
        reason = f"it ended with exit code {code} and left no outcome"
        folder.mkdir(parents=True, exist_ok=True)
        write_outcome(folder, "failed", step=None, reason=reason)
        record_failure(folder)


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record["kind"] == "metrics":
            for key, value in record["values"].items():
                curves.setdefault(key, []).append((record["step"], value))
    return curves


def _tags(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The tags of a run, as its last start has set them."""
    tags: dict[str, str] = {}
    for record in records:
        if record["kind"] == "status":
            tags |= record["tags"]
    return tags


def _minutes(records: Sequence[Mapping[str, Any]]) -> float:
    """From each start to the last record of that attempt, all attempts together."""
    attempts: list[list[int]] = []
    for record in records:
        if record["kind"] == "status" and record["status"] == "RUNNING":
            attempts.append([])
        if attempts and "time_ms" in record:
            attempts[-1].append(record["time_ms"])
    return sum(times[-1] - times[0] for times in attempts) / 60_000
