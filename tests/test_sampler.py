"""The order's claims, over a grid of class sizes, global batches, worlds and seeds."""

import hashlib
import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from dan_dist.data import sampler
from dan_dist.data.sampler import (
    augmentation_uniforms,
    epoch_order,
    evaluation_order,
    group_samples,
    rank_columns,
    take_turns,
)
from dan_dist.data.shares import power

SIZES = [(1, 3, 40, 9), (7, 7, 7), (5, 200, 31, 64, 12, 2, 90, 3), (130,)]
BATCHES = [1, 3, 8, 13, 64, 100]
GRID = [(s, b) for s, b in itertools.product(SIZES, BATCHES) if sum(s) >= b]
EPOCHS = 3


def labels_of(sizes: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Labels in a mixed-up index order, as an unsorted data set has them."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


def orders(labels: np.ndarray, batch: int, seed: int, *, balanced: bool = True) -> np.ndarray:
    """The steps of all epochs, as a training orders them."""
    groups, kept = group_samples(labels, balanced=balanced), sampler.Kept()
    epochs = [epoch_order(groups, global_batch=batch, seed=seed, epoch=e, kept=kept)
              for e in range(EPOCHS)]  # fmt: skip
    return np.concatenate(epochs)


@pytest.mark.parametrize(("sizes", "batch"), GRID)
@pytest.mark.parametrize("seed", [0, 12345])
def test_balanced_to_the_sample_over_any_run_of_steps(
    sizes: tuple[int, ...], batch: int, seed: int
) -> None:
    labels = labels_of(sizes)
    drawn = labels[orders(labels, batch, seed)]
    per_step = np.stack([(drawn == c).sum(axis=1) for c in range(len(sizes))], axis=1)
    until = np.concatenate([np.zeros((1, len(sizes)), int), per_step.cumsum(axis=0)])
    starts = np.random.default_rng(1).integers(0, len(until), 200)
    stops = np.random.default_rng(2).integers(0, len(until), 200)
    runs = np.abs(until[stops] - until[starts])  # class totals of 200 runs, across epochs too
    assert (np.ptp(runs, axis=1) <= 1).all()
    share = batch // len(sizes) * len(sizes)
    assert (drawn[:, :share] == np.arange(share) % len(sizes)).all()


@pytest.mark.parametrize(("sizes", "batch"), GRID)
@pytest.mark.parametrize("balanced", [True, False])
def test_each_cycle_is_a_permutation_and_no_batch_holds_an_image_twice(
    sizes: tuple[int, ...], batch: int, balanced: bool
) -> None:
    labels = labels_of(sizes)
    order = orders(labels, batch, seed=3, balanced=balanced)
    groups = group_samples(labels, balanced=balanced)
    for ids in groups:
        draws = order[np.isin(order, ids)]  # row by row: a class's draws in their order
        cycles = draws[: len(draws) // len(ids) * len(ids)].reshape(-1, len(ids))
        assert (np.sort(cycles, axis=1) == ids).all()
        rest = draws[cycles.size :]
        assert len(np.unique(rest)) == len(rest)
        starts = np.cumsum([0, *np.isin(order, ids).sum(axis=1)])
        for row, start, stop in zip(order, starts[:-1], starts[1:], strict=True):
            own = row[np.isin(row, ids)]
            cycle_ends_inside = start // len(ids) != (stop - 1) // len(ids)
            assert cycle_ends_inside or len(np.unique(own)) == len(own)


@pytest.mark.parametrize(("n", "batch", "classes"), [(4096, 64, 8), (1024, 64, 8), (2048, 256, 1)])
def test_lanes_read_blocks_of_neighbours(n: int, batch: int, classes: int) -> None:
    """A lane's consecutive draws lie in few blocks, not all over the class."""
    labels = np.repeat(np.arange(classes), n)
    order = orders(labels, batch, seed=0)
    lanes = batch // classes
    block = min(64, n // (4 * lanes))
    lane = order[: n // lanes, 0]  # class 0's first lane in its first cycle: one contiguous run
    assert len(np.unique(lane)) == len(lane) == n // lanes
    assert len(np.unique(lane // block)) <= len(lane) // block + 2
    # … while a single global batch draws from many blocks: the lanes are apart
    first_batch = order[0, labels[order[0]] == 0]
    assert len(np.unique(first_batch // block)) >= lanes - 1


@pytest.mark.parametrize(("sizes", "batch"), [((512,) * 8, 64), ((64,) * 8, 64), ((256,), 16)])
def test_no_batch_recurs_in_the_next_epoch(sizes: tuple[int, ...], batch: int) -> None:
    """n = lanes × block is where unpermuted blocks would bring the same batches back."""
    order = np.sort(orders(labels_of(sizes), batch, seed=0), axis=1)
    assert len(np.unique(order, axis=0)) == len(order)


@pytest.mark.parametrize("batch", [8, 13, 64])
@pytest.mark.parametrize("world", range(1, 9))
def test_ranks_partition_every_global_batch(batch: int, world: int) -> None:
    columns = [np.arange(batch)[rank_columns(batch, rank, world)] for rank in range(world)]
    assert (np.concatenate(columns) == np.arange(batch)).all()
    sizes = [len(c) for c in columns]
    assert max(sizes) - min(sizes) <= 1


def test_ranks_see_every_class() -> None:
    labels = labels_of((50,) * 8)
    drawn = labels[orders(labels, 64, seed=0)]
    for rank in range(8):
        own = drawn[:, rank_columns(64, rank, 8)]
        assert all(len(np.unique(row)) == 8 for row in own)


def test_an_epoch_does_not_need_the_ones_before() -> None:
    groups = group_samples(labels_of((40, 300, 5)), balanced=True)
    alone = epoch_order(groups, global_batch=13, seed=1, epoch=2)
    steps = len(alone)
    assert (orders(labels_of((40, 300, 5)), 13, seed=1)[2 * steps :] == alone).all()
    assert alone.dtype == np.int32


@pytest.mark.parametrize("exponent", [0, 0.5])
@pytest.mark.parametrize("cycle", [1 << 16, 100, 10])
def test_what_is_kept_of_an_epoch_changes_no_other(
    exponent: float, cycle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order they come: next, again, far ahead, back."""
    monkeypatch.setattr(sampler, "SMALL_CYCLE", cycle)
    groups = group_samples(labels_of((40, 300, 5, 1)), balanced=True)
    shares = power([len(g) for g in groups], exponent)
    own = {"global_batch": 13, "seed": 1,
           "turns": take_turns(groups, global_batch=13, shares=shares)}  # fmt: skip
    kept: sampler.Kept = {}
    for epoch in (0, 1, 1, 2, 30, 29, 31, 2, 0):
        found = epoch_order(groups, epoch=epoch, kept=kept, **own)
        assert (found == epoch_order(groups, epoch=epoch, **own)).all()
    assert bool(kept) == (cycle > 10)  # an epoch takes more than ten of each class


def test_seeds_differ_and_epochs_differ() -> None:
    groups = group_samples(labels_of((40, 300, 5)), balanced=True)
    a, b = (epoch_order(groups, global_batch=8, seed=s, epoch=0) for s in (0, 1))
    c = epoch_order(groups, global_batch=8, seed=0, epoch=1)
    assert (a != b).mean() > 0.5 and (a != c).mean() > 0.5


@pytest.mark.parametrize(("samples", "batch"), [(1, 1), (7, 3), (16, 16), (17, 16), (5, 100)])
def test_evaluation_holds_every_sample_once(samples: int, batch: int) -> None:
    order = evaluation_order(samples, batch)
    assert order.shape[1] == batch and len(order) == -(-samples // batch)
    assert (np.sort(order[order >= 0]) == np.arange(samples)).all()


def test_augmentation_numbers_belong_to_the_global_column() -> None:
    whole = augmentation_uniforms(5, 17, 64, 3)
    assert (whole == augmentation_uniforms(5, 17, 64, 3)).all()
    assert not np.array_equal(whole, augmentation_uniforms(5, 18, 64, 3))
    assert not np.array_equal(whole, augmentation_uniforms(6, 17, 64, 3))
    assert whole.min() >= 0 and whole.max() < 1


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples do not fill a global batch of 4"):
        epoch_order([np.arange(3, dtype=np.int32)], global_batch=4, seed=0, epoch=0)


# Of the order as it was when shares came: sizes, global batch, balanced, seed, epoch
FROZEN = [
    ((1, 3, 40, 9), 13, True, 0, 0, "2618ebe06117dd15"),
    ((1, 3, 40, 9), 13, True, 5, 1, "89d0dc18fa1183eb"),
    ((1, 3, 40, 9), 3, False, 5, 1, "a14e8073276c2827"),
    ((5, 200, 31, 64, 12, 2, 90, 3), 64, True, 1, 2, "6d95d6eea917e436"),
    ((5, 200, 31, 64, 12, 2, 90, 3), 64, False, 1, 2, "255bfa59c285bd7f"),
    ((5, 200, 31, 64, 12, 2, 90, 3), 5, True, 12345, 7, "d40f5f7b988a81f4"),
    ((134415, 74874, 25459, 24882, 14090, 6378, 3803, 3750), 256, True, 0, 0, "677cd354a5ceac8b"),
    ((134415, 74874, 25459, 24882, 14090, 6378, 3803, 3750), 250, True, 7, 3, "bda641d7d2098543"),
    ((134415, 74874, 25459, 24882, 14090, 6378, 3803, 3750), 256, False, 7, 3, "2b2909112e1f7e5f"),
    ((70000, 70001), 1024, True, 3, 40, "1e140877534a19de"),
    ((9,) * 700, 256, True, 1, 3, "33b6f6c237ce941d"),
    ((125,) * 80, 8, True, 2, 9, "6a64bb8ab3dd63c7"),
]


@pytest.mark.parametrize(("sizes", "batch", "balanced", "seed", "epoch", "digest"), FROZEN)
def test_equal_shares_keep_their_order_to_the_bit(
    sizes: tuple[int, ...], batch: int, balanced: bool, seed: int, epoch: int, digest: str
) -> None:
    groups = group_samples(labels_of(sizes), balanced=balanced)
    order = epoch_order(groups, global_batch=batch, seed=seed, epoch=epoch)
    assert hashlib.sha256(order.astype("<i4").tobytes()).hexdigest()[:16] == digest


def test_the_docstrings_example_runs() -> None:
    example = textwrap.dedent(sampler.__doc__.split("data set's:\n\n")[1])
    labels, seen = labels_of((3, 20, 200, 40)), []
    assert len(example.split("\n\n")[1].strip().splitlines()) == 7
    exec(example, {"labels": labels, "dataset": labels, "rank": 1, "world_size": 2,
                   "train": seen.append})  # fmt: skip
    drawn = np.bincount(torch.cat(seen), minlength=4)
    assert len(seen) == 20 * (263 // 64) and {len(s) for s in seen} == {32}
    assert (np.diff(drawn[[0, 1, 3, 2]]) > 0).all()


def test_the_sampler_imports_numpy_alone() -> None:
    code = (
        "import sys, numpy.random, numpy.typing; before = set(sys.modules); "
        "import dan_dist.data.sampler; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["dan_dist"]
