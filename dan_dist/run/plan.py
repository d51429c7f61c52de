"""A run's arithmetic: steps, epochs, learning rates, and what is due after each step. Pure."""

from dataclasses import dataclass
from typing import NamedTuple

from dan_dist.config import Config
from dan_dist.run.schedule import LearningRate


class Due(NamedTuple):
    """What is to be done with the weights after a step."""

    evaluate: bool
    save: bool


@dataclass(frozen=True)
class Plan:
    """The steps of a run. Steps are counted from 1; step 0 is the start."""

    start: int  # the step after which a run resumes
    steps_per_epoch: int
    epochs: int
    total: int
    lr: LearningRate  # of a step: plan.lr(step)
    checkpoint_every: int | None  # steps
    patience: int | None = None  # epochs

    def epoch(self, step: int) -> int:
        """The epoch, from 1, that `step` belongs to."""
        return -(-step // self.steps_per_epoch)

    def due(self, step: int, *, evaluated: int | None, asked: bool) -> Due:
        """What is due after `step`: at an epoch's end both, at an interval or when asked a save.

        evaluated: the step of the last evaluation, which is not repeated. asked: a rank asks for a
        checkpoint.
        """
        is_end = step > 0 and (step % self.steps_per_epoch == 0 or step == self.total)
        evaluate = is_end and evaluated != step
        is_interval = self.checkpoint_every is not None and step % self.checkpoint_every == 0
        return Due(evaluate, evaluate or (step > self.start and (is_interval or asked)))

    def is_over(self, step: int, *, best_epoch: float | None) -> bool:
        """Whether the run ends after `step`: its last one, or `patience` epochs without gain.

        best_epoch: None before the first evaluation.
        """
        if step == self.total or self.patience is None or best_epoch is None:
            return step == self.total
        is_whole = step % self.steps_per_epoch == 0
        return is_whole and self.epoch(step) - best_epoch >= self.patience


def make_plan(config: Config, *, images: int, start: int) -> Plan:
    """The plan of a run over so many training images that resumes after step `start`.

    Raises:
        ValueError: the run is beyond its end already.
    """
    train = config.train
    steps_per_epoch = images // train.global_batch
    whole = steps_per_epoch * train.epochs
    total = min(whole, train.max_steps or whole)
    if start > total:
        raise ValueError(
            f"train.output {train.output} is at step {start} already, "
            f"train.epochs and train.max_steps end at {total}"
        )
    lr = LearningRate(config.optim.lr, train.global_batch, steps_per_epoch, whole, config.schedule)
    return Plan(
        start, steps_per_epoch, train.epochs, total, lr, train.checkpoint_every, train.patience
    )
