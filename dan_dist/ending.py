"""What a run leaves: predictions, its result on the test split, outcome, MLflow, last lines."""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dan_dist.build import TrainingData
from dan_dist.config import Config
from dan_dist.data.splits import selected_on
from dan_dist.distributed.heartbeat import Heartbeat
from dan_dist.distributed.world import World
from dan_dist.evaluation.intervals import METHOD, format_figures
from dan_dist.evaluation.judge import Rows
from dan_dist.evaluation.metrics import format_metrics
from dan_dist.evaluation.records import PREDICTIONS, write_predictions
from dan_dist.evaluation.result import RESULT, look_once
from dan_dist.model.backbone import write_backbone
from dan_dist.run.checkpoint import BEST
from dan_dist.run.folder import step_path, steps_saved
from dan_dist.run.outcome import Status, write_outcome
from dan_dist.run.plan import make_plan
from dan_dist.run.signals import StopRequest
from dan_dist.run.state import TrainState
from dan_dist.tracking.tracker import NullTracker

log = logging.getLogger(__name__)


class RunResult(NamedTuple):
    """How a run ended, and what it found."""

    status: Status
    metrics: dict[str, float]  # of the last evaluation, on the images that choose the best epoch
    saved: int  # the step of the last checkpoint that is on the disk
    test: Mapping[str, Any] = MappingProxyType({})  # of the test split, see `evaluation.result`


def keep_predictions(
    config: Config, world: World, data: TrainingData, rows: Rows, step: int
) -> None:
    """Writes an evaluation's predictions; one with a test split writes that split's at its end."""
    if not world.is_main or data.test is not None or data.task.is_backbone:
        return
    path, facts = Path(config.train.output) / PREDICTIONS, {"step": step, **origin(config, data)}
    try:
        write_predictions(path, data.task.images, rows, facts)
    except OSError as error:  # a full disk ends no training
        log.warning("no %s: %s", path, error.strerror or error)


def origin(config: Config, data: TrainingData) -> dict[str, Any]:
    """What a file of results holds of the run."""
    return {
        "fingerprint": data.shards.fingerprint,
        "selected_on": selected_on(config.data.model_dump()),
    }


def look_at_test(
    config: Config, world: World, data: TrainingData, heart: Heartbeat, *, step: int, saved: int
) -> dict[str, Any]:
    """The result on the test split after the last step; none if its checkpoint is not saved.

    saved: the step of the last checkpoint, on rank 0, which alone writes them.
    """
    if data.test is None or int(world.run_once(lambda: str(saved))) != step:
        return {}
    folder, facts = Path(config.train.output), origin(config, data)
    result = look_once(folder, data.test, world, heart, step=step, facts=facts)
    heart.finish()
    return result


def finish(
    config: Config, world: World, data: TrainingData, result: RunResult, state: TrainState,
    tracker: NullTracker, stop: StopRequest, heart: Heartbeat,
) -> RunResult:  # fmt: skip
    """Looks at the test split, if there is one; records the end in the folder, MLflow and the log.

    Raises:
        OSError: the run is at its end, but its last checkpoint or its outcome cannot be written.
    """
    if world.is_main:  # which alone writes checkpoints: a failure from here on names what is kept
        stop.step = result.saved
    if result.status == "finished":
        test = look_at_test(config, world, data, heart, step=state.step, saved=result.saved)
        result = result._replace(test=test)
    if world.is_main:
        is_whole = result.status == "finished" and result.saved == state.step
        model = hand_over_weights(config, data, tracker) if is_whole else None
        if result.test:
            record_test(Path(config.train.output), result.test, tracker)
        write_final_outcome(config, data, result, state, stop.signal)
        tracker.conclude("FINISHED" if result.status == "finished" else "KILLED", model)
        if result.status == "finished":  # from here on a signal ends the wait for MLflow
            replay = f"python -m dan_dist.tracking replay {config.train.output}"
            stop.where = f"after training; {replay} sends what MLflow has missed"
            stop.wait_for_step = False
    if world.is_main and result.status == "finished":
        report(config, data, state, result)
    return result


