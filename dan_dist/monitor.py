"""Follows a run step by step: progress bar, log lines, metrics; the ranks' flags; finite losses."""

import json
import logging
import math
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from dan_dist.config import Config, Train
from dan_dist.data.loader import Batch, Loader
from dan_dist.data.reader import TooMuchDamageError, readable_key
from dan_dist.distributed.world import World
from dan_dist.engine.ddp import StepFlags, StepResult
from dan_dist.engine.readout import Readout
from dan_dist.evaluation.figures import images_figure
from dan_dist.evaluation.judge import EvaluationResult
from dan_dist.evaluation.metrics import format_metrics
from dan_dist.pace import Pace
from dan_dist.profile import StepProfiler
from dan_dist.run.folder import mark_damage
from dan_dist.run.plan import Plan
from dan_dist.run.signals import StopRequest
from dan_dist.run.state import TrainState
from dan_dist.tracking.tracker import NullTracker
from shards.files import write_atomically
from shards.format import Split

log = logging.getLogger(__name__)

PARTS = ("loss", "loss_classification", "loss_fcn", "loss_afn")


class NotFiniteError(FloatingPointError):
    """The loss or the gradient of a step is not finite."""

    def __init__(self, step: int, batch: Batch, line: str) -> None:
        super().__init__(line)
        self.step, self.batch = step, batch


class _Unread(NamedTuple):
    """A step whose figures are still on the device."""

    step: int
    batch: Batch
    result: StepResult
    figures: Readout
    step_s: float | None  # that it took; None where something else happened since the one before
    is_timed: bool  # no trace slowed it


