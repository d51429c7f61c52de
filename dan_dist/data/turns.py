"""Whose turn it is: which class stands in which column of which global batch, for any shares.

*Theorem.* Let Q(c, s) be the sum of class c's shares of the first s global batches, in images; the
shares of a batch sum up to its B images, and may change from batch to batch. Then there are whole
numbers of images, B in every step, whose totals N(c, s) fulfil |N(c, s) − Q(c, s)| < 1 at every
step s. So over any run of steps the difference is below 2. (With one image a step that is the
chairman assignment problem; Tijdeman, 1980, solves it the same way.)

*Proof.* Call the j-th image of class c *released* in the first step with Q(c, s) > j − 1, and *due*
in the first with Q(c, s) ≥ j. The bound holds where every image is drawn within these two, both
included. The shares themselves draw the images so, in fractions, with B a step; images and steps
are a bipartite graph, so whole images can be drawn so too. And where unit jobs can meet their
deadlines, drawing the earliest due among the released ones meets them. It never falls short of B
either: what is released, Σ ⌈Q(c, s)⌉, is at least B·s.  ∎

*Far steps.* The drawing may begin at any step a instead of 0: with ⌊Q(c, a)⌋ images of each class,
and one more, in advance, of those whose next is due first, until there are B·a. Every image is
still drawn in time: those released after a as before; and of those due by a step b there are
B·(b − a) at most. For either all in advance are due by b, then Σ ⌊Q(c, b)⌋ − B·a are left; or all
without one in advance are due after b, then the others have ⌊Q(c, b)⌋ − ⌊Q(c, a)⌋ − 1, which is
below Q(c, b) − Q(c, a), left each. At step t, when all is due that was released by a, the beginning
is forgotten. Of what is due by θ < t, nothing waits. Of what is due by θ ≥ t, as much waits as had
the drawing begun at 0: that number starts the same in both, and grows by what is released less B,
not below 0. So the same images wait.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dan_dist.data.shares import MOST_PARTS, Shares

Ints = NDArray[np.int64]

CHUNK = 1 << 20  # images whose turns are found together
NEVER = 1 << 62
GOLDEN = 0x9E3779B1  # 2³² over the golden ratio: its multiples spread evenly


class EpochTurns(NamedTuple):
    """The turns of an epoch: of class c, the draws from start[c] to stop[c].

    rows: of some global batches at a time, flat, in column order, the number of each column's draw
    where these are laid class after class.
    """

    start: Ints
    stop: Ints
    rows: Iterator[Ints]

    @staticmethod
    def offsets(start: Ints, stop: Ints) -> Ints:
        """Where each class's draws begin, laid class after class."""
        counts: Ints = stop - start
        return np.cumsum(counts) - counts


