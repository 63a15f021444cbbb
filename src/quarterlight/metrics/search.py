"""What stands first for each query, and where its positives stand, by dot product over all candidates, exact.

The scores of some queries with some candidates exist at a time, in memory that fits a processor's cache: each block is
counted and forgotten.

Legend of shapes: Q queries, C candidates, D dimensions, P positives of all queries together, K candidates put first,
B queries and W candidates of one block, L candidates of one query, M candidates kept while searching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from quarterlight.metrics.ranking import PRODUCT_TOLERANCE, First, Floats, Ints, Ranks, count_ranks

BLOCK = (512, 8192)
"""Queries and candidates whose scores are held at once, 4 bytes each."""

_MANY = 16  # positives of a query from which on sorting all scores is cheaper than comparing them with each


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What one query looks for, in columns of all candidates.

    positives: at least one, each once.  grades: how relevant each is; ``None`` for 1.
    excluded: may not be found; no positive is among them.
    pool: what this query alone chooses from, each once, in the order of the data; ``None`` for all candidates.
    """

    positives: Sequence[int]
    grades: Sequence[float] | None = None
    excluded: Sequence[int] = ()
    pool: Ints | None = None


class Found(NamedTuple):
    """What a search found: the ranks of the positives, and the first K candidates of each query, best first.

    column_QK: int64, -1 where a query has fewer to choose from.  score_QK: float32, -inf there.
    best_Q: float32, the score of the best positive.
    """

    ranks: Ranks
    column_QK: Ints
    score_QK: npt.NDArray[np.float32]
    best_Q: npt.NDArray[np.float32]


