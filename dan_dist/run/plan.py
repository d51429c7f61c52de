"""A run's arithmetic: steps, epochs, learning rates, and what is due after each step. Pure."""

from dataclasses import dataclass
from typing import NamedTuple

from dan_dist.config import Config, Schedule


class Due(NamedTuple):
    """What is to be done with the weights after a step."""

    evaluate: bool
    save: bool


@dataclass(frozen=True)
class Plan:
    """The steps of a run. Steps are counted from 1; step 0 is the start."""

    start: int  # the step that a run goes on after
    steps_per_epoch: int
    epochs: int
    total: int
    base_lr: float
    schedule: Schedule
    checkpoint_every: int | None  # steps

    def epoch(self, step: int) -> int:
        """The epoch, from 1, that `step` belongs to."""
        return -(-step // self.steps_per_epoch)

    def lr(self, step: int) -> float:
        """The learning rate of `step`: times gamma each `every` epochs."""
        past = (step - 1) // self.steps_per_epoch
        return self.base_lr * self.schedule.gamma ** (past // self.schedule.every)

    def due(self, step: int, *, evaluated: int | None, asked: bool) -> Due:
        """What is due after `step`: at an epoch's end both, at an interval or when asked a save.

        evaluated: the step of the last evaluation, which is not repeated. asked: a rank asks for a
        checkpoint.
        """
        is_end = step > 0 and (step % self.steps_per_epoch == 0 or step == self.total)
        evaluate = is_end and evaluated != step
        is_interval = self.checkpoint_every is not None and step % self.checkpoint_every == 0
        return Due(evaluate, evaluate or (step > self.start and (is_interval or asked)))


def make_plan(config: Config, *, images: int, start: int) -> Plan:
    """The plan of a run over so many training images that goes on after step `start`.

    Raises:
        ValueError: the run is beyond its end already.
    """
    train = config.train
    steps_per_epoch = images // train.global_batch
    total = min(steps_per_epoch * train.epochs, train.max_steps or steps_per_epoch * train.epochs)
    if start > total:
        raise ValueError(
            f"train.output {train.output} is at step {start} already, "
            f"train.epochs and train.max_steps end at {total}"
        )
    return Plan(
        start, steps_per_epoch, train.epochs, total, config.optim.lr, config.schedule,
        train.checkpoint_every,
    )  # fmt: skip
