"""The story of a training run: data, network, resume, loop, evaluation, checkpoints."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from dan_dist.build import (
    TrainingData,
    build_engine,
    build_objective,
    open_data,
    open_tracker,
    open_train_loader,
    open_val_loader,
    open_writer,
)
from dan_dist.config import Config, flatten, resolve, write_config
from dan_dist.data.mixture import describe_sets
from dan_dist.distributed.heartbeat import Heartbeat, session
from dan_dist.distributed.world import World
from dan_dist.engine.ddp import Engine
from dan_dist.evaluation.metrics import format_metrics
from dan_dist.header import log_data, log_place
from dan_dist.model.backbone import write_backbone
from dan_dist.monitor import Monitor, save_evidence
from dan_dist.run.checkpoint import BEST, RESUMED, load
from dan_dist.run.folder import (
    CheckpointWriter,
    check_continues,
    checkpoint_to_resume,
    run_folder,
    set_aside_after,
    step_path,
    steps_saved,
)
from dan_dist.run.outcome import (
    Status,
    keep_room,
    open_outcome,
    write_failure,
    write_outcome,
)
from dan_dist.run.plan import Plan, make_plan
from dan_dist.run.signals import Stopped, StopRequest
from dan_dist.run.state import TrainState
from dan_dist.tracking.tracker import NullTracker
from shards.command import words

log = logging.getLogger(__name__)


class RunResult(NamedTuple):
    """How a run ended, and its last evaluation."""

    status: Status
    metrics: dict[str, float]


def main(config: Config, stop: StopRequest | None = None) -> RunResult:
    """Trains on as many ranks as torchrun has started; returns how the run ended.

    stop: asks for the end of the run after a checkpoint; its signal handlers are the caller's.

    Raises:
        ValueError, OSError: bad input, in one line, before training starts.
        FloatingPointError: the loss or the gradient is not finite; names the step.
        Stopped: a stop signal before training.
    """
    folder, stop = Path(config.train.output), stop or StopRequest()
    stop.where = "before training"
    began_s = math.inf  # as long as the folder may be another training's, nothing is written there

    def fail(reason: str) -> None:
        if began_s < math.inf:
            write_failure(folder, step=stop.step, reason=reason, since_s=began_s)

    try:
        with (
            ExitStack() as held,
            session(
                config.train.device,
                timeout_s=config.train.timeout_s,
                on_loss=fail,
                signalled=lambda: stop.signal,
            ) as joint,
        ):
            world, heart = joint
            stop.raise_if_signalled()
            lock = run_folder(folder) if world.is_main else ExitStack()
            world.run_on_all(lambda: held.enter_context(lock))
            world.run_on_all(lambda: keep_room(folder) if world.is_main else None)
            began_s = time.time()
            if world.is_main and not steps_saved(folder):  # an earlier run's stays until it goes on
                write_config(config, folder)
            return run(config, world, stop, heart)
    except Exception as error:
        fail(words(error))
        raise
    except Stopped as stopped:
        if began_s < math.inf and world.is_main and stop.step is None:
            with suppress(OSError):
                line = f"{stopped}: stopped before training"
                write_outcome(folder, "preempted", step=None, reason=line)
        raise
    finally:  # a launcher that has seen another rank die ends this one
        stop.wait_for_step = False


def run(config: Config, world: World, stop: StopRequest, heart: Heartbeat) -> RunResult:
    """One training run in a world that is already there."""
    folder = Path(config.train.output)
    log_place(config, world)
    data = open_data(config, world)
    log_data(config, world, data.shards, data.train, data.task.val)
    resumed = world.run_once(lambda: checkpoint_to_resume(folder, config.train.resume))
    objective = world.run_on_all(
        lambda: build_objective(config, data.class_names, is_new=not resumed)
    )
    steps = make_plan(config, images=len(data.train), start=0).total
    engine = build_engine(config, world, objective, steps=steps)
    state = world.run_on_all(lambda: resume(resumed, config, engine, data))
    plan = make_plan(config, images=len(data.train), start=state.step)
    engine.warm_up(config.model.image_size)  # before the loader, whose GPU work ends a capture
    with (
        world.run_on_all(lambda: open_tracker(config, world, data, state)) as tracker,
        claim_folder(config, world, plan.start),
        open_train_loader(config, world, data.train, start=plan.start) as batches,
        open_val_loader(config, world, data.task.val) as validation,
        open_writer(config, world) as writer,
        Monitor(config.train, world, plan, state, tracker, batches, stop) as monitor,
        save_evidence(config, world, data.train, state),
    ):
        stop.wait_for_step = True
        for step in range(plan.start, plan.total + 1):  # one more than steps: the end is due there
            due = plan.due(step, evaluated=state.evaluated, asked=monitor.asks)
            if due.save:
                monitor.check()  # nothing that is not finite is evaluated or kept
                is_best, state.step = False, step
                state.run_id = tracker.run_id or state.run_id
                if due.evaluate:
                    rows = engine.evaluate(validation, data.task.select, heart)
                    is_best = monitor.evaluated(data.task.judge(rows))
                heart.beat("checkpoint", step)
                content = {**data.describe(config), **state.as_dict(), **engine.state()}
                writer.write(step, content, is_best=is_best)
                monitor.saved()
            if step == plan.total or (due.save and monitor.stop):
                break
            stop.step = step + 1
            heart.beat("reading", step + 1)
            batch = next(batches)
            heart.beat("step", step + 1)
            result = engine.train_step(batch, lr=plan.lr(step + 1), flags=monitor.flags())
            monitor.step(step + 1, batch, result)
        heart.finish()
        return finish(config, world, data, plan, state, writer, tracker, stop)


def resume(path: str, config: Config, engine: Engine, data: TrainingData) -> TrainState:
    """Loads a checkpoint into the engine; returns the run's state. Without a path, a new run's.

    Raises:
        ValueError: it is of another configuration, data set or step. OSError: it cannot be read.
    """
    if not path:
        return TrainState()
    content = read_checkpoint(path, config, data)
    engine.load_state(content)
    log.info("resumed after step %d from %s", content["step"], path)
    return TrainState.from_checkpoint(content)


def read_checkpoint(path: str, config: Config, data: TrainingData) -> dict[str, Any]:
    """The content of a checkpoint that this configuration can go on from.

    Raises:
        ValueError: it is of another configuration, data set or step. OSError: it cannot be read.
    """
    content = load(Path(path), keys=RESUMED)
    if Path(path) != step_path(Path(path).parent, content["step"]):
        raise ValueError(f"{path} is of step {content['step']}")
    sets = describe_sets(data.shards)
    if len(content.get("sets", sets)) != len(sets):
        raise ValueError(
            f"{path} was trained on {' + '.join(content['sets'])}, data.shards holds "
            f"{' + '.join(sets)}: a set joins or leaves only in a new run; give another "
            "train.output"
        )
    check_continues(
        Path(path),
        resolve(content["config"]),
        flatten(config.model_dump()),
        same_data=content["fingerprint"] == data.shards.fingerprint,
    )
    return content


@contextmanager
def claim_folder(config: Config, world: World, step: int) -> Iterator[None]:
    """Makes the folder this run's own: what an earlier one left beyond `step` is set aside."""
    folder = Path(config.train.output)

    def claim() -> None:
        set_aside_after(folder, step)
        write_config(config, folder)
        open_outcome(folder)

    world.run_once(claim)
    yield