class Monitor:
    """Rank 0's bar, log lines and metrics, and all ranks' agreement on when to save or stop.

    All ranks have one. `stop` and `save` are set once any rank has asked for it, one step late. It
    keeps `state` up to date: metrics, replaced images, the figures of the next log line.
    """

    def __init__(
        self, options: Train, world: World, plan: Plan, state: TrainState, tracker: NullTracker,
        loader: Loader, stop: StopRequest,
    ) -> None:  # fmt: skip
        self.stop = self.save = False
        self._options, self._plan, self._state = options, plan, state
        self._tracker, self._loader, self._request = tracker, loader, stop
        self._is_main, self._world, self._pace = world.is_main, world, Pace(world)
        self._own_s, self._seen_wait_s, self._last_s = 0.0, loader.wait_s, math.inf
        self._profiler = StepProfiler(Path(options.output), world, options.profile)
        self._unread: _Unread | None = None
        if world.store is not None:
            world.store.set(f"node/{world.rank}", socket.gethostname())
        self._bar = tqdm(
            total=plan.total,
            initial=plan.start,
            unit="step",
            disable=None if self._is_main else True,
        )
        self.saved()

    def __enter__(self) -> "Monitor":
        self._profiler.__enter__()
        return self

    def __exit__(self, *given: object) -> None:
        self._profiler.__exit__(*given)
        self._bar.close()
        if self._is_main and self._options.profile:  # of all nodes whose disk is this one's
            for path in sorted(self._profiler.folder.glob("*.json.gz")):
                self._tracker.artifact(path, self._profiler.folder.name)

    @property
    def asks(self) -> bool:
        """Whether any rank has asked for a checkpoint, be it the last one."""
        return self.stop or self.save

    def flags(self) -> StepFlags:
        """This rank's part of the next step's flags: a signal, the clock, damaged images, times.

        What it has computed by itself is that of the step before.
        """
        minutes = self._options.checkpoint_minutes
        is_late = minutes is not None and time.monotonic() - self._saved_s > 60 * minutes
        asked = self._request.signal is not None
        wait_s, self._seen_wait_s = self._loader.wait_s - self._seen_wait_s, self._loader.wait_s
        late = self._is_main and is_late
        return StepFlags(asked, late, self._loader.replaced, wait_s, wait_s + self._own_s)

    def step(self, step: int, batch: Batch, result: StepResult) -> None:
        """Takes the result of a step; a log line each interval.

        Raises:
            NotFiniteError: the previous step's loss or gradient is not finite. It is looked at one
                step late, when a GPU has finished it and is at this one, so that the GPU waits for
                log lines alone.
        """
        self.check()
        numbers = torch.cat(
            [result.losses, result.grad_norm[None], result.flags, result.accuracy[None],
             result.ranks]
        )  # fmt: skip
        now_s, self._own_s = time.perf_counter(), result.own_s
        step_s = now_s - self._last_s if self._last_s < now_s else None
        self._last_s = now_s
        is_traced = self._profiler.step()
        self._unread = _Unread(step, batch, result, Readout(numbers), step_s, not is_traced)
        self._timed_steps += 1
        if is_traced:
            self._restart_clock()
            self._last_s = math.inf
        self._bar.update()
        if step == 1:
            names = self._loader.reader.split.class_names
            shown = (batch.images, batch.labels, names)
            self._tracker.figure("training_images.png", images_figure, *shown)
        if step % self._options.log_every == 0:
            self.check()
            self._log(step)

    def check(self) -> None:
        """Looks at the last step's result; called before its weights are evaluated or saved.

        Raises:
            NotFiniteError: names the step, the parts of the loss and the gradient's norm.
        """
        if self._unread is None:
            return
        (step, batch, result, figures, step_s, is_timed), self._unread = self._unread, None
        found = figures.read()
        losses, norm, (stop, save, replaced) = found[:4], found[4], found[5:8]
        if is_timed:
            self._pace.add(found[9:], step_s)
        self.stop |= stop > 0
        self.save |= save > 0
        self._state.replaced += int(replaced)
        if replaced and self._state.replaced_since is None:
            self._state.replaced_since = step
        if math.isfinite(losses[0]) and math.isfinite(norm):
            self._state.figures.append(found[:5])
            self._state.accuracies.append(found[8])
            return
        values = zip((*PARTS, "gradient norm"), (*losses, norm), strict=True)
        parts = ", ".join(f"{name} {value:.4g}" for name, value in values)
        what = "gradient" if math.isfinite(losses[0]) else "loss"
        line = f"the {what} is not finite at step {step} ({parts})"
        self._state.skipped += result.skipped
        skipped, most = self._state.skipped, self._options.max_skipped_steps
        if not result.skipped or skipped > most:
            raise NotFiniteError(step, batch, line)
        log.warning("%s: skipped, the %d. of at most %d", line, skipped, most)

    def start(self, result: EvaluationResult) -> None:
        """Records the evaluation of the start: the first point of each curve, near chance.

        Its accuracy is the first metric of the run, on which MLflow's pages then open.
        """
        log.info("at the start: %s", format_metrics(result.metrics))
        self._tracker.metrics(validation_values(result), 0)
        self._restart_clock()

    def _name_late_ranks(self) -> None:
        """A line for each rank that held the others up through the epoch."""
        for rank, late_s, steps in self._pace.late_ranks():
            if not self._is_main:
                continue
            assert self._world.store is not None
            node = self._world.store.get(f"node/{rank}").decode()
            log.warning(
                "rank %d on %s holds the others up: %.3f s a step longer than they until it meets "
                "them, in %d steps of the epoch", rank, node, late_s, steps,
            )  # fmt: skip

    def evaluated(self, result: EvaluationResult) -> bool:
        """Records an evaluation after `state.step`; returns whether it is the best."""
        state, metrics, chosen = self._state, result.metrics, self._options.select
        epoch = self._plan.epoch(state.step)
        is_best = metrics[chosen] > state.best.get(chosen, -1.0)
        if is_best:
            state.best = {**metrics, "epoch": epoch}
            figure, run = result.figure, Path(self._options.output).name
            title = f"{run}, epoch {epoch}, on {figure.title}"
            self._tracker.figure(figure.name, figure.draw, *figure.values, title)
        state.metrics, state.evaluated = metrics, state.step
        state.right = torch.from_numpy(result.right)
        log.info("epoch %d/%d evaluated: %s", epoch, self._plan.epochs, format_metrics(metrics))
        best = {f"val/best_{name}": state.best[name] for name in {"accuracy", chosen}}
        self._tracker.metrics({**validation_values(result), **best}, state.step)
        if state.step % self._plan.steps_per_epoch == 0:
            self._name_late_ranks()
        return is_best

    def saved(self) -> None:
        """A checkpoint is under way: the clock to the next one, and of the throughput, restarts."""
        self.save, self._saved_s, self._last_s = False, time.monotonic(), math.inf
        self._restart_clock()

    def _restart_clock(self) -> None:
        """Evaluation and saving stay out of the throughput."""
        self._began_s, self._waited_s = time.perf_counter(), self._loader.wait_s
        self._timed_steps = 0
        self._pace.restart()

    def _log(self, step: int) -> None:
        figures = self._state.figures
        if not figures:  # every step of the interval was skipped
            return
        *means, norm = (sum(column) / len(column) for column in zip(*figures, strict=True))
        elapsed_s = time.perf_counter() - self._began_s
        rate = self._timed_steps * self._options.global_batch / elapsed_s
        wait, lr = (self._loader.wait_s - self._waited_s) / elapsed_s, self._plan.lr(step)
        ranks, most = self._pace.metrics(elapsed_s), ""
        if self._world.size > 1:
            share, rank = 100 * ranks["train/wait_share_max"], self._pace.slowest()
            most = f" (rank {rank}: {share:.1f} %)"
        log.info(
            "epoch %d/%d step %d loss %.4f (classification %.4f, fcn %.4f, afn %.4f) lr %.2g, "
            "%.0f img/s, waiting for data %.1f %%%s",
            self._plan.epoch(step), self._plan.epochs, step, *means, lr, rate, 100 * wait, most,
        )  # fmt: skip
        values = {f"train/{name}": value for name, value in zip(PARTS, means, strict=True)}
        if self._timed_steps:  # else all of the interval was traced
            values |= {"train/images_per_s": rate, "train/wait_share": wait}
            values |= ranks if self._world.size > 1 else {}
        others = {
            "train/lr": lr,
            "train/epoch": step / self._plan.steps_per_epoch,
            "train/gradient_norm": norm,
            "train/replaced_images": self._state.replaced,
        }
        if accuracies := self._state.accuracies:  # not in a checkpoint of an earlier version
            others["train/accuracy"] = sum(accuracies) / len(accuracies)
        self._tracker.metrics({**values, **others}, step)
        figures.clear()
        accuracies.clear()
        self._restart_clock()


