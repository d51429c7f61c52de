"""Which images a rank reads at each step: the sampler's orders, computed ahead of their use."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dan_dist.data.augment import UNIFORMS
from dan_dist.data.mixture import groups_of
from dan_dist.data.sampler import (
    Ids,
    Kept,
    augmentation_uniforms,
    epoch_order,
    evaluation_order,
    group_samples,
    take_turns,
)
from dan_dist.data.shares import Shares
from shards.format import Split


class Request(NamedTuple):
    """One step's images of one rank."""

    ids: Ids  # (n,); −1 for padding
    uniforms: NDArray[np.float32] | None  # (n, UNIFORMS) for augmentation, None for evaluation


class TrainOrder:
    """The requests of a training run, step by step; the next epoch is ordered in the background.

    shares: of the groups (`mixture.groups_of`), by class where balanced; by default equal ones.
    """

    def __init__(
        self, split: Split, columns: slice, *, global_batch: int, seed: int, balanced: bool,
        shares: Shares | None = None,
    ) -> None:  # fmt: skip
        self.groups = group_samples(
            groups_of(split, by_class=balanced), balanced=balanced or shares is not None
        )
        self.columns, self.global_batch, self.seed = columns, global_batch, seed
        self.turns = take_turns(self.groups, global_batch=global_batch, shares=shares)
        self.steps = self.turns.steps
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="order")
        self._epochs: dict[int, Future[Ids]] = {}
        self._kept: Kept = {}

    def __call__(self, step: int) -> Request:
        epoch, row = divmod(step, self.steps)
        self._epochs.pop(epoch - 1, None)  # before there is another, for memory's sake
        for e in (epoch, epoch + 1):
            if e not in self._epochs:
                self._epochs[e] = self._pool.submit(self._order, e)
        uniforms = augmentation_uniforms(self.seed, step, self.global_batch, UNIFORMS)
        return Request(self._epochs[epoch].result()[row], uniforms[self.columns])

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(cancel_futures=True)

    def _order(self, epoch: int) -> Ids:
        order = epoch_order(
            self.groups, global_batch=self.global_batch, seed=self.seed, epoch=epoch,
            turns=self.turns, kept=self._kept,
        )  # fmt: skip
        return np.ascontiguousarray(order[:, self.columns])


class EvaluationOrder:
    """Every sample of a split once, padded with −1 to whole steps; then again, without end."""

    def __init__(self, split: Split, columns: slice, *, global_batch: int) -> None:
        order = evaluation_order(len(split), global_batch)
        self.steps, self.own = len(order), order[:, columns]

    def __call__(self, step: int) -> Request:
        return Request(self.own[step % self.steps], None)

    def close(self) -> None: ...
