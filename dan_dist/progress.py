"""What rank 0 tells while training: a bar, log lines and metrics; and the watch for NaN."""

import logging
import time

import torch
from torch import Tensor
from tqdm import tqdm

from dan_dist.data import Stream
from dan_dist.tracking import NullTracker

log = logging.getLogger(__name__)

PARTS = ("loss", "loss_classification", "loss_fcn", "loss_afn")


class Progress:
    """Follows a run step by step. All ranks keep one: the watch stops them at the same step."""

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
    ) -> None:
        self.tracker, self.stream = tracker, stream
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.global_batch, self.log_every = global_batch, log_every
        self.bar = tqdm(total=total, initial=start, unit="step", disable=None if visible else True)
        self.unchecked: tuple[int, Tensor] | None = None
        self.losses: list[Tensor] = []
        self.restart_clock()

    def step(self, done: int, losses: Tensor, lr: float) -> None:
        """Notes the global losses (4,) of step number `done` (from 1); a log line each interval.

        Raises:
            FloatingPointError: the previous step's loss is not finite. It is looked at one step
                late, when a GPU has finished it, so that looking never makes the GPU wait.
        """
        self.check()
        self.unchecked = done, losses
        self.losses.append(losses)
        self.bar.update()
        if done % self.log_every == 0:
            self._log(done, lr)

    def check(self) -> None:
        """Looks at the last step's loss; called before its weights are evaluated or saved.

        Raises:
            FloatingPointError: it is not finite; names the step and the parts of the loss.
        """
        if self.unchecked is None:
            return
        (step, losses), self.unchecked = self.unchecked, None
        if not torch.isfinite(losses[0]):
            values = zip(PARTS, losses.tolist(), strict=True)
            parts = ", ".join(f"{name} {value:.4g}" for name, value in values)
            raise FloatingPointError(f"the loss is not finite at step {step} ({parts})")

    def evaluated(self, done: int, metrics: dict[str, float], best_accuracy: float) -> None:
        """Tells of an evaluation after step `done`."""
        log.info(
            "epoch %d/%d evaluated: accuracy %.2f %%, mean recall %.2f %%",
            self._epoch(done), self.epochs, 100 * metrics["accuracy"], 100 * metrics["mean_recall"],
        )  # fmt: skip
        values = {f"val/{name}": value for name, value in metrics.items()}
        self.tracker.metrics({**values, "val/best_accuracy": best_accuracy}, done)

    def restart_clock(self) -> None:
        """Starts an interval: so evaluation and saving stay out of the throughput."""
        self.began, self.waited_s = time.perf_counter(), self.stream.wait_s
        self.losses.clear()

    def close(self) -> None:
        self.bar.close()

    def _epoch(self, done: int) -> int:
        return -(-done // self.steps_per_epoch)

    def _log(self, done: int, lr: float) -> None:
        means = torch.stack(self.losses).mean(dim=0).tolist()
        elapsed_s = time.perf_counter() - self.began
        rate = len(self.losses) * self.global_batch / elapsed_s
        wait = (self.stream.wait_s - self.waited_s) / elapsed_s
        log.info(
            "epoch %d/%d step %d loss %.4f (classification %.4f, fcn %.4f, afn %.4f) lr %.2g, "
            "%.0f img/s, waiting for data %.1f %%",
            self._epoch(done), self.epochs, done, *means, lr, rate, 100 * wait,
        )  # fmt: skip
        values = {f"train/{name}": value for name, value in zip(PARTS, means, strict=True)}
        speed = {"train/images_per_s": rate, "train/wait_share": wait, "train/lr": lr}
        epoch = {"train/epoch": done / self.steps_per_epoch}
        self.tracker.metrics({**values, **speed, **epoch}, done)
        self.restart_clock()
