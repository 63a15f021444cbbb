"""How high the right candidates stand: hit, recall, average precision, NDCG and reciprocal rank, and what chance would
reach.

Ties.  Candidates with the same score have no order, so every metric here is its expected value over all orders of the
tied candidates (McSherry and Najork, ECIR 2008).  A model that gives every candidate the same score therefore scores
exactly chance, and chance *is* the metric of :func:`chance_ranks`.  Benchmarks that break ties in another way are read
through :meth:`Ranks.broken`.

A positive's rank needs only a few counts, how many candidates score higher and how many the same, so the [Q, C] scores
need never exist (:mod:`quarterlight.metrics.search`) and every metric is exact at any depth.

Legend of shapes: Q queries, C candidates, D dimensions, P positives of all queries together, L candidates of one query.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from quarterlight.errors import InputError, did_you_mean

Floats: TypeAlias = npt.NDArray[np.floating]
Ints: TypeAlias = npt.NDArray[np.int64]

Ties: TypeAlias = Literal["expected", "first", "strict"]
"""``expected``: the mean over all orders of what is tied.  ``first``: the candidate that the data lists first wins, as
in the argmax of MMEB.  ``strict``: a positive stands behind every other candidate with its score, as where SugarCrepe
counts only what scores strictly higher."""

# Equal vectors may differ in the last bits of their float32 products, depending on where in a matrix block they stand.
PRODUCT_TOLERANCE = 1e-6

_NONE, _ZERO, _ONE = np.zeros(0, np.int64), np.zeros(1, np.int64), np.ones(1, np.int64)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Where the positives stand; the positives of a query follow each other, best first.

    higher: int64 [P], candidates that score higher than the positive.
    higher_positives: int64 [P], how many of those are positives of the same query.
    tied: int64 [P], candidates with the same score, the positive itself included.
    tied_positives: int64 [P], how many of those are positives of the same query.
    earlier: int64 [P], how many of those the data lists before the positive.
    grade: float64 [P], how relevant the positive is; 1 where nobody says.
    num_positives: int64 [Q], at least 1.
    """

    higher: Ints
    higher_positives: Ints
    tied: Ints
    tied_positives: Ints
    earlier: Ints
    grade: npt.NDArray[np.float64]
    num_positives: Ints

    def sum_of(self, value_P: Floats) -> Floats:
        """The sum over the positives of each query, [P] to [Q]."""
        return np.add.reduceat(value_P, self._first) if len(value_P) else np.zeros(0)

    def mean_of(self, value_P: Floats) -> Floats:
        """The mean over the positives of each query, [P] to [Q]."""
        return self.sum_of(value_P) / self.num_positives

    def best(self) -> tuple[Ints, Ints, Ints]:
        """``higher``, ``tied`` and ``tied_positives`` of each query's best positive, [Q] each."""
        return self.higher[self._first], self.tied[self._first], self.tied_positives[self._first]

    def broken(self, ties: Ties) -> Ranks:
        """The same ranks with ties broken in one way; what is expected of these is what that way gives.

        Raises InputError for an unknown way.
        """
        if ties == "expected":
            return self
        if ties == "strict":  # the tied positives share the last places of their tie, in whatever order
            rivals_P = self.tied - self.tied_positives
            return replace(self, higher=self.higher + rivals_P, tied=self.tied_positives)
        if ties != "first":
            raise InputError(f"There is no way {ties!r} to break ties. {did_you_mean(ties, get_args(Ties))}")
        query_P = np.repeat(np.arange(len(self.num_positives)), self.num_positives)
        order_P = np.lexsort((self.higher + self.earlier, query_P))
        one_P = np.ones_like(self.tied)
        return replace(
            self,
            higher=(self.higher + self.earlier)[order_P],
            higher_positives=np.arange(len(query_P)) - np.repeat(self._first, self.num_positives),
            tied=one_P,
            tied_positives=one_P,
            earlier=np.zeros_like(one_P),
            grade=self.grade[order_P],
        )

    @classmethod
    def counted(
        cls,
        higher: Ints,
        tied: Ints,
        earlier: Ints,
        scores: Sequence[Floats],
        grades: Sequence[npt.NDArray[np.float64]],
        tolerance: float,
    ) -> Ranks:
        """From the counts [P], and the scores and grades of each query's positives, best first."""
        ahead, beside = [_NONE], [_NONE]
        for score_P in scores:
            if len(score_P) == 1:
                ahead.append(_ZERO)
                beside.append(_ONE)
            else:
                ahead.append((score_P > score_P[:, None] + tolerance).sum(axis=1))
                beside.append((np.abs(score_P - score_P[:, None]) <= tolerance).sum(axis=1))
        return cls(
            higher=higher,
            higher_positives=np.concatenate(ahead),
            tied=tied,
            tied_positives=np.concatenate(beside),
            earlier=earlier,
            grade=np.concatenate([np.zeros(0), *grades]),
            num_positives=np.array([len(score_P) for score_P in scores], np.int64),
        )

    @classmethod
    def joined(cls, parts: Sequence[Ranks]) -> Ranks:
        """The ranks of the queries of all parts, in order."""
        parts = parts or [chance_ranks([], 0)]
        return cls(**{one.name: np.concatenate([getattr(part, one.name) for part in parts]) for one in fields(cls)})

    @property
    def _first(self) -> Ints:
        return np.cumsum(self.num_positives) - self.num_positives


