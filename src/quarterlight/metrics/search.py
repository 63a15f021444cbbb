"""What stands first for each query, and where its positives stand, by dot product over all candidates, exact.

The scores of some queries with some candidates exist at a time, in memory that fits a processor's cache: each block is
counted and forgotten.

Legend of shapes: Q queries, C candidates, D dimensions, P positives of all queries together, K first candidates of a
query, F of these that something else puts in order, B queries and W candidates of one block, L candidates of one query,
M candidates kept while searching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from quarterlight.metrics.ranking import PRODUCT_TOLERANCE, Floats, Ints, Ranks, count_ranks

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
    column_P, score_P: int64 and float32, of the positives in the order of ``ranks``.
    """

    ranks: Ranks
    column_QK: Ints
    score_QK: npt.NDArray[np.float32]
    column_P: Ints
    score_P: npt.NDArray[np.float32]

    @property
    def best_Q(self) -> npt.NDArray[np.float32]:
        """The score of the best positive of each query."""
        return self.score_P[np.cumsum(self.ranks.num_positives) - self.ranks.num_positives]

    @classmethod
    def joined(cls, parts: Sequence[Found]) -> Found:
        """What was found for the queries of all parts, in order; at least one part."""
        ranks, *arrays = zip(*parts, strict=True)
        return cls(Ranks.joined(ranks), *map(np.concatenate, arrays))


