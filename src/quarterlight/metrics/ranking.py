"""How high the right candidates stand: hit, recall, NDCG and reciprocal rank, and what chance would reach.

Ties.  Candidates with the same score have no order, so every metric here is its expected value over all orders of the
tied candidates (McSherry and Najork, ECIR 2008).  A model that gives every candidate the same score therefore scores
exactly chance, and chance *is* the metric of :func:`chance_ranks`.

A positive's rank needs only two counts, how many candidates score higher and how many the same, so the [Q, C] scores
exist one block of rows at a time and every metric is exact at any depth.

Legend of shapes: Q queries, C candidates, D dimensions, P positives of all queries together, K candidates put first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.floating]
Ints: TypeAlias = npt.NDArray[np.int64]

# Equal vectors may differ in the last bits of their float32 products, depending on where in a matrix block they stand.
PRODUCT_TOLERANCE = 1e-6

MAX_SCORES = 1 << 25
"""Scores of queries and candidates that are held at once, 4 bytes each."""


@dataclass(frozen=True)
class Ranks:
    """Where the positives stand; the positives of a query follow each other, best first.

    higher: int64 [P], candidates that score higher than the positive.
    tied: int64 [P], candidates with the same score, the positive itself included.
    tied_positives: int64 [P], how many of those are positives of the same query.
    num_positives: int64 [Q], at least 1.
    """

    higher: Ints
    tied: Ints
    tied_positives: Ints
    num_positives: Ints

    def mean_of(self, value_P: Floats) -> Floats:
        """The mean over the positives of each query, [P] to [Q]."""
        return np.add.reduceat(value_P, self._first) / self.num_positives if len(value_P) else np.zeros(0)

    def best(self) -> tuple[Ints, Ints, Ints]:
        """``higher``, ``tied`` and ``tied_positives`` of each query's best positive, [Q] each."""
        return self.higher[self._first], self.tied[self._first], self.tied_positives[self._first]

    @property
    def _first(self) -> Ints:
        return np.cumsum(self.num_positives) - self.num_positives


@dataclass(frozen=True)
class First:
    """Candidates of each query that stand before all others, whatever their scores.

    column: int64 [Q, K], each once.  place: int64 [Q, K], 0 for the best, equal ones for a tie.
    """

    column: Ints
    place: Ints


def rank_embeddings(
    query_QD: Floats,
    candidate_CD: Floats,
    positives: Sequence[Sequence[int]],
    *,
    first: First | None = None,
    tolerance: float = PRODUCT_TOLERANCE,
    max_scores: int = MAX_SCORES,
) -> Ranks:
    """The ranks of each query's positives by dot product over all candidates, exact.

    query_QD, candidate_CD: rows of L2 norm 1, any float type (computed in float32).
    positives: columns in [0, C) for each query, at least one.  tolerance: scores this near count as tied.
    first: candidates that something else has put in order, such as a reranker those of :func:`first_k`.
    max_scores: how many scores are held at once (4 bytes each), at least one row.
    """
    if len(query_QD) != len(positives):
        raise ValueError(f"There are {len(query_QD)} query vectors and positives for {len(positives)} queries.")
    blocks = []
    for rows, score_BC in _blocks(query_QD, candidate_CD, max_scores):
        if first is not None and first.column.shape[1]:
            # steps of 1 between places, all above any dot product
            top_BK = 2.0 + first.column.shape[1] - first.place[rows]
            np.put_along_axis(score_BC, first.column[rows], top_BK.astype(np.float32), axis=1)
        blocks.append(rank_scores(score_BC, positives[rows], tolerance=tolerance))
    columns = ("higher", "tied", "tied_positives", "num_positives")
    empty = np.zeros(0, np.int64)
    return Ranks(*(np.concatenate([empty, *(getattr(block, column) for block in blocks)]) for column in columns))


def first_k(
    query_QD: Floats,
    candidate_CD: Floats,
    k: int,
    *,
    tolerance: float = PRODUCT_TOLERANCE,
    max_scores: int = MAX_SCORES,
) -> tuple[Ints, npt.NDArray[np.float32]]:
    """The K = min(k, C) candidates of highest dot product of each query, int64 [Q, K], best first, and these [Q, K].

    Of candidates that tie for the last places some are drawn, always the same for the same row: their order in the pool
    means nothing, and where positives are listed first it would tell.  Other arguments as of :func:`rank_embeddings`.
    """
    size = min(k, len(candidate_CD))
    column_QK = np.empty((len(query_QD), size), np.int64)
    score_QK = np.empty((len(query_QD), size), np.float32)
    for rows, score_BC in _blocks(query_QD, candidate_CD, max_scores) if size else ():
        for row, score_C in enumerate(score_BC, start=rows.start):
            last = np.partition(score_C, -size)[-size]
            sure = np.flatnonzero(score_C > last + tolerance)
            tied = np.flatnonzero(np.abs(score_C - last) <= tolerance)
            drawn = tied
            if len(sure) + len(tied) > size:
                drawn = np.random.default_rng((0, row)).choice(tied, size - len(sure), replace=False)
            # in an order that is not that of the pool, in which a positive may always stand first
            columns = np.random.default_rng((1, row)).permutation(np.concatenate([sure, drawn]))
            column_QK[row] = columns[np.argsort(-score_C[columns], kind="stable")]
            score_QK[row] = score_C[column_QK[row]]
    return column_QK, score_QK