class EqualTurns:
    """The closed form for equal shares: draw t of class c is number t·C + c in a row of turns.

    Column p < C·⌊B/C⌋ holds class p mod C; the R = B mod C odd columns go on with the row.
    """

    def __init__(self, classes: int, global_batch: int, steps: int) -> None:
        self.classes, self.batch, self.steps = classes, global_batch, steps
        self.lanes = np.full(classes, -(-global_batch // classes))

    def epoch(self, epoch: int) -> EpochTurns:
        c = np.arange(self.classes)
        start = self._first(np.int64(epoch * self.steps), c)
        stop = self._first(np.int64((epoch + 1) * self.steps), c)
        shift = EpochTurns.offsets(start, stop) - start
        return EpochTurns(start, stop, self._rows(epoch, shift))

    def lane(self, c: int, start: int, count: int) -> NDArray[np.integer]:
        """The position of each of class c's draws from `start` on inside its step's share."""
        low = max(0, start * self.classes // self.batch - 2 * self.classes)
        high = (start + count) * self.classes // self.batch + 2 * self.classes
        first = self._first(np.arange(low, high + 1), np.int64(c)) - start
        # numpy sorts 16-bit integers by radix, ten times faster than wider ones
        kind = np.uint16 if self.lanes[c] < 65536 else np.int32
        lane = np.arange(first[0], first[-1], dtype=np.int32)
        lane -= np.repeat(first[:-1].astype(np.int32), np.diff(first))
        return lane[-first[0] :][:count].astype(kind)

    def _first(self, step: Ints | np.int64, c: Ints | np.int64) -> Ints:
        """How often class c was drawn before a step."""
        return np.asarray(step * self.batch - c + self.classes - 1) // self.classes

    def _rows(self, epoch: int, shift: Ints) -> Iterator[Ints]:
        share, odd = divmod(self.batch, self.classes)
        even = np.arange(share * self.classes)
        end, together = (epoch + 1) * self.steps, max(1, CHUNK // self.batch)
        for at in range(epoch * self.steps, end, together):
            step = np.arange(at, min(at + together, end))[:, None]
            number = np.empty((len(step), self.batch), np.int64)
            if share:
                first = self._first(step, np.arange(self.classes)) + shift
                number[:, : len(even)] = first[:, even % self.classes] + even // self.classes
            c = (step * odd + np.arange(odd)) % self.classes
            number[:, len(even) :] = self._first(step, c) + shift[c] + share
            yield number.ravel()


class SharedTurns:
    """The turns for any shares: the earliest due first, as the module's proof has them.

    Turns are found for a chunk of steps at a time. An image's release and due step are whole
    numbers, from shares in whole numbers; where a class is due later than the epoch whose shares
    are known, the shares of the next ones are followed.
    """

    def __init__(self, shares: Shares, global_batch: int, steps: int) -> None:
        if shares.parts > MOST_PARTS or global_batch > CHUNK:
            raise ValueError(
                f"shares of {shares.parts} parts in a global batch of {global_batch}: "
                f"more than {MOST_PARTS} or {CHUNK}"
            )
        self.shares, self.batch, self.steps = shares, global_batch, steps
        self.classes = len(shares.last)
        most = np.maximum(shares.first, shares.last)
        self.lanes = np.maximum(1, -(-most * global_batch // int(shares.last.sum())))
        self.chunk = min(steps, max(1, CHUNK // global_batch))
        while self.chunk > 1 and self._sort_keys() >= 1 << 62:
            self.chunk //= 2
        self.chunks = -(-steps // self.chunk)  # of an epoch
        self._known: tuple[int, Ints] = 0, np.zeros(self.classes, np.int64)  # an epoch's start

    def epoch(self, epoch: int) -> EpochTurns:
        start = drawn = self.drawn_before(epoch)
        found: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
        for chunk in range(epoch * self.chunks, (epoch + 1) * self.chunks):
            classes, draws, drawn = self._draw_chunk(chunk, drawn)
            found.append((classes, (draws - start[classes]).astype(np.int32)))
        self._known = epoch + 1, drawn
        offset = EpochTurns.offsets(start, drawn)
        return EpochTurns(start, drawn, (offset[c] + draw for c, draw in found))

    def lane(self, c: int, start: int, count: int) -> NDArray[np.integer]:
        """Which of its sequential reads each of class c's draws from `start` on goes on with."""
        lanes = int(self.lanes[c])
        lane = np.arange(start, start + count) % lanes
        return lane.astype(np.uint16 if lanes < 65536 else np.int32)

    def drawn_before(self, epoch: int) -> Ints:
        """How often each class was drawn before an epoch, found from not far before it."""
        first, stop, back = 0, epoch * self.chunks, 1
        whole, _ = self.due(self._step(stop))
        while (first := stop - back) > 0:
            started, rest = self.due(self._step(first))
            if (whole >= started + (rest > 0)).all():
                break
            back *= 2
        known, drawn = self._known
        if max(first, 0) <= known * self.chunks <= stop:
            first = known * self.chunks
        else:
            first, drawn = max(first, 0), self._start_at(max(first, 0))
        for chunk in range(first, stop):
            drawn = self._draw_chunk(chunk, drawn)[2]
        return drawn

    def due(self, step: int) -> tuple[Ints, Ints]:
        """Each class's share of all steps before this one: whole images, and parts of one."""
        epoch, done = divmod(step, self.steps)
        here = self.shares.weights(epoch).astype(object)  # Python's integers hold any product
        parts = (self.shares.before(epoch) * self.steps + here * done) * self.batch
        whole, rest = parts // self.shares.parts, parts % self.shares.parts
        return whole.astype(np.int64), rest.astype(np.int64)

    def _step(self, chunk: int) -> int:
        epoch, number = divmod(chunk, self.chunks)
        return epoch * self.steps + number * self.chunk

    def _sort_keys(self) -> int:
        images = self.chunk * self.batch + self.classes
        return (self.chunk + self.classes + 2) * (self.chunk + 2) * images

    def _start_at(self, chunk: int) -> Ints:
        """The module's start at a far step: those whose next image is due first have it already."""
        step = self._step(chunk)
        whole, rest = self.due(step)
        ahead = self.batch * step - int(whole.sum())
        begun = np.flatnonzero(rest)
        due = self._due_step(chunk, begun, self.shares.parts - rest[begun])
        whole[begun[np.argsort(due, kind="stable")[:ahead]]] += 1
        return whole

    def _draw_chunk(self, chunk: int, drawn: Ints) -> tuple[NDArray[np.int32], Ints, Ints]:
        """Classes and draws in column order, and the classes' totals after the chunk."""
        epoch, number = divmod(chunk, self.chunks)
        steps = min(self.chunk, self.steps - number * self.chunk)
        parts, rate = self.shares.parts, self.shares.weights(epoch) * self.batch
        whole, rest = self.due(self._step(chunk))
        jobs = whole - (-(rest + rate * steps) // parts) - drawn  # images to be released by its end
        c = np.repeat(np.arange(self.classes, dtype=np.int32), jobs)
        draw = np.arange(len(c)) + np.repeat(drawn - (np.cumsum(jobs) - jobs), jobs)
        missing = (draw - whole[c]) * parts - rest[c]  # parts until it is released, one image less
        release = np.maximum(1, missing // np.maximum(rate, 1)[c] + 1)
        due = self._due_step(chunk, c, missing + parts)
        step = earliest_due_first(release, due, steps, self.batch)
        chosen = self._columns(c, draw, step, steps)
        return c[chosen], draw[chosen], drawn + np.bincount(c[chosen], minlength=self.classes)

    def _due_step(self, chunk: int, c: NDArray[np.integer], missing: Ints) -> Ints:
        """The step, the first after the chunk's start being 1, by which a class gains so much."""
        epoch, number = divmod(chunk, self.chunks)
        rate = (self.shares.weights(epoch) * self.batch)[c]
        due = np.where(rate, -(-missing // np.maximum(rate, 1)), NEVER)
        if self.shares.are_constant:
            return due
        passed = self.steps - number * self.chunk
        late = np.flatnonzero(due > passed)
        missing = missing[late] - passed * rate[late]
        while len(late):
            epoch += 1
            rate = (self.shares.weights(epoch) * self.batch)[c[late]]
            more = np.where(rate, -(-missing // np.maximum(rate, 1)), NEVER)
            if epoch >= self.shares.epochs:
                due[late] = np.minimum(passed + more, NEVER)
                break
            here = more <= self.steps
            due[late[here]] = passed + more[here]
            late, missing = late[~here], (missing - rate * np.minimum(more, self.steps))[~here]
            passed += self.steps
        return due

    def _columns(
        self, c: NDArray[np.int32], draw: Ints, step: Ints, steps: int
    ) -> Ints:  # fmt: skip
        """The images' numbers in the order of steps and columns.

        A class's lanes stand evenly over the columns, and classes shifted against each other, so
        that every rank's columns hold every larger class, and a lane stays about where it is.
        """
        room = 1 << min(24, ((1 << 62) // ((steps + 1) * len(c))).bit_length() - 1)
        shift = np.arange(self.classes) * GOLDEN % (1 << 32) * room >> 32
        place = (draw % self.lanes[c] * room + shift[c]) // self.lanes[c]
        key = ((step - 1) * room + place) * len(c) + np.arange(len(c))
        key = np.sort(key[step <= steps])
        return key % len(c)


def earliest_due_first(release: Ints, due: Ints, steps: int, batch: int) -> Ints:
    """The step, from 1, in which each image is drawn, `batch` a step; steps + 1 for those after.

    Images are drawn by (due, release, index), each not before its release. All images due in a
    step form a queue, so that a step only counts how many it takes of each queue.
    """
    queue = due.copy()
    late = due > steps
    queue[late] = steps + 1 + np.unique(due[late], return_inverse=True)[1]
    queues = steps + 2 + int(late.sum())
    images = len(due)
    by_queue = np.sort((queue * (steps + 2) + release) * images + np.arange(images))
    index, arrival = by_queue % images, by_queue // images
    starts = np.flatnonzero(np.diff(arrival, prepend=-1))
    arrival, amount = arrival[starts], np.diff(starts, append=images).astype(np.int32)
    into, at = np.divmod(arrival, steps + 2)
    by_step = np.argsort(at, kind="stable")
    bounds = np.searchsorted(at[by_step], np.arange(1, steps + 2)).tolist()
    taken = _take(into[by_step], amount[by_step], bounds, queues, batch)
    # A queue's images leave it in their order
    step, of_queue, number = taken
    by_step = np.argsort(of_queue, kind="stable")
    drawn = np.empty(images, np.int64)
    drawn[index] = np.repeat(step[by_step], number[by_step])
    return drawn


def _take(
    into: Ints, amount: NDArray[np.int32], bounds: Sequence[int], queues: int, batch: int
) -> tuple[Ints, Ints, NDArray[np.int32]]:
    """(step, queue, number) of what each step takes; the last step has what is left."""
    waiting = np.zeros(queues, np.int32)
    taken: list[NDArray[np.int32]] = []
    width = 8
    for step in range(1, len(bounds)):
        new = slice(bounds[step - 1], bounds[step])
        waiting[into[new]] += amount[new]
        while (filled := waiting[step : step + width].cumsum())[-1] < batch:
            assert step + width < queues, "fewer images are released than the theorem has"
            width *= 2
        last = int(filled.searchsorted(batch))
        here = waiting[step : step + last + 1]
        taken.append(here.copy())
        here[:-1] = 0
        here[-1] = filled[last] - batch
        taken[-1][-1] -= here[-1]
        width = 2 * last + 8
    taken.append(waiting)
    first = np.array([*range(1, len(bounds)), 0])
    sizes = np.array([len(t) for t in taken])
    number = np.concatenate(taken)
    steps = np.repeat(np.arange(1, len(bounds) + 1), sizes)
    queue = np.arange(len(number)) + np.repeat(first - (sizes.cumsum() - sizes), sizes)
    some = np.flatnonzero(number)
    return steps[some], queue[some], number[some]