def search(
    query_QD: Floats,
    candidate_CD: Floats,
    wanted: Sequence[Wanted],
    *,
    k: int = 0,
    start: int = 0,
    tolerance: float = PRODUCT_TOLERANCE,
    block: tuple[int, int] = BLOCK,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Found:
    """The ranks of each query's positives and its K = min(k, C) first candidates, in one pass.

    query_QD, candidate_CD: rows of L2 norm 1, any float type (computed in float32).
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
        start,
        tolerance,
        np.full((len(wanted), size), -1, np.int64),
        np.full((len(wanted), size), -np.inf, np.float32),
    )
    parts: list[_Ranked] = []
    row = 0
    while row < len(wanted):
        stop = row + 1
        if wanted[row].pool is None:
            while stop < min(row + block[0], len(wanted)) and wanted[stop].pool is None:
                stop += 1
            parts.append(_search_all(task, np.asarray(query_QD[row:stop], np.float32), row, size, block[1]))
        else:
            parts.append(_search_pool(task, np.asarray(query_QD[row], np.float32), row, size))
        row = stop
        on_progress(row)
    return Found(
        Ranks.joined([part.ranks for part in parts]),
        task.column_QK,
        task.score_QK,
        np.concatenate([np.zeros(0, np.int64), *(part.column_P for part in parts)]),
        np.concatenate([np.zeros(0, np.float32), *(part.score_P for part in parts)]),
    )


def put_first(found: Found, wanted: Sequence[Wanted], place_QF: Ints, *, tolerance: float = PRODUCT_TOLERANCE) -> Found:
    """What was found, with the first F candidates of each query in another order, such as that of a reranker.

    found, wanted: of all queries.
    place_QF: int64, where each of ``found.column_QK[:, :F]`` goes: 0 for the best, equal ones for a tie.
    The scores of these are then numbers above any dot product that make this order; what stands behind them keeps its
    score.  Nothing is searched again: of the first candidates all is known, and for a positive behind them only those
    that were tied with it are higher now.
    """
    num_first = place_QF.shape[1]
    column_QK, score_QK = np.full_like(found.column_QK, -1), np.full_like(found.score_QK, -np.inf)
    ranks = found.ranks
    stop_Q = np.cumsum(ranks.num_positives)
    columns, scores, grades, counts = [], [], [], [np.zeros((3, 0), np.int64)]
    for row, (one, stop) in enumerate(zip(wanted, stop_Q.tolist(), strict=True)):
        column_K, score_K = found.column_QK[row], found.score_QK[row].copy()
        listed_K = _listed(one, column_K)
        F = np.count_nonzero(column_K[:num_first] >= 0)
        old_F, new_F = found.score_QK[row, :F], (2.0 + num_first - place_QF[row, :F]).astype(np.float32)
        score_K[:F] = new_F
        drawn_K = _draw(listed_K, score_K, len(column_K), tolerance, row)
        column_QK[row, : len(drawn_K)], score_QK[row, : len(drawn_K)] = column_K[drawn_K], score_K[drawn_K]

        of_query = slice(stop - ranks.num_positives[row], stop)
        column_P, score_P = found.column_P[of_query], found.score_P[of_query].copy()
        listed_P = _listed(one, column_P)
        count_3P = np.array([part[of_query] for part in (ranks.higher, ranks.tied, ranks.earlier)])
        for number, score in enumerate(score_P):
            is_earlier_F = listed_K[:F] < listed_P[number]
            if len(place := np.flatnonzero(column_K[:F] == column_P[number])):
                score_P[number] = top = new_F[place[0]]
                count_3P[:, number] = (new_F > top).sum(), (new_F == top).sum(), ((new_F == top) & is_earlier_F).sum()
            else:
                was_higher_F = old_F > score + tolerance
                was_tied_F = (old_F >= score - tolerance) & ~was_higher_F
                count_3P[0, number] += (~was_higher_F).sum()
                count_3P[1:, number] -= was_tied_F.sum(), (was_tied_F & is_earlier_F).sum()
        order_P = np.lexsort((listed_P, -score_P))
        columns.append(column_P[order_P])
        scores.append(score_P[order_P])
        grades.append(ranks.grade[of_query][order_P])
        counts.append(count_3P[:, order_P])
    higher, tied, earlier = np.concatenate(counts, axis=1)
    return Found(
        Ranks.counted(higher, tied, earlier, scores, grades, tolerance),
        column_QK,
        score_QK,
        np.concatenate([found.column_P[:0], *columns]),
        np.concatenate([found.score_P[:0], *scores]),
    )


def rank_embeddings(
    query_QD: Floats,
    candidate_CD: Floats,
    positives: Sequence[Sequence[int]],
    *,
    tolerance: float = PRODUCT_TOLERANCE,
    block: tuple[int, int] = BLOCK,
) -> Ranks:
    """The ranks of each query's positives by dot product over all candidates; see :func:`search`.

    positives: columns in [0, C) for each query, at least one.
    """
    wanted = [Wanted(positives=columns) for columns in positives]
    return search(query_QD, candidate_CD, wanted, tolerance=tolerance, block=block).ranks


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
    start: int
    tolerance: float
    column_QK: Ints
    score_QK: npt.NDArray[np.float32]


class _Ranked(NamedTuple):
    """The ranks of the positives of some queries, with their columns and scores in the same order."""

    ranks: Ranks
    column_P: Ints
    score_P: npt.NDArray[np.float32]


def _listed(one: Wanted, column_N: Ints) -> Ints:
    """Where the data lists these candidates of a query."""
    if one.pool is None:
        return column_N
    order_L = np.argsort(one.pool)
    return order_L[np.searchsorted(one.pool, column_N, sorter=order_L)]


def _search_pool(task: _Task, query_D: npt.NDArray[np.float32], row: int, size: int) -> _Ranked:
    """One query that chooses from a few candidates."""
    one = task.wanted[row]
    assert one.pool is not None
    place_of = {column: place for place, column in enumerate(one.pool.tolist())}
    score_L = task.candidate_CD[one.pool] @ query_D
    score_L[[place_of[column] for column in one.excluded if column in place_of]] = -np.inf
    place_P = np.array([place_of.get(column, -1) for column in one.positives], np.int64)
    if len(place_P) and place_P.min() < 0:
        raise ValueError(f"A positive of query {row} is not among the {len(one.pool)} candidates that it chooses from.")
    place_P, grade_P = _best_first(row, score_L[place_P], place_P, one.grades)
    ranks = count_ranks([score_L], [place_P], [grade_P], task.tolerance)
    if size:
        place_K = _draw(np.arange(len(score_L)), score_L, size, task.tolerance, task.start + row)
        task.column_QK[row, : len(place_K)] = one.pool[place_K]
        task.score_QK[row, : len(place_K)] = score_L[place_K]
    return _Ranked(ranks, one.pool[place_P], score_L[place_P])


def _search_all(task: _Task, query_BD: npt.NDArray[np.float32], row: int, size: int, width: int) -> _Ranked:
    """Some queries that choose from all candidates."""
    num_candidates = len(task.candidate_CD)
    wanted = task.wanted[row : row + len(query_BD)]
    excluded = _Excluded(wanted)
    positives = _Positives(task, query_BD, wanted, row)
    kept = _Kept(len(query_BD), size, task.tolerance, task.start + row)
    buffer_BW = np.empty((len(query_BD), min(width, num_candidates)), np.float32)
    true_BW = np.empty(buffer_BW.shape, np.bool_)
    for start in range(0, num_candidates, width):
        block_WD = task.candidate_CD[start : start + width]
        score_BW, mask_BW = buffer_BW, true_BW
        if len(block_WD) < buffer_BW.shape[1]:
            score_BW, mask_BW = np.empty((len(query_BD), len(block_WD)), np.float32), true_BW[:, : len(block_WD)].copy()
        np.matmul(query_BD, block_WD.T, out=score_BW)
        excluded.hide(score_BW, start)
        positives.count(score_BW, start, mask_BW)
        if size:
            kept.add(score_BW, start, mask_BW)
    for number in range(len(query_BD)) if size else ():
        column_K, score_K = kept.of(number)
        task.column_QK[row + number, : len(column_K)] = column_K
        task.score_QK[row + number, : len(column_K)] = score_K
    return positives.ranked()


class _Excluded:
    """What some queries may not find."""

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        pairs = sorted((column, number) for number, one in enumerate(wanted) for column in one.excluded)
        self._column, self._row = np.array(pairs, np.int64).reshape(-1, 2).T

    def hide(self, score_BW: npt.NDArray[np.float32], start: int) -> None:
        here = slice(*np.searchsorted(self._column, (start, start + score_BW.shape[1])))
        score_BW[self._row[here], self._column[here] - start] = -np.inf


class _Positives:
    """The positives of some queries, and how many candidates have been found to stand above and beside them."""

    def __init__(self, task: _Task, query_BD: Floats, wanted: Sequence[Wanted], row: int) -> None:
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
            score_P[np.isin(column_P, one.excluded)] = -np.inf
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

    def ranked(self) -> _Ranked:
        """What the counts say when all candidates are counted."""
        higher, tied, earlier = np.concatenate(self._counts, axis=1)
        ranks = Ranks.counted(higher, tied, earlier, self._score, self._grades, self._tolerance)
        return _Ranked(ranks, np.concatenate(self._place), np.concatenate(self._score))


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
