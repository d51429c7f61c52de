"""Any shares, exact at every step: properties over random classes, shares, batches and worlds."""

import math
import time
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dan_dist.data import sampler, shares, turns
from dan_dist.data.sampler import epoch_order, group_samples, rank_columns, take_turns
from dan_dist.data.shares import Shares
from dan_dist.data.turns import SharedTurns

EPOCHS = 5


def random(configurations: int) -> settings:
    """The same configurations in every run of the tests."""
    return settings(max_examples=configurations, deadline=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def small_cycles() -> Iterator[None]:
    """Cycles of small classes drawn fewer at a time: the same claims, and quicker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "SMALL_CYCLE", 1 << 8)
        yield


@st.composite
def numbers(draw: st.DrawFn, classes: int) -> list[float]:
    """Shares of every kind: few digits or many, tiny, zero, equal; never all zero."""
    kind = st.one_of(
        st.integers(0, 9), st.floats(0, 1, width=32), st.sampled_from([0, 1, 1e-3, 1e-7, 1 / 3])
    )
    own = draw(st.lists(kind, min_size=classes, max_size=classes))
    return own if any(own) else [1.0] * classes


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[np.ndarray, int, Shares]:
    """Labels in a mixed-up order, a global batch, and constant or changing shares."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=9))
    samples = sum(sizes)
    batch = draw(st.integers(1, samples))
    kind = draw(st.sampled_from(["power", "effective", "explicit", "schedule", "schedule"]))
    if kind == "power":
        own = shares.power(sizes, draw(st.floats(0, 2)))
    elif kind == "effective":
        own = shares.effective(sizes, draw(st.floats(0, 1, exclude_max=True)))
    else:
        own = shares.explicit(draw(numbers(len(sizes))))
    if kind == "schedule":
        last = shares.explicit(draw(numbers(len(sizes))))
        own = shares.scheduled(own, last, draw(st.integers(1, 7)))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(draw(st.integers(0, 9))).permutation(labels), batch, own


def orders(labels: np.ndarray, batch: int, own: Shares | None, seed: int = 0) -> np.ndarray:
    """(EPOCHS, steps, batch): each epoch found alone, without those before it."""
    groups = group_samples(labels, balanced=True)
    return np.stack([
        epoch_order(groups, global_batch=batch, seed=seed, epoch=e,
                    turns=take_turns(groups, global_batch=batch, shares=own))
        for e in range(EPOCHS)
    ])  # fmt: skip


def due(own: Shares, batch: int, steps: int) -> list[list[int]]:
    """The classes' shares of the first s steps, in parts; for every s from 0."""
    total = [0] * len(own.last)
    sums = [total]
    for step in range(EPOCHS * steps):
        weights = own.weights(step // steps)
        total = [t + batch * int(w) for t, w in zip(total, weights, strict=True)]
        sums.append(total)
    return sums


@pytest.mark.slow
@random(800)
@given(mixtures())
def test_totals_differ_from_their_shares_by_less_than_one_at_every_step(
    mixture: tuple[np.ndarray, int, Shares],
) -> None:
    labels, batch, own = mixture
    order = orders(labels, batch, own)
    classes, steps = len(own.last), order.shape[1]
    assert order.shape == (EPOCHS, len(labels) // batch, batch)
    rows = labels[order.reshape(-1, batch)] + classes * np.arange(EPOCHS * steps)[:, None]
    drawn = np.bincount(rows.ravel(), minlength=EPOCHS * steps * classes)
    drawn = drawn.reshape(-1, classes).cumsum(axis=0)
    parts = np.array(due(own, batch, steps)[1:], object)  # Python's integers hold any product
    assert (abs(drawn * own.parts - parts) < own.parts).all()
    # … so that the difference over any run of steps is below two; and no share, no image
    assert not drawn[parts == 0].any()


@pytest.mark.slow
@random(500)
@given(mixtures(), st.integers(0, 99))
def test_cycles_are_permutations_and_no_batch_holds_an_image_twice(
    mixture: tuple[np.ndarray, int, Shares], seed: int
) -> None:
    labels, batch, own = mixture
    order = orders(labels, batch, own, seed).reshape(-1, batch)
    counts = np.bincount(order.ravel(), minlength=len(labels))
    for c, ids in enumerate(group_samples(labels, balanced=True)):
        assert np.ptp(counts[ids]) <= 1  # whole cycles, and one begun
        total = 0
        for row in order:
            mine = row[labels[row] == c]
            ends_inside = (total + len(mine) - 1) // len(ids) > total // len(ids)
            total += len(mine)
            assert ends_inside or len(np.unique(mine)) == len(mine)


@pytest.mark.slow
@random(500)
@given(mixtures(), st.integers(1, 6))
def test_an_epoch_found_alone_is_that_of_a_run_from_step_0(
    mixture: tuple[np.ndarray, int, Shares], chunk: int
) -> None:
    """Also where turns are found in chunks, whose starts are looked back to from an epoch's."""
    labels, batch, own = mixture
    steps = len(labels) // batch

    def begin() -> SharedTurns:
        made = SharedTurns(own, batch, steps)
        made.chunk = min(chunk, steps)
        made.chunks = -(-steps // made.chunk)
        return made

    run = begin()
    for epoch in range(EPOCHS):
        whole, alone = run.epoch(epoch), begin().epoch(epoch)
        assert (whole.start == alone.start).all() and (whole.stop == alone.stop).all()
        for a, b in zip(whole.rows, alone.rows, strict=True):
            assert (a == b).all()


@random(300)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.data())
def test_equal_shares_differ_by_at_most_one_over_any_run(
    sizes: list[int], data: st.DataObject
) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    batch = data.draw(st.integers(1, len(labels)))
    order = orders(labels, batch, shares.balanced(len(sizes)))
    assert (order == orders(labels, batch, None)).all()
    steps = (
        np.eye(len(sizes), dtype=int)[labels[order.reshape(-1, batch)]].sum(axis=1).cumsum(axis=0)
    )
    first, last = data.draw(st.tuples(*[st.integers(0, len(steps) - 1)] * 2))
    assert np.ptp(steps[last] - steps[first]) <= 1


@random(300)
@given(mixtures(), st.integers(1, 8), st.data())
def test_every_world_has_the_same_batches_and_goes_on_with_them(
    mixture: tuple[np.ndarray, int, Shares], world: int, data: st.DataObject
) -> None:
    """The ranks' columns, each rank on its own and resumed at any step, are the whole order's."""
    labels, batch, own = mixture
    whole = orders(labels, batch, own)
    epoch = data.draw(st.integers(0, EPOCHS - 1))
    step = data.draw(st.integers(0, whole.shape[1] - 1))
    groups = group_samples(labels, balanced=True)
    found = []
    for rank in range(world):
        order = epoch_order(groups, global_batch=batch, seed=0, epoch=epoch,
                            turns=take_turns(groups, global_batch=batch, shares=own))  # fmt: skip
        found.append(order[step:, rank_columns(batch, rank, world)])
    assert (np.concatenate(found, axis=1) == whole[epoch, step:]).all()


def test_step_1_000_000_is_reached_in_seconds() -> None:
    sizes = [134415, 74874, 25459, 24882, 14090, 6378, 3803, 3750]  # AffectNet's
    groups = np.split(np.arange(sum(sizes), dtype=np.int32), np.cumsum(sizes)[:-1])
    own = shares.scheduled(shares.power(sizes, 1), shares.power(sizes, 0.5), 1000)
    began_s = time.perf_counter()
    made = take_turns(groups, global_batch=256, shares=own)
    epoch = 1_000_000 // made.steps
    order = epoch_order(groups, global_batch=256, seed=0, epoch=epoch, turns=made)
    assert time.perf_counter() - began_s < 10
    labels = np.repeat(np.arange(8), sizes)
    exact = sum((Fraction(int(own.weights(e)[7]), own.parts) for e in range(epoch)), Fraction(0))
    exact *= 256 * made.steps
    assert isinstance(made, SharedTurns)
    drawn = int(made.drawn_before(epoch)[7])
    for row in order:
        exact += Fraction(256 * int(own.weights(epoch)[7]), own.parts)
        drawn += int((labels[row] == 7).sum())
        assert abs(drawn - exact) < 1


def test_many_classes_of_changing_shares_take_seconds() -> None:
    counts = np.bincount(np.random.default_rng(0).integers(80_000, size=400_000), minlength=80_000)
    counts = np.maximum(counts, 1)
    groups = np.split(np.arange(counts.sum(), dtype=np.int32), np.cumsum(counts)[:-1])
    sizes = counts.tolist()
    began_s = time.perf_counter()
    own = shares.scheduled(shares.power(sizes, 1), shares.power(sizes, 0.5), 10)
    made = take_turns(groups, global_batch=256, shares=own)
    order = epoch_order(groups, global_batch=256, seed=0, epoch=3, turns=made)
    assert time.perf_counter() - began_s < 60
    labels = np.repeat(np.arange(80_000), counts)
    assert isinstance(made, SharedTurns)
    whole, rest = made.due(4 * made.steps)
    drawn = made.drawn_before(3) + np.bincount(labels[order.ravel()], minlength=80_000)
    assert ((drawn >= whole) & (drawn <= whole + (rest > 0))).all()


def test_ranks_see_every_class_and_lanes_read_neighbours() -> None:
    sizes = (6400, 1600, 400, 100)
    labels = np.repeat(np.arange(4), sizes)
    groups = group_samples(labels, balanced=True)
    made = take_turns(groups, global_batch=64, shares=shares.power(sizes, 0.5))  # 8 : 4 : 2 : 1
    order = epoch_order(groups, global_batch=64, seed=0, epoch=0, turns=made)
    for rank in range(4):
        own = labels[order[:, rank_columns(64, rank, 4)]]
        assert all({0, 1, 2} <= set(row) for row in own)
    # Half a cycle of class 0 lies in few blocks of neighbours for a rank, one step's in many
    lanes = int(made.lanes[0])
    block = 6400 // (4 * lanes)
    half = order[: 3200 * 15 // (64 * 8)]
    for rank in range(4):
        own = half[:, rank_columns(64, rank, 4)]
        own = own[labels[own] == 0]
        assert len(np.unique(own // block)) <= len(own) / block + lanes / 4 * 2 + 8
    first = order[0][labels[order[0]] == 0]
    assert len(np.unique(first // block)) >= lanes - 3


def test_powers_and_effective_numbers_lie_between_balanced_and_natural() -> None:
    counts = [100, 400, 2500]
    assert (shares.power(counts, 0).last == 1).all() and shares.power(counts, 0).are_equal
    assert shares.power(counts, 1).last.tolist() == [1, 4, 25]
    assert shares.power(counts, 0.5).last.tolist() == [1, 2, 5]
    assert shares.effective(counts, 0).last.tolist() == [1, 4, 25]
    beta = 0.999
    weights = [n * (1 - beta) / (1 - beta**n) for n in counts]  # as in the paper's formula
    own = shares.effective(counts, beta)
    assert own.last / own.parts == pytest.approx(np.array(weights) / sum(weights), abs=1e-8)
    flat = shares.effective(counts, 0.999999999)
    assert flat.last / flat.parts == pytest.approx(1 / 3, rel=1e-5)


def test_a_schedule_goes_from_its_first_shares_to_its_last() -> None:
    own = shares.scheduled(shares.explicit([1, 0]), shares.explicit([1, 3]), 4)
    found = [[Fraction(int(w), own.parts) for w in own.weights(e)] for e in range(6)]
    quarters = [(16, 0), (13, 3), (10, 6), (7, 9), (4, 12), (4, 12)]
    assert found == [[Fraction(a, 16), Fraction(b, 16)] for a, b in quarters]
    for epoch, sums in enumerate(np.cumsum(quarters, axis=0), 1):
        assert own.before(epoch).tolist() == (sums * own.parts // 16).tolist()


def test_sets_shares_multiply_with_their_classes() -> None:
    own = shares.combine([3, 1], [shares.explicit([1, 2]), shares.balanced(3)])
    assert own.last.tolist() == [3, 6, 1, 1, 1]


def test_rounded_shares_sum_up_and_leave_no_class_out() -> None:
    own = shares.explicit([math.pi, 1e-30, 0, math.e])
    assert own.parts == shares.PARTS and own.last[1] == 1 and own.last[2] == 0


def test_many_shares_below_one_part_are_taken_from_several_large_ones() -> None:
    """One large share alone has fewer parts than the small ones are raised by."""
    few, many = 30_000, 60_000
    own = shares.explicit([Fraction(1)] * few + [Fraction(1, 10**15)] * many)
    assert own.parts == shares.PARTS and own.last.min() == 1 and (own.last[few:] == 1).all()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: shares.explicit([1, -1]), "a share is -1, expected a number of 0 or more"),
        (lambda: shares.explicit([1, math.nan]), "a share is nan"),
        (lambda: shares.explicit([0, 0]), "no class has a share above 0"),
        (lambda: shares.power([3], -1), "the power of a class's count is -1, expected 0 or more"),
        (lambda: shares.effective([3], 1), "beta of the effective numbers is 1, expected"),
        (lambda: shares.scheduled(*[shares.balanced(2)] * 2, 0), "a schedule over 0 epochs"),
        (lambda: shares.scheduled(shares.balanced(2), shares.balanced(3), 1), "the same classes"),
        (
            lambda: take_turns([np.arange(9, dtype=np.int32)], global_batch=2,
                               shares=shares.explicit([1, 2])),
            "2 shares of 1 classes",
        ),
        (lambda: SharedTurns(shares.explicit([1, 2]), turns.CHUNK + 1, 1), "batch of 1048577"),
    ],
)  # fmt: skip
def test_wrong_shares_are_refused(made: object, message: str) -> None:
    assert callable(made)
    with pytest.raises(ValueError, match=message):
        made()