def validation_values(result: EvaluationResult) -> dict[str, float]:
    """An evaluation's metrics by MLflow's names, the accuracy first."""
    first = {"val/accuracy": result.metrics["accuracy"]}
    loss = {} if result.loss is None else {"val/loss": result.loss}
    return first | loss | {f"val/{name}": value for name, value in result.metrics.items()}


@contextmanager
def save_evidence(config: Config, world: World, split: Split, state: TrainState) -> Iterator[None]:
    """Leaves in the run's folder what is needed to look into a failure of the block.

    Of a step that is not finite `not-finite-rank<r>.json`; of too many damaged images of `split`,
    which is trained on, the mark that makes the next run resume from a checkpoint before them.
    """
    folder = Path(config.train.output)
    try:
        yield
    except TooMuchDamageError as error:
        # Of validation or test images nothing was learned.
        if error.split is split and state.replaced_since is not None:
            with suppress(OSError):
                mark_damage(folder, state.replaced_since)
        raise
    except NotFiniteError as error:
        ids = [i for i in error.batch.ids.tolist() if i >= 0]
        content = {
            "step": error.step,
            "seed": config.train.seed,
            "rank": world.rank,
            "world_size": world.size,
            "fault": str(error),
            "ids": ids,
            "keys": [readable_key(split, i) for i in ids],
        }
        with suppress(OSError):
            path = folder / f"not-finite-rank{world.rank}.json"
            write_atomically(path, json.dumps(content, indent=1) + "\n")
        raise
