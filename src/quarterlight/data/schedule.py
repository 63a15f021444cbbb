"""What a training run draws next, from its seed and the number of the draw alone, so that it resumes anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

_Ints: TypeAlias = npt.NDArray[np.int64]

# Steps along the golden ratio fill the unit interval evenly however many there are, so the shares of the tasks hold to
# within a few steps over any stretch of a run; independent draws would stray by the square root of its length.
_GOLDEN = (math.sqrt(5) - 1) / 2
_CHUNK = 4096


class Schedule:
    """Which task each draw of a run is from, so that any stretch of draws has close to its share of every task.

    shares: of the tasks, summing to 1.  seed: decides where in the order a run begins.
    """

    def __init__(self, shares: npt.NDArray[np.float64], seed: int) -> None:
        self._ends = np.cumsum(shares)[:-1]
        self._offset = np.random.default_rng(seed).random()
        self._before = [np.zeros(len(shares), np.int64)]  # draws of each task before each chunk

    def turns(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """For each of ``count`` draws from ``start`` on its task, and how many draws of that task went before."""
        chunk = start // _CHUNK
        before = self._before
        while len(before) <= chunk:  # a new list, so that threads may ask at once
            done = (len(before) - 1) * _CHUNK
            before = [*before, before[-1] + self._count(self._tasks(done, done + _CHUNK))]
        self._before = before
        turns = before[chunk] + self._count(self._tasks(chunk * _CHUNK, start))
        for task in self._tasks(start, start + count).tolist():
            yield task, int(turns[task])
            turns[task] += 1

    def _tasks(self, start: int, stop: int) -> _Ints:
        place = (self._offset + _GOLDEN * np.arange(start, stop)) % 1.0
        return np.searchsorted(self._ends, place, side="right")

    def _count(self, tasks: _Ints) -> _Ints:
        return np.bincount(tasks, minlength=len(self._ends) + 1)


class Passes:
    """The order in which ``count`` things are drawn: each once in a pass, in another order each pass.

    seed: of the orders; no other draw of a run may have the same.  Threads may ask at once.
    """

    def __init__(self, count: int, seed: Sequence[int]) -> None:
        self._count = count
        self._seed = tuple(seed)
        self._orders: dict[int, npt.NDArray[np.int32]] = {}  # of two passes: a batch may end one and begin the next

    def place(self, turn: int) -> int:
        """Which of them comes after ``turn`` others."""
        epoch, place = divmod(turn, self._count)
        orders = self._orders
        if epoch not in orders:
            order = np.random.default_rng((*self._seed, epoch)).permutation(self._count).astype(np.int32)
            self._orders = orders = {one: old for one, old in orders.items() if one == epoch - 1} | {epoch: order}
        return int(orders[epoch][place])


class Rows:
    """The rows of several tasks as a run draws them: each task as often as its share says, its rows in passes.

    counts: rows of each task; one without any has no part in it.  shares: of the tasks.  seed: of the run.
    order: a number that sets the orders of the rows apart from what else is drawn from the same seed.
    """

    def __init__(self, counts: Sequence[int], shares: npt.NDArray[np.float64], *, seed: int, order: int) -> None:
        shares = shares * [count > 0 for count in counts]
        self._schedule = Schedule(shares / shares.sum(), seed)
        self._passes = [Passes(count, (seed, order, task)) for task, count in enumerate(counts)]

    def drawn(self, start: int, count: int) -> list[tuple[int, int]]:
        """Task and row, in the task, of each of ``count`` draws from ``start`` on."""
        return [(task, self._passes[task].place(turn)) for task, turn in self._schedule.turns(start, count)]
