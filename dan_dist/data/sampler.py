"""Which sample stands where in which global batch: pure numpy, no files, no torch, no ranks' state.

The order is a function of (labels, global batch, shares, seed, epoch) alone; a rank takes its
columns. So every world size trains on the same global batches, and to resume is to name a step.

*Theorem.* Counted from step 0, each class's total differs from its share by less than one image at
every step, so by less than two over any run of steps: for any shares, also ones that change over
the epochs, any batch and any number of classes. With equal shares, the classes' totals over any run
of steps differ by at most one. *Proof idea*: the j-th image of a class may be drawn once its share
has passed j − 1, and must be by the time that it reaches j. The shares themselves do so in
fractions, so whole images can (bipartite flow), and the earliest due first is such an order; equal
shares have a closed form. `turns` has the proof, and why a far step needs only those just before.

*Without replacement.* A class's draws are numbered t = 0, 1, 2 … over all epochs; the draws
[kn, (k+1)n), its cycle k, are a permutation of its n samples. So no image stands twice in a global
batch, unless a cycle ends inside it.

*Nearly sequential reads.* A cycle is laid out as blocks of neighbouring samples, the blocks
permuted and the samples permuted inside each. The draws of a cycle that fall to the same lane
(position inside the class's share of a step) take one contiguous run of that layout.

Plain shuffling is the same with all samples in one class. numpy's Philox streams are keyed by
(seed, class) and counted by cycle, so any cycle can be computed without those before it.

With any loader, here torch's; `labels` are the data set's:

    from torch.utils.data import DataLoader
    from dan_dist.data.sampler import epoch_order, group_samples, rank_columns, take_turns
    from dan_dist.data.shares import power

    groups = group_samples(labels, balanced=True)
    turns = take_turns(groups, global_batch=64, shares=power([len(g) for g in groups], 0.5))
    for epoch in range(20):
        order = epoch_order(groups, global_batch=64, seed=0, epoch=epoch, turns=turns)
        own = order[:, rank_columns(64, rank, world_size)]
        for images in DataLoader(dataset, batch_sampler=own.tolist()):
            train(images)
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dan_dist.data.shares import Shares
from dan_dist.data.turns import EpochTurns, EqualTurns, SharedTurns

Ids = NDArray[np.int32]
Kept = dict[int, tuple[int, Ids]]  # of a class, the cycles last drawn: their number, their samples

BLOCK = 64  # samples read together: from 64 on, larger blocks save few I/Os
SMALL_CYCLE = 1 << 16  # samples: cycles of small classes are drawn this many at a time
MANY_CLASSES = 64
AUGMENTATION_KEY = 1 << 63  # second Philox key word: apart from every class number


def group_samples(labels: NDArray[np.integer], *, balanced: bool) -> list[Ids]:
    """The sample ids of each class present, in index order; one group of all where not balanced.

    Raises:
        ValueError: more than 2³¹ − 1 samples.
    """
    if len(labels) > np.iinfo(np.int32).max:
        raise ValueError(f"at most 2147483647 samples can be ordered, got {len(labels)}")
    if not balanced:
        return [np.arange(len(labels), dtype=np.int32)]
    by_class = np.argsort(labels, kind="stable").astype(np.int32)
    return np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1)


def steps_per_epoch(samples: int, global_batch: int) -> int:
    """Steps of an epoch: as many whole global batches as the data set has images for."""
    return samples // global_batch


def epoch_order(
    groups: Sequence[Ids], *, global_batch: int, seed: int, epoch: int,
    turns: EqualTurns | SharedTurns | None = None, block: int = BLOCK, kept: Kept | None = None,
) -> Ids:  # fmt: skip
    """The sample ids of one epoch, (steps, global_batch) int32, row by row a global batch.

    turns: of unequal shares (`take_turns`); by default the groups' shares are equal. kept: a dict
    that the epochs of one training share, at most 32 MiB; it saves small sets 30 ms an epoch.

    Raises:
        ValueError: fewer samples than one global batch.
    """
    turns = turns or take_turns(groups, global_batch=global_batch)
    taken = turns.epoch(epoch)
    kept = {} if kept is None else kept
    drawn = np.concatenate([*_draws(groups, turns, seed, block, taken, kept)])  # class after class
    order = np.empty(turns.steps * global_batch, np.int32)
    end = 0
    for numbers in taken.rows:
        start, end = end, end + len(numbers)
        np.take(drawn, numbers, out=order[start:end])
    return order.reshape(-1, global_batch)


def take_turns(
    groups: Sequence[Ids], *, global_batch: int, shares: Shares | None = None
) -> EqualTurns | SharedTurns:
    """The turns of the groups at these shares, equal ones by default.

    Raises:
        ValueError: fewer samples than one global batch, or shares of other groups.
    """
    samples = sum(map(len, groups))
    steps = steps_per_epoch(samples, global_batch)
    if not steps:
        raise ValueError(f"{samples} samples do not fill a global batch of {global_batch}")
    if shares is None or shares.are_equal:
        return EqualTurns(len(groups), global_batch, steps)
    if len(shares.last) != len(groups):
        raise ValueError(f"{len(shares.last)} shares of {len(groups)} classes")
    return SharedTurns(shares, global_batch, steps)


def evaluation_order(samples: int, global_batch: int) -> Ids:
    """Every sample once in index order, (steps, global_batch) int32; −1 fills the last row."""
    steps = -(-samples // global_batch)
    order = np.full(steps * global_batch, -1, np.int32)
    order[:samples] = np.arange(samples, dtype=np.int32)
    return order.reshape(steps, global_batch)


def rank_columns(global_batch: int, rank: int, world_size: int) -> slice:
    """The contiguous columns of a global batch that one rank takes; ranks may differ by one."""
    return slice(rank * global_batch // world_size, (rank + 1) * global_batch // world_size)


def augmentation_uniforms(
    seed: int, step: int, global_batch: int, numbers: int
) -> NDArray[np.float32]:
    """(global_batch, numbers) uniforms in [0, 1) of one global step; row p belongs to column p."""
    bits = np.random.Philox(key=_key(seed, AUGMENTATION_KEY), counter=[0, 0, 0, step])
    return np.random.Generator(bits).random((global_batch, numbers), np.float32)


def _key(seed: int, stream: int) -> NDArray[np.uint64]:
    return np.array([seed, stream], np.uint64)


def _draws(
    groups: Sequence[Ids], turns: EqualTurns | SharedTurns, seed: int, block: int,
    taken: EpochTurns, kept: Kept,
) -> Iterator[Ids]:  # fmt: skip
    """The samples of each class's draws [start, stop)."""
    stream = Stream(seed)
    # Cycles drawn at a time; of very many classes fewer each, as an epoch needs few of each
    few = max(1, len(groups) // MANY_CLASSES)
    spans = zip(taken.start.tolist(), taken.stop.tolist(), strict=True)
    for c, (ids, (start, stop)) in enumerate(zip(groups, spans, strict=True)):
        span = max(1, SMALL_CYCLE // len(ids) // few) * len(ids)
        drawn = np.empty(stop - start, np.int32)
        for batch in range(start // span, -(-stop // span)):
            if c in kept and kept[c][0] == batch:
                samples = kept[c][1]
            else:
                samples = _samples(ids, turns, stream, block, c, batch, span)
                if few == 1 and stop - start < span <= SMALL_CYCLE:  # the next epoch goes on in it
                    kept[c] = batch, samples
            low, high = max(start, batch * span), min(stop, batch * span + span)
            drawn[low - start : high - start] = samples[low - batch * span : high - batch * span]
        yield drawn


def _samples(
    ids: Ids, turns: EqualTurns | SharedTurns, stream: "Stream", block: int, c: int, batch: int,
    span: int,
) -> Ids:  # fmt: skip
    """Class c's draws [batch · span, (batch + 1) · span), which are whole cycles."""
    n, lanes = len(ids), int(turns.lanes[c])
    own = max(1, min(block, n // (4 * lanes)))  # with few blocks a lane, batches would recur
    layouts = ids[_layouts(n, own, span // n, stream.of(c, batch)).ravel()]
    if lanes == 1:
        return layouts
    # Draws sorted by (cycle, lane, number) read the layouts from left to right
    lane = turns.lane(c, batch * span, span)
    if span > n:
        lane = lane + (np.arange(span) // n) * lanes
    samples = np.empty(span, np.int32)
    samples[np.argsort(lane, kind="stable")] = layouts
    return samples


class Stream:
    """A class's random numbers for some of its cycles: Philox keyed by seed and class.

    One generator is set to each in turn, as a new one costs more than most classes' numbers.
    """

    def __init__(self, seed: int) -> None:
        self.bits = np.random.Philox(key=_key(seed, 0))
        self.state: Any = self.bits.state
        self.generator = np.random.Generator(self.bits)

    def of(self, c: int, batch: int) -> np.random.Generator:
        self.state["state"]["key"][1] = c
        self.state["state"]["counter"][:] = 0, 0, 0, batch
        self.bits.state = self.state
        return self.generator


def _layouts(n: int, block: int, cycles: int, rng: np.random.Generator) -> Ids:
    """(cycles, n): permuted blocks of neighbours, permuted inside."""
    blocks = -(-n // block)
    order = np.arange(blocks, dtype=np.int32).reshape(1, -1).repeat(cycles, 0)
    layout = np.arange(block, dtype=np.int32).reshape(1, -1).repeat(cycles * blocks, 0)
    rng.permuted(order, axis=1, out=order)
    rng.permuted(layout, axis=1, out=layout)
    layout += order.reshape(-1, 1) * block
    layout = layout.reshape(cycles, -1)
    # The last block may be short
    return layout if blocks * block == n else layout[layout < n].reshape(cycles, n)