def _blocks(query_QD: Floats, candidate_CD: Floats, max_scores: int) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
    """Some rows, and their dot products with all candidates, float32 [rows, C], until all are done."""
    rows = max(1, max_scores // max(1, len(candidate_CD)))
    transposed_DC = np.ascontiguousarray(candidate_CD, dtype=np.float32).T
    for start in range(0, len(query_QD), rows):
        some = slice(start, start + rows)
        yield some, np.asarray(query_QD[some], dtype=np.float32) @ transposed_DC


def rank_scores(score_QC: Floats, positives: Sequence[Sequence[int]], *, tolerance: float = 0.0) -> Ranks:
    """The ranks of each query's positives in a matrix of scores, higher is better.

    Raises ValueError for a query without positives, a column that is out of range or repeated, and a score that is not
    a number (nothing compares as higher, so it would look perfect).
    """
    higher: list[int] = []
    tied: list[int] = []
    tied_positives: list[int] = []
    for number, (score_C, columns) in enumerate(zip(score_QC, positives, strict=True)):
        if len(columns) == 0 or len(set(columns)) < len(columns):
            raise ValueError(f"Query {number} must have at least one positive, each named once; got {list(columns)}.")
        if min(columns) < 0 or max(columns) >= len(score_C):
            raise ValueError(f"A positive of query {number} is outside the {len(score_C)} candidates: {list(columns)}.")
        if np.isnan(score_C).any():
            raise ValueError(f"The scores of query {number} are not all numbers.")
        best_first = np.sort(score_C[list(columns)])[::-1]
        for score in best_first:
            above = int(np.count_nonzero(score_C > score + tolerance))
            higher.append(above)
            tied.append(int(np.count_nonzero(score_C >= score - tolerance)) - above)
            tied_positives.append(int(np.count_nonzero(np.abs(best_first - score) <= tolerance)))
    num_positives = [len(columns) for columns in positives]
    return Ranks(*(np.array(column, dtype=np.int64) for column in (higher, tied, tied_positives, num_positives)))


def chance_ranks(num_positives: Sequence[int] | Ints, num_candidates: int) -> Ranks:
    """The ranks when all candidates are alike: the metrics of these are the chance level, exactly.

    >>> round(float(hit(chance_ranks([1], 20), k=5)[0]), 12)
    0.25
    """
    count_Q = np.asarray(num_positives, dtype=np.int64)
    if count_Q.size and (count_Q.min() < 1 or count_Q.max() > num_candidates):
        raise ValueError(f"A query has 1 to {num_candidates} positives, got {count_Q.min()} to {count_Q.max()}.")
    count_P = np.repeat(count_Q, count_Q)
    return Ranks(np.zeros_like(count_P), np.full_like(count_P, num_candidates), count_P, count_Q)


def hit(ranks: Ranks, *, k: int) -> Floats:
    """The probability that any positive is among the first k, float64 [Q] in [0, 1].

    This is what M-BEIR reports as Recall@k.  ``hit(k=1)`` is Precision@1.
    With h higher, t tied and n positives among these: 1 - C(t - n, m) / C(t, m), m = min(k - h, t) places for the tied.
    """
    higher_Q, tied_Q, positive_Q = ranks.best()
    places_Q = np.clip(k - higher_Q, 0, tied_Q)
    miss_Q = np.ones(len(higher_Q))
    for place in range(min(k, int(places_Q.max(initial=0)))):
        left_Q = np.maximum(tied_Q - place, 1)
        miss_Q *= np.where(place < places_Q, np.maximum(tied_Q - positive_Q - place, 0) / left_Q, 1.0)
    return 1.0 - miss_Q


def recall(ranks: Ranks, *, k: int) -> Floats:
    """The share of a query's positives among the first k, float64 [Q] in [0, 1]; ``hit`` if it has only one."""
    return ranks.mean_of(np.clip(k - ranks.higher, 0, ranks.tied) / ranks.tied)


def ndcg(ranks: Ranks, *, k: int) -> Floats:
    """Normalised discounted cumulative gain of the first k, binary relevance, float64 [Q] in [0, 1].

    sum over positives of 1 / log2(1 + rank), divided by the same sum for an ideal order
    (Jarvelin and Kekalainen, TOIS 2002, with the discount of trec_eval).
    """
    discount = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(2, k + 2)))])  # of the first r places
    from_P, to_P = np.minimum(ranks.higher, k), np.minimum(ranks.higher + ranks.tied, k)
    gain_P = (discount[to_P] - discount[from_P]) / ranks.tied
    return ranks.mean_of(gain_P) * ranks.num_positives / discount[np.minimum(ranks.num_positives, k)]


def reciprocal_rank(ranks: Ranks) -> Floats:
    """1 / rank of the first positive, at any depth, float64 [Q] in (0, 1]. Its mean is the MRR.

    Among t tied candidates the first of n positives stands j-th with probability C(t - j, n - 1) / C(t, n).
    """
    cases, of_query = np.unique(np.stack(ranks.best(), axis=1), axis=0, return_inverse=True)
    return np.array([_expected_reciprocal(*map(int, case)) for case in cases])[of_query.reshape(-1)]


def _expected_reciprocal(higher: int, tied: int, positives: int) -> float:
    place = np.arange(1, tied - positives + 2)
    earlier = place[:-1]  # not before the j-th: the positives missed every earlier place
    missed = np.concatenate([[1.0], np.cumprod((tied - positives - earlier + 1) / (tied - earlier + 1))])
    return float(np.sum(missed * positives / (tied - place + 1) / (higher + place)))


METRICS: dict[str, Callable[[Ranks], Floats]] = {
    "precision@1": lambda ranks: hit(ranks, k=1),
    "hit@5": lambda ranks: hit(ranks, k=5),
    "hit@10": lambda ranks: hit(ranks, k=10),
    "recall@10": lambda ranks: recall(ranks, k=10),
    "ndcg@5": lambda ranks: ndcg(ranks, k=5),
    "mrr": reciprocal_rank,
}
"""What is reported for a retrieval task, by name; each gives one value a query."""
