"""The story of a training run: shards, network, resume, loop, evaluation, checkpoints."""

import copy
import json
import logging
import math
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dan_dist import checkpoint
from dan_dist.cache import localise
from dan_dist.config import Config, Schedule, flatten, resolve
from dan_dist.data import TooMuchDamageError, readable_key
from dan_dist.engine import Engine, Votes
from dan_dist.figures import images_figure
from dan_dist.model import cost
from dan_dist.parts import (
    build_engine,
    build_objective,
    make_synthetic,
    open_data,
    open_tracker,
    open_train_stream,
    open_val_stream,
)
from dan_dist.progress import NotFiniteError, Progress, told
from dan_dist.pulse import Pulse, joined
from dan_dist.sampler import steps_per_epoch
from dan_dist.shardset import ShardSet, Split
from dan_dist.stop import (
    Status,
    Stopped,
    StopRequest,
    open_outcome,
    write_failure,
    write_outcome,
)
from dan_dist.task import Task, Verdict
from dan_dist.tracking import NullTracker
from dan_dist.weights import write_backbone
from dan_dist.world import World

log = logging.getLogger(__name__)

# Where a run is before its first step; a checkpoint holds the same
FRESH: dict[str, Any] = {
    "step": 0, "best": {}, "metrics": {}, "evaluated": None, "right": None,
    "replaced": 0, "replaced_since": None, "figures": [], "run_id": None,
}  # fmt: skip


class Ended(NamedTuple):
    """How a run ended, and its last evaluation."""

    status: Status
    metrics: dict[str, float]


def main(config: Config, stop: StopRequest | None = None) -> Ended:
    """Trains as `config` says, on as many ranks as torchrun started; returns how it ended.

    stop: what tells that the run is to end after a checkpoint; its handlers are the caller's.

    Raises:
        ValueError, OSError: bad input, in one line, before training starts.
        FloatingPointError: the loss or the gradient is not finite; names the step.
        Stopped: a stop signal before training.
    """
    folder, stop = Path(config.train.output), stop or StopRequest()
    began_s = math.inf  # as long as the folder may be another training's, nothing is written there

    def fail(reason: str) -> None:
        if began_s < math.inf:
            write_failure(folder, step=stop.step, reason=reason, since_s=began_s)

    try:
        with (
            ExitStack() as held,
            joined(config.train.device, timeout_s=config.train.timeout_s, on_loss=fail) as joint,
        ):
            world, pulse = joint
            stop.heed()
            own = checkpoint.alone(folder) if world.is_main else ExitStack()
            world.together(lambda: held.enter_context(own))
            began_s = time.time()
            return run(config, world, stop, pulse)
    except Exception as error:
        fail(str(error).split("\n")[0])
        raise
    except Stopped as stopped:
        if began_s < math.inf and world.is_main:
            with suppress(OSError):
                line = f"{stopped}: stopped before training"
                write_outcome(folder, "preempted", step=None, reason=line)
        raise
    finally:  # a launcher that has seen another rank die ends this one
        stop.wait_for_step = False


