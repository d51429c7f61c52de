"""The story of a training run: data, network, resume, loop, evaluation, checkpoints."""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dan_dist.build import (
    TrainingData,
    build_engine,
    initial_objective,
    open_data,
    open_train_loader,
    open_val_loader,
    open_writer,
    random_objective,
)
from dan_dist.config import Config, flatten, resolve, write_config
from dan_dist.data.mixture import describe_sets, replaced_folders
from dan_dist.distributed.heartbeat import Heartbeat, session
from dan_dist.distributed.world import World
from dan_dist.ending import RunResult, finish, keep_predictions
from dan_dist.engine.ddp import Engine
from dan_dist.engine.resumed import check_state
from dan_dist.header import log_data, log_place
from dan_dist.monitor import Monitor, save_evidence
from dan_dist.record import open_tracker, sample_system
from dan_dist.room import check_room
from dan_dist.run.checkpoint import RESUMED, load
from dan_dist.run.folder import (
    check_continues,
    checkpoint_to_resume,
    locked_run_folder,
    restore_best,
    set_aside_after,
    step_path,
    steps_saved,
)
from dan_dist.run.outcome import Status, keep_room, open_outcome, write_failure, write_outcome
from dan_dist.run.plan import Plan, make_plan
from dan_dist.run.signals import Stopped, StopRequest
from dan_dist.run.state import TrainState
from shards.command import words

log = logging.getLogger(__name__)


def main(config: Config, stop: StopRequest | None = None) -> RunResult:
    """Trains on as many ranks as torchrun has started; returns how the run ended.

    stop: asks for the end of the run after a checkpoint; its signal handlers are the caller's.

    Raises:
        ValueError, OSError: bad input, in one line, before training starts; later, memory or disk
            that does not suffice, or more damaged images than may be replaced.
        FloatingPointError: the loss or the gradient is not finite; names the step.
        Stopped: a stop signal before training.
    """
    folder, stop = Path(config.train.output), stop or StopRequest()
    stop.where = "before training"
    began_s: float | None = None  # before the folder is this training's, nothing is written there

    def fail(reason: str) -> None:
        if began_s is not None:
            write_failure(folder, step=stop.step, reason=reason, since_s=began_s)

    try:
        with (
            ExitStack() as held,
            session(
                config.train.device,
                timeout_s=config.train.timeout_s,
                on_loss=fail,
                signalled=lambda: stop.signal,
                stacks=folder,
            ) as (world, heart),
        ):
            stop.raise_if_signalled()
            lock = locked_run_folder(folder) if world.is_main else ExitStack()
            world.run_on_all(lambda: held.enter_context(lock))
            world.run_on_all(lambda: keep_room(folder) if world.is_main else None)
            began_s = time.time()
            if world.is_main and not steps_saved(folder):  # an earlier run's stays until it resumes
                write_config(config, folder)
            return run(config, world, stop, heart)
    except Exception as error:
        fail(words(error))
        raise
    except Stopped as stopped:
        if began_s is not None and world.is_main and stop.step is None:
            with suppress(OSError):
                line = f"{stopped}: stopped before training"
                write_outcome(folder, "preempted", step=None, reason=line)
        raise
    finally:  # a launcher that has seen another rank die ends this one
        stop.wait_for_step = False


def run(config: Config, world: World, stop: StopRequest, heart: Heartbeat) -> RunResult:
    """One training run in a world that is already there."""
    data, engine, state, plan = prepare(config, world)
    with (
        world.run_on_all(
            lambda: open_tracker(config, world, data.shards, data.splits, data.task.classes, state)
        ) as tracker,
        world.run_on_all(lambda: sample_system(config, world, tracker)),
        claim_folder(config, world, state, plan),
        open_train_loader(config, world, data.train, start=plan.start) as batches,
        open_val_loader(config, world, data.task.images) as validation,
        open_writer(config, world) as writer,
        Monitor(config.train, world, plan, state, tracker, batches, stop) as monitor,
        save_evidence(config, world, data.train, state),
    ):

        def close(step: int) -> Status | None:
            """Evaluates and saves after `step`, where that is due; returns how the run ends."""
            due = plan.due(step, evaluated=state.evaluated, asked=monitor.asks)
            if due.save:
                monitor.check()  # nothing that is not finite is evaluated or kept
                is_best, state.step = False, step
                state.run_id = tracker.run_id or state.run_id
                if due.evaluate:
                    rows = engine.evaluate(validation, data.task.select, heart)
                    is_best = monitor.evaluated(data.task.judge(rows))
                    keep_predictions(config, world, data, rows, step)
                heart.beat("checkpoint", step)
                content = {**data.describe(config), **state.as_dict(), **engine.state()}
                writer.write(step, content, is_best=is_best)
                warn_of_replaced(world, data)
                monitor.saved()
            if plan.is_over(step, best_epoch=state.best.get("epoch")):
                return "finished"
            return "preempted" if due.save and monitor.stop else None

        stop.wait_for_step, step = True, plan.start
        if step == 0:  # the start's own accuracy, chance, is where curves begin
            monitor.start(data.task.judge(engine.evaluate(validation, data.task.select, heart)))
        while (status := close(step)) is None:
            stop.step = step = step + 1
            heart.beat("reading", step)
            batch = next(batches)
            heart.beat("step", step)
            result = engine.train_step(batch, lr=plan.lr(step), flags=monitor.flags())
            monitor.step(step, batch, result)
        heart.finish()
        writer.wait()
        ended = RunResult(status, dict(state.metrics), writer.saved or plan.start)
        return finish(config, world, data, ended, state, tracker, stop, heart)