def finish(
    config: Config, world: World, data: TrainingData, plan: Plan, state: TrainState,
    writer: CheckpointWriter, tracker: NullTracker, stop: StopRequest,
) -> RunResult:  # fmt: skip
    """Waits for the last checkpoint and records the end, in the folder, in MLflow, in the log.

    Raises:
        OSError: the run is at its end, but its last checkpoint or its outcome cannot be written.
    """
    writer.wait()
    status: Status = "finished" if state.step == plan.total else "preempted"
    if world.is_main:
        stop.step = plan.start if writer.saved is None else writer.saved
        is_whole = status == "finished" and stop.step == plan.total
        model = save_result(config, data, tracker) if is_whole else None
        record_exit(Path(config.train.output), status, state.step, stop)
        tracker.conclude("FINISHED" if status == "finished" else "KILLED", model)
        if status == "finished":  # from here on a signal ends the wait for MLflow
            replay = f"python -m dan_dist.tracking replay {config.train.output}"
            stop.where = f"after training; {replay} sends what MLflow has missed"
            stop.wait_for_step = False
    if world.is_main and status == "finished":
        report(config, data, state)
    return RunResult(status, dict(state.metrics))


def save_result(config: Config, data: TrainingData, tracker: NullTracker) -> Path | None:
    """The checkpoint of a finished run that becomes its model in MLflow.

    A run that has trained a backbone writes that into a file of its own instead; then None.
    """
    best = Path(config.train.output) / BEST
    if not data.task.is_backbone:
        return best
    path = write_backbone(best, run_id=tracker.run_id)
    tracker.artifact(path, "")
    log.info("backbone: a training starts from it by model.backbone=%s", path)
    return None


def record_exit(folder: Path, status: Status, step: int, stop: StopRequest) -> None:
    """Writes the run's outcome; logs the way on for a preempted run.

    stop.step: the last one whose checkpoint is on the disk, from which it would go on.

    Raises:
        OSError: the run finished, but its last checkpoint or its outcome could not be written.
    """
    reason, kept = "all steps done", steps_saved(folder)
    if not kept or kept[0] != step_path(folder, stop.step or 0):
        way = f"goes on from {kept[0].name}" if kept else "starts anew"
        raise OSError(
            f"{step} steps are done, but {folder} does not hold the checkpoint of step "
            f"{stop.step}; the same command {way}"
        )
    if status == "preempted":
        reason = f"{stop.signal or 'a signal to another rank'}: stopped after a checkpoint"
        log.info("%s of step %d; the same command goes on from there", reason, stop.step)
    elif stop.step != step:
        raise OSError(
            f"all {step} steps are done, but the last checkpoint that could be written is that "
            f"of step {stop.step}; the same command goes on from there"
        )
    write_outcome(folder, status, step=stop.step, reason=reason)


def report(config: Config, data: TrainingData, state: TrainState) -> None:
    """The last lines before the tracker's: the result, and where the checkpoints are."""
    best, others = state.best, dict(state.metrics)
    accuracy = others.pop("accuracy")
    log.info(
        "finished after %d steps: accuracy %.2f %% (best %.2f %%, epoch %d), %s; chance is %.2f %%",
        state.step, 100 * accuracy, 100 * best["accuracy"], best["epoch"], format_metrics(others),
        100 * data.task.chance,
    )  # fmt: skip
    log.info("checkpoints: %s", config.train.output)


if __name__ == "__main__":
    raise SystemExit("type: python -m dan_dist train [config.yaml] [section.key=value …]")
