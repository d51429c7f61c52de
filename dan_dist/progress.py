"""What rank 0 tells while training: a bar, log lines and metrics; and what all ranks watch for:
a loss that is not finite, and what they have asked of each other.
"""

import logging
import math
import time
from collections.abc import Mapping

import torch
from tqdm import tqdm

from dan_dist.data import Batch, Stream
from dan_dist.engine import StepResult, Votes
from dan_dist.tracking import NullTracker

log = logging.getLogger(__name__)

PARTS = ("loss", "loss_classification", "loss_fcn", "loss_afn")


class NotFiniteError(FloatingPointError):
    """The loss or the gradient of a step is not finite."""

    def __init__(self, step: int, batch: Batch, line: str) -> None:
        super().__init__(line)
        self.step, self.batch = step, batch


class Progress:
    """Follows a run step by step. All ranks keep one: the watch stops them at the same step.

    `stop` and `save` are set once any rank has asked for it, one step late; `replaced` is the
    number of images so far that stood in for damaged ones, `replaced_since` the first such step;
    `figures` are the losses and the gradient's norm of each step since the last log line, which
    checkpoints keep: what is told does not depend on interruptions.
    """

    def __init__(
        self,
        tracker: NullTracker,
        stream: Stream,
        *,
        visible: bool,
        start: int,
        total: int,
        epochs: int,
        steps_per_epoch: int,
        global_batch: int,
        log_every: int,
        replaced: int,
        replaced_since: int | None,
        figures: list[list[float]],
        max_skipped: int,
    ) -> None:
        self.stop = self.save = False
        self.replaced, self.replaced_since = replaced, replaced_since
        self.skipped, self.max_skipped = 0, max_skipped
        self.tracker, self.stream = tracker, stream
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.global_batch, self.log_every = global_batch, log_every
        self.bar = tqdm(total=total, initial=start, unit="step", disable=None if visible else True)
        self.unchecked: tuple[int, Batch, StepResult] | None = None
        self.figures = list(figures)
        self.restart_clock()

    def step(self, done: int, batch: Batch, result: StepResult, lr: float) -> None:
        """Notes the result of step number `done` (from 1); a log line each interval.

        Raises:
            NotFiniteError: the previous step's loss or gradient is not finite. It is looked at one
                step late, when a GPU has finished it, so that looking makes the GPU wait for log
                lines alone.
        """
        self.check()
        self.unchecked = done, batch, result
        self.timed_steps += 1
        self.bar.update()
        if done % self.log_every == 0:
            self.check()
            self._log(done, lr)

    def check(self) -> None:
        """Looks at the last step's result; called before its weights are evaluated or saved.

        Raises:
            NotFiniteError: names the step, the parts of the loss and the gradient's norm.
        """
        if self.unchecked is None:
            return
        (step, batch, result), self.unchecked = self.unchecked, None
        found = torch.cat([result.losses, result.grad_norm[None], result.votes]).tolist()
        losses, norm, votes = found[:4], found[4], Votes(*found[5:])
        self.stop |= votes.stop > 0
        self.save |= votes.save > 0
        self.replaced += int(votes.replaced)
        if votes.replaced and self.replaced_since is None:
            self.replaced_since = step
        if math.isfinite(losses[0]) and math.isfinite(norm):
            self.figures.append(found[:5])
            return
        values = zip((*PARTS, "gradient norm"), (*losses, norm), strict=True)
        parts = ", ".join(f"{name} {value:.4g}" for name, value in values)
        what = "gradient" if math.isfinite(losses[0]) else "loss"
        line = f"the {what} is not finite at step {step} ({parts})"
        self.skipped += result.skipped
        if not result.skipped or self.skipped > self.max_skipped:
            raise NotFiniteError(step, batch, line)
        log.warning("%s: skipped, the %d. of at most %d", line, self.skipped, self.max_skipped)

    def evaluated(self, done: int, metrics: dict[str, float], best_accuracy: float) -> None:
        """Tells of an evaluation after step `done`."""
        log.info("epoch %d/%d evaluated: %s", self._epoch(done), self.epochs, told(metrics))
        values = {f"val/{name}": value for name, value in metrics.items()}
        self.tracker.metrics({**values, "val/best_accuracy": best_accuracy}, done)

    def restart_clock(self) -> None:
        """Evaluation and saving stay out of the throughput."""
        self.began, self.waited_s = time.perf_counter(), self.stream.wait_s
        self.timed_steps = 0

    def close(self) -> None:
        self.bar.close()

    def _epoch(self, done: int) -> int:
        return -(-done // self.steps_per_epoch)

    def _log(self, done: int, lr: float) -> None:
        if not self.figures:  # every step of the interval was skipped
            return
        *means, norm = (sum(column) / len(column) for column in zip(*self.figures, strict=True))
        elapsed_s = time.perf_counter() - self.began
        rate = self.timed_steps * self.global_batch / elapsed_s
        wait = (self.stream.wait_s - self.waited_s) / elapsed_s
        log.info(
            "epoch %d/%d step %d loss %.4f (classification %.4f, fcn %.4f, afn %.4f) lr %.2g, "
            "%.0f img/s, waiting for data %.1f %%",
            self._epoch(done), self.epochs, done, *means, lr, rate, 100 * wait,
        )  # fmt: skip
        values = {f"train/{name}": value for name, value in zip(PARTS, means, strict=True)}
        speed = {"train/images_per_s": rate, "train/wait_share": wait, "train/lr": lr}
        others = {
            "train/epoch": done / self.steps_per_epoch,
            "train/gradient_norm": norm,
            "train/replaced_images": self.replaced,
        }
        self.tracker.metrics({**values, **speed, **others}, done)
        self.figures.clear()
        self.restart_clock()


def told(metrics: Mapping[str, float]) -> str:
    """Shares as text, but those of single classes ("recall/happy")."""
    whole = {name.replace("_", " "): share for name, share in metrics.items() if "/" not in name}
    return ", ".join(f"{name} {100 * share:.2f} %" for name, share in whole.items())