def rank_scores(
    score_QC: Floats,
    positives: Sequence[Sequence[int]],
    *,
    grades: Sequence[Sequence[float]] | None = None,
    tolerance: float = 0.0,
) -> Ranks:
    """The ranks of each query's positives in a matrix of scores, higher is better.

    grades: how relevant each of the positives is; ``None`` for 1.
    Raises ValueError for a query without positives, a column that is out of range or repeated, and a score that is not
    a number (nothing compares as higher, so it would look perfect).
    """
    places, sorted_grades = [], []
    for number, (score_C, columns) in enumerate(zip(score_QC, positives, strict=True)):
        if len(columns) == 0 or len(set(columns)) < len(columns):
            raise ValueError(f"Query {number} must have at least one positive, each named once; got {list(columns)}.")
        if min(columns) < 0 or max(columns) >= len(score_C):
            raise ValueError(f"A positive of query {number} is outside the {len(score_C)} candidates: {list(columns)}.")
        if np.isnan(score_C).any():
            raise ValueError(f"The scores of query {number} are not all numbers.")
        column_P = np.asarray(columns, np.int64)
        order_P = np.lexsort((column_P, -score_C[column_P]))
        places.append(column_P[order_P])
        sorted_grades.append(np.ones(len(columns)) if grades is None else np.asarray(grades[number], float)[order_P])
    return count_ranks(score_QC, places, sorted_grades, tolerance)


def count_ranks(
    scores: Iterable[Floats], places: Sequence[Ints], grades: Sequence[npt.NDArray[np.float64]], tolerance: float
) -> Ranks:
    """The ranks of positives in the scores [L] of each query; ``places`` are where they stand, best first."""
    counts: list[tuple[int, int, int]] = []
    best_first = []
    for score_L, place_P in zip(scores, places, strict=True):
        best_first.append(score_L[place_P])
        for place, score in zip(place_P.tolist(), best_first[-1], strict=True):
            above = int(np.count_nonzero(score_L > score + tolerance))
            tied = int(np.count_nonzero(score_L >= score - tolerance)) - above
            before = int(np.count_nonzero(np.abs(score_L[:place] - score) <= tolerance)) if tied > 1 else 0
            counts.append((above, tied, before))
    higher, tied_P, earlier = np.array(counts, np.int64).reshape(-1, 3).T
    return Ranks.counted(higher, tied_P, earlier, best_first, grades, tolerance)


def chance_ranks(num_positives: Sequence[int] | Ints, num_candidates: int | Sequence[int] | Ints) -> Ranks:
    """The ranks when all candidates are alike: the metrics of these are the chance level, exactly.

    num_candidates: one number, or what each query chooses from.  Raises ValueError for more positives than that.

    >>> round(float(hit(chance_ranks([1], 20), k=5)[0]), 12)
    0.25
    """
    count_Q = np.asarray(num_positives, dtype=np.int64)
    pool_Q: Ints = np.broadcast_to(np.asarray(num_candidates, dtype=np.int64), count_Q.shape)
    if count_Q.size and (count_Q.min() < 1 or (count_Q > pool_Q).any()):
        most = int(pool_Q.max())
        raise ValueError(f"A query has 1 to {most} positives, got {count_Q.min()} to {count_Q.max()}.")
    count_P = np.repeat(count_Q, count_Q)
    zero_P = np.zeros_like(count_P)
    return Ranks(
        higher=zero_P,
        higher_positives=zero_P,
        tied=np.repeat(pool_Q, count_Q),
        tied_positives=count_P,
        earlier=zero_P,
        grade=np.ones(len(count_P)),
        num_positives=count_Q,
    )


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


def average_precision(ranks: Ranks, *, k: int) -> Floats:
    """AP@k as CIRCO defines it, float64 [Q] in [0, 1]: the precision at each positive among the first k, summed and
    divided by min(k, number of positives) (Baldrati et al., ICCV 2023, section 5).

    trec_eval's ``map_cut`` divides by the number of positives instead.
    """
    value_P = np.zeros(len(ranks.higher))
    # what else is tied with a positive is a positive this often
    share_P = (ranks.tied_positives - 1) / np.maximum(ranks.tied - 1, 1)
    deepest = min(k, int((ranks.higher + ranks.tied).max(initial=0)))
    for place in range(1, deepest + 1):
        ahead_P = place - 1 - ranks.higher  # of those that are tied with it, if it stands in this place
        is_possible_P = (ahead_P >= 0) & (ahead_P < ranks.tied)
        precision_P = (ranks.higher_positives + 1 + ahead_P * share_P) / place
        value_P += np.where(is_possible_P, precision_P / ranks.tied, 0.0)
    return ranks.sum_of(value_P) / np.minimum(ranks.num_positives, k)


