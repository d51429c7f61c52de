"""Each class's share of a training's images, in whole numbers: weights of one total, by epoch.

Weights are integers so that a class's due after any number of steps is exact, and the same on every
machine. Numbers with few digits stay as they are; others (a root of a count) are rounded once, to
parts of 2³⁰, and the rounded ones are the shares. Roots and powers are taken in decimal arithmetic,
whose last digit no processor decides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.int64]
Number = int | float | Fraction | Decimal

PARTS = 1 << 30
MOST_PARTS = 1 << 41  # of a schedule: its products with 2²⁰ images stay within 64 bits
DIGITS = Context(prec=34)


@dataclass(frozen=True, eq=False)
class Shares:
    """Weights of the classes in epoch 0 and from epoch `epochs` on, and linearly between.

    Both have the same total. Shares that do not change have `epochs` 1 and the same weights twice.
    """

    first: Weights
    last: Weights
    epochs: int = 1

    @cached_property
    def parts(self) -> int:
        """What the weights of any epoch sum up to."""
        return self.epochs * int(self.last.sum())

    @property
    def are_equal(self) -> bool:
        """Whether every class has the same share throughout."""
        return all((w == w[0]).all() for w in (self.first, self.last))

    @property
    def are_constant(self) -> bool:
        return bool((self.first == self.last).all())

    def weights(self, epoch: int) -> Weights:
        """The classes' parts of an epoch."""
        passed = min(epoch, self.epochs)
        return self.first * (self.epochs - passed) + self.last * passed

    def before(self, epoch: int) -> NDArray[np.object_]:
        """The sum of `weights` over the epochs before this one, in Python's integers."""
        passed = min(epoch, self.epochs)
        to_last = passed * (passed - 1) // 2
        first, last = self.first.astype(object), self.last.astype(object)
        times_last = to_last + (epoch - passed) * self.epochs
        total: NDArray[np.object_] = first * (passed * self.epochs - to_last) + last * times_last
        return total


def balanced(classes: int) -> Shares:
    """The same for every class."""
    return explicit([1] * classes)


def power(counts: Sequence[int], exponent: Number) -> Shares:
    """Shares in proportion to countᵗ: 0 is balanced, 1 is as the images are.

    Raises:
        ValueError: the exponent is negative.
    """
    if exponent < 0:
        raise ValueError(f"the power of a class's count is {exponent}, expected 0 or more")
    return explicit(_by_count(counts, lambda n: DIGITS.power(n, _decimal(exponent))))


def effective(counts: Sequence[int], beta: Number) -> Shares:
    """Images weighted by 1 / E(n), E(n) = (1 − βⁿ) / (1 − β) (Cui et al., 2019).

    A class's share is its count times that: 0 is as the images are, towards 1 is balanced.

    Raises:
        ValueError: beta is not in [0, 1).
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta of the effective numbers is {beta}, expected 0 or more, below 1")
    b = _decimal(beta)
    return explicit(_by_count(counts, lambda n: n * (1 - b) / (1 - DIGITS.power(b, n))))


def explicit(weights: Sequence[Number]) -> Shares:
    """Shares in proportion to these numbers.

    Raises:
        ValueError: one is negative or not finite, or none is above 0.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"a share is {weight}, expected a number of 0 or more")
    if not any(weights):
        raise ValueError("no class has a share above 0")
    whole = _whole([w if isinstance(w, Fraction) else Fraction(str(w)) for w in weights])
    return Shares(whole, whole)


def scheduled(first: Shares, last: Shares, epochs: int) -> Shares:
    """From the shares `first` in epoch 0 to `last` in epoch `epochs`, linearly; then those.

    Raises:
        ValueError: no epochs or too many, or the two are themselves schedules or of other classes.
    """
    if not (first.are_constant and last.are_constant) or len(first.last) != len(last.last):
        raise ValueError("a schedule is between two constant shares of the same classes")
    if not 1 <= epochs <= MOST_PARTS // PARTS:
        raise ValueError(f"a schedule over {epochs} epochs, expected 1 to {MOST_PARTS // PARTS}")
    ends = [(s.last, s.parts) for s in (first, last)]
    total = math.lcm(first.parts, last.parts)
    if total * epochs <= MOST_PARTS:
        exact = [weights * (total // parts) for weights, parts in ends]
    else:
        exact = [_rounded([Fraction(w, parts) for w in weights.tolist()])
                 for weights, parts in ends]  # fmt: skip
    return Shares(exact[0], exact[1], epochs)


def combine(outer: Sequence[Number], inner: Sequence[Shares]) -> Shares:
    """Shares of several sets' classes, set after set: a set's share times its classes' in it."""
    if len(inner) == 1:
        return inner[0]
    ends = []
    for k in (0, 1):
        products: list[Number] = []
        for share, own in zip(outer, inner, strict=True):
            weights = (own.first, own.last)[k]
            products += [Fraction(str(share)) * Fraction(int(w), int(weights.sum()))
                         for w in weights]  # fmt: skip
        ends.append(explicit(products))
    epochs = {own.epochs for own in inner if not own.are_constant}
    if len(epochs) > 1:
        raise ValueError(f"schedules of {sorted(epochs)} epochs do not combine")
    return scheduled(ends[0], ends[1], epochs.pop()) if epochs else ends[0]


def _by_count(counts: Sequence[int], weight: Any) -> list[Fraction]:
    """A weight of each count, computed once for equal ones."""
    found = {n: Fraction(weight(Decimal(n))) for n in {int(n) for n in counts}}
    return [found[int(n)] for n in counts]


def _decimal(value: Number) -> Decimal:
    if isinstance(value, Fraction):
        return DIGITS.divide(Decimal(value.numerator), Decimal(value.denominator))
    return Decimal(str(value))


def _whole(weights: Sequence[Fraction]) -> Weights:
    """The smallest integers in these proportions, or parts of 2³⁰ where those are too large."""
    scale = math.lcm(*{w.denominator for w in weights})
    if scale <= PARTS**2:
        exact = [int(w * scale) for w in weights]
        shared = math.gcd(*exact)
        if sum(exact) // shared <= PARTS:
            return np.array([w // shared for w in exact], np.int64)
    return _rounded(weights)


def _rounded(weights: Sequence[Fraction]) -> Weights:
    """Parts of 2³⁰ by largest remainders; a share above 0 has at least one."""
    exact = [(w.numerator << 200) // w.denominator for w in weights]
    total = sum(exact)
    parts = [max(w * PARTS // total, 1 if w else 0) for w in exact]
    missing = PARTS - sum(parts)
    if missing > 0:
        for c in sorted(range(len(parts)), key=lambda c: -(exact[c] * PARTS % total))[:missing]:
            parts[c] += 1
    else:  # shares below one part were raised: the largest gives, and the next where it is too few
        for c in sorted(range(len(parts)), key=lambda c: -parts[c]):
            given = min(parts[c] - 1, -missing)
            parts[c] -= given
            missing += given
            if not missing:
                break
    return np.array(parts, np.int64)
