"""Which sample stands where in which global batch: pure numpy, no files, no torch, no ranks' state.

The order is a function of (labels, global batch, seed, epoch) alone; a rank takes its columns. So
every world size trains on the same global batches, and to resume is to name a step.

1. *Balance.* Column p < C·⌊B/C⌋ holds class p mod C. The R = B mod C odd columns rotate over the
   classes by global step, so class totals over any run of steps differ by at most one.
2. *Without replacement.* A class's draws are numbered t = 0, 1, 2 … over all epochs; the draws
   [kn, (k+1)n), its cycle k, are a permutation of its n samples.
3. *No image twice in a global batch*, unless a cycle ends inside it: that follows from 2.
4. *Nearly sequential reads.* A cycle is laid out as blocks of neighbouring samples, the blocks
   permuted and the samples permuted inside each. The draws of a cycle that fall to the same lane
   (position inside the class's share of a step) take one contiguous run of that layout.

Plain shuffling is the same with all samples in one class. numpy's Philox streams are keyed by
(seed, class) and counted by cycle, so any cycle can be computed without those before it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]

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
    groups: Sequence[Ids], *, global_batch: int, seed: int, epoch: int, block: int = BLOCK
) -> Ids:
    """The sample ids of one epoch, (steps, global_batch) int32, row by row a global batch.

    Raises:
        ValueError: fewer samples than one global batch.
    """
    samples = sum(map(len, groups))
    steps = steps_per_epoch(samples, global_batch)
    if not steps:
        raise ValueError(f"{samples} samples do not fill a global batch of {global_batch}")
    classes, share = len(groups), global_batch // len(groups)
    odd_columns = global_batch - share * classes
    order = np.empty((steps, global_batch), np.int32)
    step = np.arange(epoch * steps, (epoch + 1) * steps)
    for c, ids in enumerate(groups):
        first = _first_draw(step, c, classes, global_batch)
        end = int(_first_draw(step[-1:] + 1, c, classes, global_batch)[0])
        draws = _draw(ids, seed, c, classes, global_batch, block, int(first[0]), end)
        at = first - first[0]
        for lane in range(share):
            order[:, c + classes * lane] = draws[at + lane]
        column = (c - step * odd_columns) % classes  # which of the odd columns is this class's
        has = column < odd_columns
        order[has, share * classes + column[has]] = draws[at[has] + share]
    return order


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


def _first_draw(
    step: NDArray[np.int64], c: int, classes: int, global_batch: int
) -> NDArray[np.int64]:
    """How often class c was drawn before each global step (closed form of property 1)."""
    share = global_batch // classes
    odd_before = step * (global_batch - share * classes)  # odd columns filled so far, c = 0, 1, 2 …
    return step * share + (odd_before - c + classes - 1) // classes


def _draw(
    ids: Ids, seed: int, c: int, classes: int, global_batch: int, block: int,
    start: int, stop: int,
) -> Ids:  # fmt: skip
    """The samples of class c's draws [start, stop)."""
    n, lanes = len(ids), -(-global_batch // classes)
    block = max(1, min(block, n // (4 * lanes)))  # with few blocks a lane, batches would recur
    # Cycles drawn at a time; of very many classes fewer each, as an epoch needs few of each
    together = max(1, SMALL_CYCLE // n // max(1, classes // MANY_CLASSES))
    span = together * n
    drawn = np.empty(stop - start, np.int32)
    for batch in range(start // span, -(-stop // span)):
        # Draws sorted by (cycle, lane, number) read the layouts from left to right.
        lane = _lanes(batch * span, span, c, classes, global_batch)
        if together > 1:
            lane = lane + (np.arange(span) // n) * lanes
        samples = np.empty(span, np.int32)
        by_lane = np.argsort(lane, kind="stable")
        samples[by_lane] = ids[_layouts(n, block, together, seed, c, batch).ravel()]
        low, high = max(start, batch * span), min(stop, batch * span + span)
        drawn[low - start : high - start] = samples[low - batch * span : high - batch * span]
    return drawn


def _layouts(n: int, block: int, cycles: int, seed: int, c: int, batch: int) -> Ids:
    """(cycles, n): permuted blocks of neighbours, permuted inside; cycles batch·cycles + 0, 1, …"""
    rng = np.random.Generator(np.random.Philox(key=_key(seed, c), counter=[0, 0, 0, batch]))
    blocks = -(-n // block)
    order = rng.permuted(np.tile(np.arange(blocks, dtype=np.int32), (cycles, 1)), axis=1)
    layout = np.tile(np.arange(block, dtype=np.int32), (cycles * blocks, 1))
    rng.permuted(layout, axis=1, out=layout)
    layout += order.reshape(-1, 1) * block
    layout = layout.reshape(cycles, -1)
    # The last block may be short
    return layout if blocks * block == n else layout[layout < n].reshape(cycles, n)


def _lanes(start: int, count: int, c: int, classes: int, global_batch: int) -> NDArray[np.integer]:
    """The position of each of class c's draws from `start` on inside its step's share."""
    low = max(0, start * classes // global_batch - 2 * classes)
    high = (start + count) * classes // global_batch + 2 * classes
    first = _first_draw(np.arange(low, high + 1), c, classes, global_batch) - start
    # numpy sorts 16-bit integers by radix, ten times faster than wider ones
    kind = np.uint16 if global_batch // classes < 65535 else np.int32
    lane = np.arange(first[0], first[-1], dtype=np.int32)
    lane -= np.repeat(first[:-1].astype(np.int32), np.diff(first))
    return lane[-first[0] :][:count].astype(kind)
