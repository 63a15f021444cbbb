from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from quarterlight.metrics.ranking import (
    METRICS,
    chance_ranks,
    hit,
    ndcg,
    rank_scores,
    recall,
    reciprocal_rank,
)


def test_by_hand() -> None:
    # The order of the candidates is 3, 1, 0, 4, 2; the positives stand at ranks 2 and 5.
    ranks = rank_scores(np.array([[0.5, 0.8, 0.1, 0.9, 0.2]]), [[2, 1]])
    assert hit(ranks, k=1) == 0
    assert hit(ranks, k=2) == 1
    assert recall(ranks, k=4) == 0.5
    assert recall(ranks, k=5) == 1
    assert reciprocal_rank(ranks) == 0.5
    assert ndcg(ranks, k=3)[0] == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))
    assert ndcg(ranks, k=5)[0] == pytest.approx((1 / math.log2(3) + 1 / math.log2(6)) / (1 + 1 / math.log2(3)))
    assert ndcg(ranks, k=1) == 0


def test_perfect_and_worst() -> None:
    score = np.array([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    ranks = rank_scores(score, [[0, 1], [0]])
    assert ndcg(ranks, k=2).tolist() == [1.0, 0.0]
    assert reciprocal_rank(ranks).tolist() == [1.0, 0.25]
    assert hit(ranks, k=1).tolist() == [1.0, 0.0]


def test_ties_are_the_mean_over_all_orders() -> None:
    """Against brute force: every order of candidates that respects the scores, equally likely."""
    generator = np.random.default_rng(0)
    for _ in range(25):
        score = generator.integers(0, 3, size=6).astype(float)
        positives = generator.choice(6, size=generator.integers(1, 4), replace=False).tolist()
        orders = [
            order
            for order in itertools.permutations(range(6))
            if all(score[a] >= score[b] for a, b in itertools.pairwise(order))
        ]
        # An order without ties: the position decides.
        strict = np.stack([-np.argsort(order).astype(float) for order in orders])
        for name, metric in METRICS.items():
            expected = metric(rank_scores(strict, [positives] * len(orders))).mean()
            assert metric(rank_scores(score[None], [positives]))[0] == pytest.approx(expected), name


def test_chance_in_closed_form() -> None:
    ranks = chance_ranks([1, 4], 1000)
    np.testing.assert_allclose(hit(ranks, k=10), [0.01, 1 - math.comb(996, 10) / math.comb(1000, 10)])
    np.testing.assert_allclose(recall(ranks, k=10), [0.01, 0.01])
    assert reciprocal_rank(ranks)[0] == pytest.approx(sum(1 / r for r in range(1, 1001)) / 1000)
    assert ndcg(ranks, k=5)[0] == pytest.approx(sum(1 / math.log2(1 + r) for r in range(1, 6)) / 1000)


def test_all_candidates_positive() -> None:
    for metric in METRICS.values():
        value = metric(chance_ranks([4], 4))[0]
        assert value == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("score", "positives", "message"),
    [
        ([[1.0, math.nan]], [[0]], "not all numbers"),
        ([[1.0, 2.0]], [[]], "at least one positive"),
        ([[1.0, 2.0]], [[1, 1]], "named once"),
        ([[1.0, 2.0]], [[2]], "outside the 2 candidates"),
        ([[1.0, 2.0]], [[-1]], "outside the 2 candidates"),
    ],
)
def test_bad_input(score: list[list[float]], positives: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_scores(np.array(score), positives)


def test_chance_of_an_impossible_number_of_positives() -> None:
    with pytest.raises(ValueError, match="1 to 3 positives"):
        chance_ranks([4], 3)