def search(
    query_QD: Floats,
    candidate_CD: Floats,
    wanted: Sequence[Wanted],
    *,
    k: int = 0,
    first: First | None = None,
    start: int = 0,
    tolerance: float = PRODUCT_TOLERANCE,
    block: tuple[int, int] = BLOCK,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Found:
    """The ranks of each query's positives and its K = min(k, C) first candidates, in one pass.

    query_QD, candidate_CD: rows of L2 norm 1, any float type (computed in float32).
    first: candidates that something else has put in order, such as a reranker what was found before; the scores that
        come out of these are then numbers above any dot product that make this order.
    start: number of the first of these queries among all of which they are a part; it decides how ties are drawn.
    tolerance: scores this near count as tied.
    on_progress: called with how many queries are done.

    Of candidates that tie for the last places some are drawn, always the same for the same query: their order in the
    pool means nothing, and where positives are listed first it would tell.  Raises ValueError for what is impossible:
    positives that are repeated, excluded or not in the pool, vectors that are not finite.
    """
    if len(query_QD) != len(wanted):
        raise ValueError(f"There are {len(query_QD)} query vectors and positives for {len(wanted)} queries.")
    if not (np.isfinite(query_QD.sum()) and np.isfinite(candidate_CD.sum())):
        raise ValueError("The vectors of queries and candidates must be finite; some are NaN or infinite.")
    size = min(k, len(candidate_CD))
    task = _Task(
        np.asarray(candidate_CD, np.float32),
        wanted,
        First(np.zeros((len(wanted), 0), np.int64), np.zeros((len(wanted), 0), np.int64)) if first is None else first,
        start,
        tolerance,
        np.full((len(wanted), size), -1, np.int64),
        np.full((len(wanted), size), -np.inf, np.float32),
    )
    ranks: list[Ranks] = []
    bests = [np.zeros(0, np.float32)]
    row = 0
    while row < len(wanted):
        stop = row + 1
        if wanted[row].pool is None:
            while stop < min(row + block[0], len(wanted)) and wanted[stop].pool is None:
                stop += 1
            some, best_B = _search_all(task, np.asarray(query_QD[row:stop], np.float32), row, size, block[1])
        else:
            some, best_B = _search_pool(task, np.asarray(query_QD[row], np.float32), row, size)
        ranks.append(some)
        bests.append(best_B)
        row = stop
        on_progress(row)
    return Found(Ranks.joined(ranks), task.column_QK, task.score_QK, np.concatenate(bests))


def rank_embeddings(
    query_QD: Floats,
    candidate_CD: Floats,
    positives: Sequence[Sequence[int]],
    *,
    first: First | None = None,
    tolerance: float = PRODUCT_TOLERANCE,
    block: tuple[int, int] = BLOCK,
) -> Ranks:
    """The ranks of each query's positives by dot product over all candidates; see :func:`search`.

    positives: columns in [0, C) for each query, at least one.
    """
    wanted = [Wanted(positives=columns) for columns in positives]
    return search(query_QD, candidate_CD, wanted, first=first, tolerance=tolerance, block=block).ranks


def first_k(
    query_QD: Floats,
    candidate_CD: Floats,
    k: int,
    *,
    tolerance: float = PRODUCT_TOLERANCE,
    block: tuple[int, int] = BLOCK,
) -> tuple[Ints, npt.NDArray[np.float32]]:
    """The K = min(k, C) candidates of highest dot product of each query, int64 [Q, K], best first, and these [Q, K].

    As :func:`search` finds them.
    """
    if not len(candidate_CD):
        return np.empty((len(query_QD), 0), np.int64), np.empty((len(query_QD), 0), np.float32)
    anything = [Wanted(positives=(0,))] * len(query_QD)
    found = search(query_QD, candidate_CD, anything, k=k, tolerance=tolerance, block=block)
    return found.column_QK, found.score_QK


class _Task(NamedTuple):
    """What all blocks share, and where their results go."""

    candidate_CD: npt.NDArray[np.float32]
    wanted: Sequence[Wanted]
    first: First
    start: int
    tolerance: float
    column_QK: Ints
    score_QK: npt.NDArray[np.float32]


def _search_pool(
    task: _Task, query_D: npt.NDArray[np.float32], row: int, size: int
) -> tuple[Ranks, npt.NDArray[np.float32]]:
    """One query that chooses from a few candidates."""
    one = task.wanted[row]
    assert one.pool is not None
    place_of = {column: place for place, column in enumerate(one.pool.tolist())}
    score_L = task.candidate_CD[one.pool] @ query_D
    score_L[[place_of[column] for column in one.excluded if column in place_of]] = -np.inf
    for column, top in zip(*_top(task.first, row), strict=True):
        score_L[place_of[column]] = top
    place_P = np.array([place_of.get(column, -1) for column in one.positives], np.int64)
    if len(place_P) and place_P.min() < 0:
        raise ValueError(f"A positive of query {row} is not among the {len(one.pool)} candidates that it chooses from.")
    place_P, grade_P = _best_first(row, score_L[place_P], place_P, one.grades)
    score_P = score_L[place_P]
    ranks = count_ranks([score_L], [place_P], [grade_P], task.tolerance)
    if size:
        place_K = _draw(np.arange(len(score_L)), score_L, size, task.tolerance, task.start + row)
        task.column_QK[row, : len(place_K)] = one.pool[place_K]
        task.score_QK[row, : len(place_K)] = score_L[place_K]
    return ranks, score_P[:1]


def _search_all(
    task: _Task, query_BD: npt.NDArray[np.float32], row: int, size: int, width: int
) -> tuple[Ranks, npt.NDArray[np.float32]]:
    """Some queries that choose from all candidates."""
    num_candidates = len(task.candidate_CD)
    wanted = task.wanted[row : row + len(query_BD)]
    overrides = _Overrides(task.first, wanted, row)
    positives = _Positives(task, query_BD, wanted, row, overrides)
    kept = _Kept(len(query_BD), size, task.tolerance, task.start + row)
    buffer_BW = np.empty((len(query_BD), min(width, num_candidates)), np.float32)
    true_BW = np.empty(buffer_BW.shape, np.bool_)
    for start in range(0, num_candidates, width):
        block_WD = task.candidate_CD[start : start + width]
        score_BW, mask_BW = buffer_BW, true_BW
        if len(block_WD) < buffer_BW.shape[1]:
            score_BW, mask_BW = np.empty((len(query_BD), len(block_WD)), np.float32), true_BW[:, : len(block_WD)].copy()
        np.matmul(query_BD, block_WD.T, out=score_BW)
        overrides.apply(score_BW, start)
        positives.count(score_BW, start, mask_BW)
        if size:
            kept.add(score_BW, start, mask_BW)
    for number in range(len(query_BD)) if size else ():
        column_K, score_K = kept.of(number)
        task.column_QK[row + number, : len(column_K)] = column_K
        task.score_QK[row + number, : len(column_K)] = score_K
    return positives.ranks(), positives.best_B


class _Overrides:
    """Scores of some queries that are not dot products: those of what is excluded, and of what stands first."""

    def __init__(self, first: First, wanted: Sequence[Wanted], row: int) -> None:
        rows: list[int] = []
        columns: list[int] = []
        scores: list[float] = []
        for number, one in enumerate(wanted):
            tops = zip(*_top(first, row + number), strict=True)
            for column, score in (*((column, -np.inf) for column in one.excluded), *tops):
                rows.append(number)
                columns.append(column)
                scores.append(score)
        order = np.argsort(columns, kind="stable")  # so that what stands first comes after what is excluded
        self._row, self._column = np.array(rows, np.int64)[order], np.array(columns, np.int64)[order]
        self._score = np.array(scores, np.float32)[order]
        self.of = {(r, c): s for r, c, s in zip(rows, columns, scores, strict=True)}

    def apply(self, score_BW: npt.NDArray[np.float32], start: int) -> None:
        here = slice(*np.searchsorted(self._column, (start, start + score_BW.shape[1])))
        score_BW[self._row[here], self._column[here] - start] = self._score[here]


class _Positives:
    """The positives of some queries, and how many candidates have been found to stand above and beside them."""

    def __init__(
        self, task: _Task, query_BD: Floats, wanted: Sequence[Wanted], row: int, overrides: _Overrides
    ) -> None:
        self._tolerance = task.tolerance
        places, grades, scores = [], [], []
        for number, one in enumerate(wanted):
            column_P = np.asarray(one.positives, np.int64)
            if len(column_P) and (column_P.min() < 0 or column_P.max() >= len(task.candidate_CD)):
                raise ValueError(
                    f"A positive of query {row + number} is outside the {len(task.candidate_CD)} candidates: "
                    f"{list(one.positives)}."
                )
            score_P = task.candidate_CD[column_P] @ query_BD[number]
            for place, column in enumerate(one.positives) if overrides.of else ():
                score_P[place] = overrides.of.get((number, column), score_P[place])
            order_P, grade_P = _best_first(row + number, score_P, column_P, one.grades, as_order=True)
            places.append(column_P[order_P])
            scores.append(score_P[order_P])
            grades.append(grade_P)
        self._place, self._score = places, scores
        self._grades = grades
        self.best_B = np.array([score_P[0] for score_P in scores], np.float32)
        self._counts = [np.zeros((3, len(one)), np.int64) for one in places]  # higher, tied, earlier
        self._single = all(len(one) == 1 for one in places)

    def count(self, score_BW: npt.NDArray[np.float32], start: int, mask_BW: npt.NDArray[np.bool_]) -> None:
        """Counts one block of candidates, of which ``start`` is the first; overwrites the mask."""
        if self._single:  # the usual case, with all rows at once
            bound_B = np.float32(self._tolerance)
            np.greater(score_BW, (self.best_B + bound_B)[:, None], out=mask_BW)
            above = [int(np.count_nonzero(mask_W)) for mask_W in mask_BW]
            np.greater_equal(score_BW, (self.best_B - bound_B)[:, None], out=mask_BW)
            for number, mask_W in enumerate(mask_BW):
                tied = int(np.count_nonzero(mask_W)) - above[number]
                self._add(number, 0, above[number], tied, score_BW[number], start)
            return
        for number, score_P in enumerate(self._score):
            score_W = score_BW[number]
            sorted_W = np.sort(score_W) if len(score_P) > _MANY else None
            for place, score in enumerate(score_P):
                if sorted_W is None:
                    higher = int(np.count_nonzero(score_W > score + self._tolerance))
                    tied = int(np.count_nonzero(score_W >= score - self._tolerance)) - higher
                else:
                    higher = len(sorted_W) - int(np.searchsorted(sorted_W, score + self._tolerance, side="right"))
                    tied = len(sorted_W) - int(np.searchsorted(sorted_W, score - self._tolerance)) - higher
                self._add(number, place, higher, tied, score_W, start)

    def _add(self, number: int, place: int, higher: int, tied: int, score_W: Floats, start: int) -> None:
        counts = self._counts[number]
        counts[0, place] += higher
        if not tied:
            return
        counts[1, place] += tied
        column = int(self._place[number][place])
        if start < column and (tied > 1 or column >= start + len(score_W)):
            before_W = np.abs(score_W[: column - start] - self._score[number][place]) <= self._tolerance
            counts[2, place] += np.count_nonzero(before_W)

    def ranks(self) -> Ranks:
        """What the counts say when all candidates are counted."""
        higher, tied, earlier = np.concatenate(self._counts, axis=1)
        return Ranks.counted(higher, tied, earlier, self._score, self._grades, self._tolerance)


class _Kept:
    """The best candidates so far of some queries, and a floor for each that K of them reach."""

    def __init__(self, num_queries: int, size: int, tolerance: float, start: int) -> None:
        self._size, self._tolerance, self._start = size, tolerance, start
        self._score_BM = np.full((num_queries, 4 * size + 64), -np.inf, np.float32)
        self._column_BM = np.full(self._score_BM.shape, -1, np.int64)
        self._number_B = np.zeros(num_queries, np.int64)
        self._floor_B = np.full(num_queries, -np.inf, np.float32)

    def add(self, score_BW: npt.NDArray[np.float32], start: int, mask_BW: npt.NDArray[np.bool_]) -> None:
        """Takes in what reaches the floor; overwrites the mask."""
        width = score_BW.shape[1]
        if not start and width > self._size:
            self._floor_B = np.partition(score_BW, width - self._size, axis=1)[:, width - self._size]
        bound_B = np.maximum(self._floor_B - np.float32(self._tolerance), np.finfo(np.float32).min)
        np.greater_equal(score_BW, bound_B[:, None], out=mask_BW)
        row_N, column_N = np.divmod(np.flatnonzero(mask_BW), width)
        if not len(row_N):
            return
        new_B = np.bincount(row_N, minlength=len(self._number_B))
        first_B = np.cumsum(new_B) - new_B
        if (self._number_B + new_B > self._score_BM.shape[1]).any():
            self._shrink()
            for number in np.flatnonzero(self._number_B + new_B > self._score_BM.shape[1]).tolist():
                # far more than the floor promised: a large tie
                part = slice(first_B[number], first_B[number] + new_B[number])
                old = self._number_B[number]
                columns = np.concatenate([self._column_BM[number, :old], start + column_N[part]])
                scores = np.concatenate([self._score_BM[number, :old], score_BW[number, column_N[part]]])
                self._set(number, columns, scores)
                new_B[number] = 0
            is_left = new_B[row_N] > 0
            row_N, column_N = row_N[is_left], column_N[is_left]
            first_B = np.cumsum(new_B) - new_B
        place_N = self._number_B[row_N] + np.arange(len(row_N)) - first_B[row_N]
        self._score_BM[row_N, place_N] = score_BW[row_N, column_N]
        self._column_BM[row_N, place_N] = start + column_N
        self._number_B += new_B

    def of(self, number: int) -> tuple[Ints, Floats]:
        """The best of one query, best first."""
        old = self._number_B[number]
        column_N, score_N = self._column_BM[number, :old], self._score_BM[number, :old]
        order = _draw(column_N, score_N, self._size, self._tolerance, self._start + number)
        return column_N[order], score_N[order]

    def _shrink(self) -> None:
        """Leaves every query its K best, and raises the floors to what these reach."""
        size = self._score_BM.shape[1]
        kth_B = np.partition(self._score_BM, size - self._size, axis=1)[:, size - self._size]
        mask_BM = (self._score_BM >= (kth_B - np.float32(self._tolerance))[:, None]) & (self._score_BM > -np.inf)
        count_B = mask_BM.sum(axis=1)
        usual = np.flatnonzero(count_B == self._size)
        _, place_N = np.nonzero(mask_BM[usual])
        place_UK = place_N.reshape(len(usual), self._size)
        best_UK = np.take_along_axis(self._score_BM[usual], place_UK, axis=1)
        column_UK = np.take_along_axis(self._column_BM[usual], place_UK, axis=1)
        self._score_BM[usual] = -np.inf
        self._score_BM[usual, : self._size] = best_UK
        self._column_BM[usual, : self._size] = column_UK
        self._number_B[usual] = self._size
        self._floor_B[usual] = kth_B[usual]
        for number in np.flatnonzero(count_B > self._size).tolist():
            old = self._number_B[number]
            self._set(number, self._column_BM[number, :old].copy(), self._score_BM[number, :old].copy())

    def _set(self, number: int, column_N: Ints, score_N: Floats) -> None:
        order = _draw(column_N, score_N, self._size, self._tolerance, self._start + number)
        self._score_BM[number] = -np.inf
        self._score_BM[number, : len(order)] = score_N[order]
        self._column_BM[number, : len(order)] = column_N[order]
        self._number_B[number] = len(order)
        if len(order) == self._size:
            self._floor_B[number] = score_N[order[-1]]


def _top(first: First, row: int) -> tuple[list[int], list[float]]:
    """The columns that stand first for a query, and scores that say so, in steps of 1 above any dot product."""
    is_there = first.column[row] >= 0
    top_K = 2.0 + first.column.shape[1] - first.place[row][is_there]
    return first.column[row][is_there].tolist(), top_K.tolist()


def _best_first(
    row: int, score_P: Floats, place_P: Ints, grades: Sequence[float] | None, *, as_order: bool = False
) -> tuple[Ints, npt.NDArray[np.float64]]:
    """The positives of a query by falling score, those of one score as the data lists them, and their grades."""
    if not len(place_P) or len(np.unique(place_P)) < len(place_P):
        raise ValueError(f"Query {row} must have at least one positive, each named once; got {place_P.tolist()}.")
    if not np.isfinite(score_P).all():
        raise ValueError(f"The scores of the positives of query {row} are not all numbers; one may be excluded.")
    order_P = np.lexsort((place_P, -score_P)) if len(place_P) > 1 else np.zeros(1, np.int64)
    grade_P = np.ones(len(place_P)) if grades is None else np.asarray(grades, np.float64)[order_P]
    return (order_P if as_order else place_P[order_P]), grade_P


def _draw(column_N: Ints, score_N: Floats, size: int, tolerance: float, row: int) -> Ints:
    """The positions of the ``size`` highest scores, best first; fewer if some are excluded (-inf).

    Of equal scores it is the query and the column that decide, by a number that looks random and depends on nothing
    else, so that the order in which candidates are looked at does not matter.
    """
    place_N = np.flatnonzero(score_N > -np.inf)
    if len(place_N) > size:
        last = np.partition(score_N[place_N], -size)[-size]
        place_N = place_N[score_N[place_N] >= last - tolerance]
        if len(place_N) > size:
            key_N = _key(row, column_N[place_N])
            is_tied = score_N[place_N] <= last + tolerance
            place_N = place_N[np.lexsort((key_N, is_tied))[:size]]
    return place_N[np.lexsort((_key(row, column_N[place_N]), -score_N[place_N]))]


def _key(row: int, column_N: Ints) -> npt.NDArray[np.uint64]:
    """A number for each column that looks random (the mixer of splitmix64; Steele, Lea and Flood, OOPSLA 2014)."""
    mixed = column_N.astype(np.uint64) + np.uint64((row + 1) * 0x9E3779B97F4A7C15 % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