class Prepared(NamedTuple):
    """What a run needs before it opens its loaders and its record."""

    data: TrainingData
    engine: Engine
    state: TrainState
    plan: Plan


def prepare(config: Config, world: World) -> Prepared:
    """Opens the data, builds the network, and goes on with the run that is in the folder."""
    folder = Path(config.train.output)
    log_place(config, world)
    data = open_data(config, world)
    log_data(config, world, data.shards, data.train, data.task.images)
    world.run_on_all(lambda: check_room(config, world, data.task.classes))
    resumed = world.run_once(lambda: checkpoint_to_resume(folder, config.train.resume))
    objective = world.run_on_all(
        lambda: initial_objective(config, data.class_names, is_new=not resumed)
    )
    steps = make_plan(config, images=len(data.train), start=0).total
    engine = build_engine(config, world, objective, steps=steps)
    state = TrainState()
    if resumed:
        state = resume(world.run_on_all(lambda: read_checkpoint(resumed, config, data)), engine)
        log.info("resumed after step %d from %s", state.step, resumed)
    plan = make_plan(config, images=len(data.train), start=state.step)
    engine.warm_up(config.model.image_size)  # before the loader, whose GPU work ends a capture
    return Prepared(data, engine, state, plan)


def resume(content: dict[str, Any], engine: Engine) -> TrainState:
    """Loads a checkpoint's content into the engine, on all ranks at once; returns the run's state.

    A sharded engine needs every rank for it: none may wait for the others elsewhere.
    """
    engine.load_state(content)
    return TrainState.from_checkpoint(content)


def read_checkpoint(path: str, config: Config, data: TrainingData) -> dict[str, Any]:
    """The content of a checkpoint that this configuration can resume from.

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
    try:
        known = resolve(content["config"])
    except ValueError as error:
        raise ValueError(f"{path} cannot be resumed from: {error}") from error
    check_continues(
        Path(path),
        known,
        flatten(config.model_dump()),
        same_data=content["fingerprint"] == data.shards.fingerprint,
    )
    with torch.device("meta"):
        objective = random_objective(config, len(data.class_names))
    try:
        check_state(content, objective, config.optim)
    except ValueError as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error})") from error
    return content


def warn_of_replaced(world: World, data: TrainingData) -> None:
    """Logs, once a node, where shards were packed over since the run has opened them."""
    for folder in replaced_folders(data.shards) if world.local_rank == 0 else []:
        log.warning(
            "%s holds another set now, or none: this run goes on with the images that it has open, "
            "and a run that is to go on with it needs the former set there", folder,
        )  # fmt: skip


@contextmanager
def claim_folder(config: Config, world: World, state: TrainState, plan: Plan) -> Iterator[None]:
    """Makes the folder this run's own: what an earlier one left beyond its step is set aside.

    Where that was the best checkpoint, `state` knows what is the best one now.
    """
    folder = Path(config.train.output)

    def claim() -> str:
        set_aside_after(folder, state.step)
        write_config(config, folder)
        open_outcome(folder)
        return restore_best(folder, state.step, epoch)

    epoch = plan.epoch(state.step)
    if became := world.run_once(claim):
        state.best = {**state.metrics, "epoch": float(epoch)} if became == "this" else {}
    yield


if __name__ == "__main__":
    raise SystemExit("type: python -m dan_dist train [CONFIG] [section.key=value …]")
