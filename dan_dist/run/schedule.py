"""The learning rate of each step: a rule for the batch, a warm-up, a decay. Pure."""

import math
from dataclasses import dataclass

from dan_dist.config import Schedule

EXPONENT = {"fixed": 0.0, "linear": 1.0, "sqrt": 0.5}  # of global batch ÷ reference batch


@dataclass(frozen=True)
class LearningRate:
    """Calling it with a step, counted from 1, gives that step's learning rate.

    steps: of the whole run, be it ended early by train.max_steps, so that where it ends changes
    nothing before.
    """

    lr: float  # optim.lr
    global_batch: int
    steps_per_epoch: int
    steps: int
    schedule: Schedule

    @property
    def peak(self) -> float:
        """The learning rate after the warm-up: optim.lr is that of the reference batch."""
        ratio = self.global_batch / self.schedule.reference_batch
        return float(self.lr * ratio ** EXPONENT[self.schedule.lr_rule])

    @property
    def warmup(self) -> int:
        """Its steps; the last one's learning rate is whole."""
        return self.schedule.warmup_steps or round(
            self.schedule.warmup_epochs * self.steps_per_epoch
        )

    def __call__(self, step: int) -> float:
        lr = self.peak * self._decay(step)
        return lr * step / self.warmup if step < self.warmup else lr

    def _decay(self, step: int) -> float:
        """The part of the peak. Cosine begins after the warm-up, the others count all epochs."""
        schedule = self.schedule
        if schedule.name == "cosine":
            past, length = step - 1 - self.warmup, max(1, self.steps - self.warmup)
            share = (1 + math.cos(math.pi * max(0, past) / length)) / 2
            return schedule.floor + (1 - schedule.floor) * share
        epochs = (step - 1) // self.steps_per_epoch
        return float(schedule.gamma ** (epochs // schedule.every))