def ndcg(ranks: Ranks, *, k: int, gain: Callable[[Floats], Floats] = lambda grade_P: grade_P) -> Floats:
    """Normalised discounted cumulative gain of the first k, float64 [Q] in [0, 1].

    sum over positives of gain(grade) / log2(1 + rank), divided by the same sum for an ideal order
    (Jarvelin and Kekalainen, TOIS 2002, with the discount of trec_eval).  The gain is the grade, as in trec_eval and in
    VLM2Vec's ``ndcg_linear``, unless told otherwise; without grades all gains are the same and make no difference.
    """
    place_discount = 1.0 / np.log2(np.arange(2, k + 2))
    discount = np.concatenate([[0.0], np.cumsum(place_discount)])  # of the first r places
    from_P, to_P = np.minimum(ranks.higher, k), np.minimum(ranks.higher + ranks.tied, k)
    gain_P = gain(ranks.grade)
    reached_P = gain_P * (discount[to_P] - discount[from_P]) / ranks.tied
    query_P = np.repeat(np.arange(len(ranks.num_positives)), ranks.num_positives)
    ideal_P = gain_P[np.lexsort((-gain_P, query_P))]  # the queries stay where they are
    place_P = np.arange(len(query_P)) - np.repeat(ranks._first, ranks.num_positives)
    weight_P = np.where(place_P < k, place_discount[np.minimum(place_P, k - 1)], 0.0)
    return ranks.sum_of(reached_P) / ranks.sum_of(ideal_P * weight_P)


def reciprocal_rank(ranks: Ranks, *, k: int | None = None) -> Floats:
    """1 / rank of the first positive, float64 [Q] in [0, 1], at any depth, or 0 if it is not among the first k.

    Its mean is the MRR.  Among t tied candidates the first of n positives stands j-th with probability
    C(t - j, n - 1) / C(t, n).
    """
    cases, of_query = np.unique(np.stack(ranks.best(), axis=1), axis=0, return_inverse=True)
    return np.array([_expected_reciprocal(k, *map(int, case)) for case in cases])[of_query.reshape(-1)]


def _expected_reciprocal(k: int | None, higher: int, tied: int, positives: int) -> float:
    place = np.arange(1, tied - positives + 2)
    earlier = place[:-1]  # not before the j-th: the positives missed every earlier place
    missed = np.concatenate([[1.0], np.cumprod((tied - positives - earlier + 1) / (tied - earlier + 1))])
    value = missed * positives / (tied - place + 1) / (higher + place)
    return float(np.sum(value if k is None else value[higher + place <= k]))


METRICS: dict[str, Callable[[Ranks], Floats]] = {
    "precision@1": lambda ranks: hit(ranks, k=1),
    "hit@5": lambda ranks: hit(ranks, k=5),
    "hit@10": lambda ranks: hit(ranks, k=10),
    "recall@10": lambda ranks: recall(ranks, k=10),
    "ndcg@5": lambda ranks: ndcg(ranks, k=5),
    "mrr": reciprocal_rank,
}
"""What is reported for a retrieval task, by name; each gives one value a query."""

_AT_K: dict[str, Callable[..., Floats]] = {
    "hit": hit,
    "recall": recall,
    "precision": lambda ranks, k: recall(ranks, k=k) * ranks.num_positives / k,
    "map": average_precision,
    "mrr": reciprocal_rank,
    "ndcg": ndcg,
    "ndcg_linear": ndcg,
    "ndcg_exponential": partial(ndcg, gain=lambda grade_P: 2.0**grade_P - 1),
}


def metric_named(name: str) -> Callable[[Ranks], Floats]:
    """The metric that a benchmark calls so: ``hit@k``, ``recall@k``, ``precision@k``, ``map@k`` (that of CIRCO),
    ``mrr@k``, ``mrr``, ``ndcg@k``, ``ndcg_linear@k`` (the same), ``ndcg_exponential@k`` (gain 2^grade - 1) or
    ``accuracy`` (``hit@1``, of queries with two candidates).

    Raises InputError, naming the nearest, for any other name.

    >>> metric_named("recall@2")(rank_scores(np.array([[0.3, 0.2, 0.1]]), [[0, 2]])).tolist()
    [0.5]
    """
    if name == "accuracy":
        return partial(hit, k=1)
    if name == "mrr":
        return reciprocal_rank
    match = re.fullmatch(r"(\w+)@([1-9]\d*)", name)
    if match is None or match[1] not in _AT_K:
        known = [*(f"{one}@k" for one in _AT_K), "mrr", "accuracy"]
        raise InputError(f"There is no metric {name!r} (k is a number of at least 1). {did_you_mean(name, known)}")
    return partial(_AT_K[match[1]], k=int(match[2]))


def measure(name: str, ranks: Ranks, *, ties: Ties = "expected") -> Floats:
    """The value of the metric of that name for each query, float64 [Q], with ties broken in one way.

    >>> tie = rank_scores(np.array([[0.5, 0.5]]), [[0]])
    >>> [measure("hit@1", tie, ties=ties).item() for ties in ("expected", "first", "strict")]
    [0.5, 1.0, 0.0]
    """
    return metric_named(name)(ranks.broken(ties))