def hand_over_weights(config: Config, data: TrainingData, tracker: NullTracker) -> Path | None:
    """The best checkpoint of a finished run, which becomes its model in MLflow.

    A backbone becomes a file of its own instead, which is an artifact of the run; then None.
    """
    best = Path(config.train.output) / BEST
    if not data.task.is_backbone:
        return best
    path = write_backbone(best, run_id=tracker.run_id)
    tracker.artifact(path, "")
    log.info("backbone: a training starts from it by model.backbone=%s", path)
    return None


def record_test(folder: Path, test: Mapping[str, Any], tracker: NullTracker) -> None:
    """The result on the test split in MLflow: test/… at the run's last step, and its files."""
    values = {f"test/{name}": value for name, value in test["metrics"].items()}
    tracker.metrics({**values, "test/looks": len(test["looks"])}, test["step"])
    for name in (RESULT, PREDICTIONS):
        tracker.artifact(folder / name, "")


def write_final_outcome(
    config: Config, data: TrainingData, result: RunResult, state: TrainState, signal: str | None
) -> None:
    """Writes how the run ended into its folder; logs how to resume a preempted run.

    signal: the stop signal that this rank has had.

    Raises:
        OSError: the run finished, but its last checkpoint or its outcome could not be written.
    """
    folder = Path(config.train.output)
    require_checkpoint(folder, done=state.step, saved=result.saved)
    if result.status == "preempted":
        reason = f"{signal or 'a signal to another rank'}: stopped after a checkpoint"
        log.info("%s of step %d; the same command resumes from there", reason, result.saved)
        write_outcome(folder, result.status, step=result.saved, reason=reason)
        return
    if result.saved != state.step:
        raise OSError(
            f"all {state.step} steps are done, but the last checkpoint that could be written is "
            f"that of step {result.saved}; the same command resumes from there"
        )
    figures, split = result.test.get("metrics") or result.metrics, (data.test or data.task).images
    facts = {
        "split": split.name,
        "selected_on": selected_on(config.data.model_dump()),
        **{name: value for name, value in figures.items() if "/" not in name},
    }
    plan = make_plan(config, images=len(data.train), start=0)
    facts["epoch"] = state.best["epoch"] if result.test else plan.epoch(state.step)
    if result.test:
        facts["looks"] = len(result.test["looks"])
    is_early = state.step < plan.total
    reason = f"no better epoch in {config.train.patience} epochs" if is_early else "all steps done"
    write_outcome(folder, "finished", step=result.saved, reason=reason, result=facts)


def require_checkpoint(folder: Path, *, done: int, saved: int) -> None:
    """Refuses to promise that a run resumes from a checkpoint that is not there any more.

    done: steps. saved: the step of the last checkpoint that was written.

    Raises:
        OSError: the folder does not hold it; names what the same command would do.
    """
    kept = steps_saved(folder)
    if not kept or kept[0] != step_path(folder, saved):
        way = f"resumes from {kept[0].name}" if kept else "starts anew"
        raise OSError(
            f"{done} steps are done, but {folder} does not hold the checkpoint of step {saved}; "
            f"the same command {way}"
        )


def report(config: Config, data: TrainingData, state: TrainState, result: RunResult) -> None:
    """The last lines before the tracker's: the result, and where the checkpoints are."""
    best, others, chosen = state.best, dict(state.metrics), selected_on(config.data.model_dump())
    accuracy = others.pop("accuracy")
    log.info(
        "finished after %d steps: accuracy %.2f %% (%.2f %% in epoch %d, best by %s), %s; "
        "chance is %.2f %%", state.step, 100 * accuracy, 100 * best["accuracy"], best["epoch"],
        config.train.select, format_metrics(others), 100 * data.task.chance,
    )  # fmt: skip
    log.info("checkpoints: %s", config.train.output)
    if test := result.test:
        looks = len(test["looks"])
        log.info(
            "result on split '%s' (%d images, %s), selected_on %s, epoch %d: %s; in brackets: %s",
            test["split"], test["images"], "looked at once" if looks == 1 else f"look {looks}",
            chosen, best["epoch"], format_figures(test["metrics"], test["intervals"]), METHOD,
        )  # fmt: skip
    else:
        log.info("selected_on: %s", chosen)