def run(config: Config, world: World, stop: StopRequest, pulse: Pulse) -> Ended:
    """One training run in a world that is already there."""
    world.once(lambda: make_synthetic(config))
    cached = world.once(lambda: localise(config.data.shards, config.data.cache), per_node=True)
    shards, train, task = world.together(lambda: open_data(config, world, cached))
    class_names = shards.class_names[: task.classes]
    chosen = world.once(lambda: choose(config))
    objective = world.together(lambda: build_objective(config, class_names, is_new=not chosen))
    engine = build_engine(config, world, objective)
    state = world.together(lambda: resume(config, engine, shards, chosen))
    start = state["step"]
    steps = steps_per_epoch(len(train), config.train.global_batch)
    total = min(steps * config.train.epochs, config.train.max_steps or steps * config.train.epochs)
    if start > total:
        raise ValueError(
            f"train.output {config.train.output} is at step {start} already, "
            f"train.epochs and train.max_steps end at {total}"
        )
    tracker = world.together(lambda: open_tracker(config, world, shards, state))
    world.once(lambda: take_over(config, start))
    tracker.metrics(
        cost(task.classes, config.model.heads, config.model.image_size,
             cosine=objective.margin is not None), 0,
    )  # fmt: skip
    batches = open_train_stream(config, world, shards, train, start=start)
    validation = open_val_stream(config, world, shards, task.val)
    progress = Progress(
        tracker, batches, visible=world.is_main, start=start, total=total,
        epochs=config.train.epochs, steps_per_epoch=steps, replaced=state["replaced"],
        replaced_since=state["replaced_since"], figures=state["figures"],
        global_batch=config.train.global_batch, log_every=config.train.log_every,
        max_skipped=config.train.max_skipped_steps,
    )  # fmt: skip
    writer = checkpoint.Writer(
        Path(config.train.output), keep=config.train.keep_checkpoints,
        stop_on_error=config.train.checkpoint_errors == "stop",
    )  # fmt: skip
    due = Timer(config.train.checkpoint_minutes)
    status: Status = "failed"
    model: Path | None = None
    may_compile = True  # the first evaluation of this process

    def keep(done: int, *, evaluate: bool) -> None:
        """Evaluates, if that is due, and writes the checkpoint of a step."""
        nonlocal may_compile
        progress.check()
        state.update(step=done, replaced=progress.replaced, figures=progress.figures)
        state["replaced_since"], is_best = progress.replaced_since, False
        if evaluate:
            advance = partial(pulse.advance, patient=may_compile)
            verdict = task.judge(engine.evaluate(*validation, task.keep, advance))
            may_compile = False
            is_best = note(verdict, -(-done // steps), state, progress, tracker)
        pulse.advance(f"checkpoint of step {done}", patient=True)  # the disk may be slow
        learned = engine.state()  # gathered from all ranks, where they share it
        if world.is_main:
            described = describe(config, shards, class_names, state, tracker.run_id)
            content = {**described, **learned}
            writer.write(done, content, is_best=is_best)
        progress.save = False
        due.restart()
        progress.restart_clock()

    stop.wait_for_step = True
    try:
        if start == total and state["evaluated"] != start:  # in mid-epoch, of a longer run
            keep(start, evaluate=True)
        for done in range(start + 1, total + 1):
            stop.step, is_first = done, done == start + 1  # which may compile
            pulse.advance(f"step {done}, reading", patient=is_first)
            batch = next(batches)
            pulse.advance(f"step {done}", patient=is_first)
            lr = learning_rate(config.optim.lr, config.schedule, (done - 1) // steps)
            votes = Votes(stop.signal is not None, world.is_main and due(), batches.replaced)
            result = engine.train_step(batch, lr=lr, votes=votes)
            progress.step(done, batch, result, lr)
            if done == 1:
                tracker.figure("training_images.png", images_figure, *batch[:2], shards.class_names)
            at_end = done % steps == 0 or done == total
            at_interval = done % (config.train.checkpoint_every or total) == 0
            if not (at_end or at_interval or progress.stop or progress.save):
                continue
            keep(done, evaluate=at_end)
            if progress.stop and done < total:
                ended: Status = "preempted"
                break
        else:
            ended = "finished"
        pulse.rest()
        writer.wait()
        if world.is_main:
            stop.step = start if writer.saved is None else writer.saved
            if ended == "finished" and stop.step == total:
                model = leave(config, tracker, task)
            write_end(config, ended, state["step"], stop)
        status = ended
        if status == "finished":
            report(config, world, tracker, task, state)
    except TooMuchDamageError:
        if progress.replaced_since is not None:
            with suppress(OSError):
                checkpoint.note_damage(Path(config.train.output), progress.replaced_since)
        raise
    except NotFiniteError as error:
        with suppress(OSError):
            save_evidence(config, world, train, error)
        raise
    finally:
        progress.close()
        writer.close()
        ends = {"finished": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}
        tracker.end(ends[status], model)
        batches.close()
        validation[0].close()
    return Ended(status, dict(state["metrics"]))


def note(
    verdict: Verdict, epoch: int, state: dict[str, Any], progress: Progress, tracker: NullTracker
) -> bool:
    """Notes in `state` and MLflow what an evaluation gave; returns whether it is the best."""
    metrics = verdict.metrics
    is_best = bool(metrics["accuracy"] > state["best"].get("accuracy", -1.0))
    if is_best:
        state["best"] = {**metrics, "epoch": epoch}
        tracker.figure(verdict.picture.name, verdict.picture.draw, *verdict.picture.values)
    state["metrics"], state["evaluated"] = metrics, state["step"]
    state["right"] = torch.from_numpy(verdict.right)
    progress.evaluated(state["step"], metrics, state["best"]["accuracy"])
    return is_best


def write_end(config: Config, status: Status, step: int, stop: StopRequest) -> None:
    """Says how the run ended, in its folder and, where it will go on, on the screen.

    stop.step: the last one whose checkpoint is on the disk, from which it would go on.

    Raises:
        OSError: the run finished, but its end could not be written.
    """
    reason = "all steps done"
    if status == "preempted":
        reason = f"{stop.signal or 'a signal to another rank'}: stopped after a checkpoint"
        log.info("%s of step %d; the same command goes on from there", reason, stop.step)
    elif stop.step != step:
        raise OSError(
            f"all {step} steps are done, but the last checkpoint that could be written is that "
            f"of step {stop.step}; the same command goes on from there"
        )
    write_outcome(Path(config.train.output), status, step=stop.step, reason=reason)


class Timer:
    """Whether `minutes` have passed since the start or the last restart; never, if None."""

    def __init__(self, minutes: float | None) -> None:
        self._seconds = minutes * 60 if minutes else math.inf
        self.restart()

    def __call__(self) -> bool:
        return time.monotonic() - self._began_s > self._seconds

    def restart(self) -> None:
        self._began_s = time.monotonic()


def learning_rate(base: float, schedule: Schedule, epoch: int) -> float:
    """The learning rate of an epoch (from 0): times gamma each epoch, or each `every` epochs."""
    return base * schedule.gamma ** (epoch // schedule.every)


def choose(config: Config) -> str:
    """The newest readable checkpoint of `train.output`, from which all ranks go on; "" if none.

    Raises:
        ValueError: none can be read, or train.resume is "never" and there is one.
    """
    folder = Path(config.train.output)
    if config.train.resume == "never" and (paths := checkpoint.steps_saved(folder)):
        raise ValueError(
            f"train.output {folder} holds {paths[0].name} of an earlier run; train.resume=auto "
            "goes on with it, another train.output starts anew"
        )
    found = checkpoint.newest(folder)
    return str(found[0]) if found else ""


def resume(config: Config, engine: Engine, shards: ShardSet, chosen: str) -> dict[str, Any]:
    """Puts the chosen checkpoint, if there is one, into the engine; says where the run was.

    Raises:
        ValueError: it is of another configuration, data set or step. OSError: it cannot be read.
    """
    fresh = copy.deepcopy(FRESH)
    if not chosen:
        return fresh
    path = Path(chosen)
    content = checkpoint.load(path, keys=checkpoint.RESUMED)
    if path != checkpoint.step_path(path.parent, content["step"]):
        raise ValueError(f"{path} is of step {content['step']}")
    checkpoint.check_continues(
        path,
        resolve(content["config"]),
        flatten(config.model_dump()),
        same_data=content["fingerprint"] == shards.fingerprint,
    )
    engine.load_state(content)
    log.info("resumed after step %d from %s", content["step"], path)
    return {key: content.get(key, fresh[key]) for key in fresh}


def take_over(config: Config, step: int) -> None:
    """Makes `train.output` this run's own: what an earlier one left beyond `step` goes."""
    folder = Path(config.train.output)
    checkpoint.forget_later(folder, step)
    open_outcome(folder)


def describe(
    config: Config, shards: ShardSet, class_names: tuple[str, ...], state: dict[str, Any],
    run_id: str | None,
) -> dict[str, Any]:  # fmt: skip
    """What a checkpoint says beside what was learned: where the run is, and of what it is."""
    return {
        **state,
        "run_id": run_id or state["run_id"],
        "config": config.model_dump(),
        "class_names": list(class_names),
        "fingerprint": shards.fingerprint,
    }


def save_evidence(config: Config, world: World, train: Split, error: NotFiniteError) -> None:
    """Writes what is needed to look into a step that is not finite: `not-finite-rank<r>.json`."""
    ids = [i for i in error.batch.ids.tolist() if i >= 0]
    content = {
        "step": error.step,
        "seed": config.train.seed,
        "rank": world.rank,
        "world_size": world.size,
        "fault": str(error),
        "ids": ids,
        "keys": [readable_key(train, i) for i in ids],
    }
    path = Path(config.train.output) / f"not-finite-rank{world.rank}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")


def report(
    config: Config, world: World, tracker: NullTracker, task: Task, state: dict[str, Any]
) -> None:
    """The last lines: what came out and where to look."""
    if not world.is_main:
        return
    best, others = state["best"], dict(state["metrics"])
    accuracy = others.pop("accuracy")
    log.info(
        "finished after %d steps: accuracy %.2f %% (best %.2f %%, epoch %d), %s; chance is %.2f %%",
        state["step"], 100 * accuracy, 100 * best["accuracy"], best["epoch"], told(others),
        100 * task.chance,
    )  # fmt: skip
    log.info("checkpoints: %s", config.train.output)
    if tracker.where:
        log.info("look at the run: %s", tracker.where)


def leave(config: Config, tracker: NullTracker, task: Task) -> Path | None:
    """What a finished run is good for: returns the checkpoint that becomes its model in MLflow.

    Or, where it has trained a backbone, writes that in a file of its own, and returns None.
    """
    best = Path(config.train.output) / checkpoint.BEST
    if not task.is_backbone:
        return best
    path = write_backbone(best, run_id=tracker.run_id)
    tracker.artifact(path, "")
    log.info("backbone: a training starts from it by model.backbone=%s", path)
    return None
