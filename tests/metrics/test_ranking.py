from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from quarterlight.metrics.ranking import (
    METRICS,
    First,
    chance_ranks,
    first_k,
    hit,
    ndcg,
    rank_embeddings,
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


def test_constant_scorer_scores_chance() -> None:
    vector_QD, vector_CD = np.ones((3, 7), np.float32) / 7**0.5, np.ones((50, 7), np.float32) / 7**0.5
    positives = [[4], [1, 2, 3], list(range(20))]
    ranks = rank_embeddings(vector_QD, vector_CD, positives)
    for metric in METRICS.values():
        np.testing.assert_allclose(metric(ranks), metric(chance_ranks([1, 3, 20], 50)), rtol=1e-12)
    np.testing.assert_allclose(hit(ranks, k=1), [1 / 50, 3 / 50, 20 / 50])


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


def test_blocks_do_not_change_anything() -> None:
    generator = np.random.default_rng(1)
    query_QD, candidate_CD = generator.normal(size=(37, 16)), generator.normal(size=(211, 16))
    query_QD, candidate_CD = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query_QD, candidate_CD))
    candidate_CD[100:110] = candidate_CD[0]
    positives = [generator.choice(211, size=1 + number % 5, replace=False).tolist() for number in range(37)]
    whole = rank_scores(query_QD @ candidate_CD.T, positives, tolerance=1e-9)
    for max_scores in (1, 1000, 10**9):
        blocks = rank_embeddings(query_QD, candidate_CD, positives, max_scores=max_scores)
        for name, metric in METRICS.items():
            np.testing.assert_allclose(metric(blocks), metric(whole), rtol=1e-9, err_msg=name)


def test_no_queries() -> None:
    ranks = rank_embeddings(np.zeros((0, 4)), np.zeros((3, 4)), [])
    assert all(metric(ranks).shape == (0,) for metric in METRICS.values())


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


def test_first_k_is_the_top_of_the_order() -> None:
    rng = np.random.default_rng(0)
    query, candidate = (rng.normal(size=(rows, 8)).astype(np.float32) for rows in (5, 30))
    exact = query @ candidate.T
    for max_scores in (1, 1000):
        column, score = first_k(query, candidate, 4, max_scores=max_scores)
        np.testing.assert_array_equal(column, np.argsort(-exact, axis=1)[:, :4])
        np.testing.assert_allclose(score, np.take_along_axis(exact, column, axis=1), atol=1e-6)
    assert sorted(first_k(query, candidate, 99)[0][0].tolist()) == list(range(30))
    assert first_k(query, candidate[:0], 4)[0].shape == (5, 0)


def test_first_k_of_a_tie_is_drawn() -> None:
    """No place of the pool is favoured: a model that knows nothing must not profit from positives that come first."""
    candidate = np.ones((20, 1), np.float32)
    candidate[7] = 2
    column, _ = first_k(np.ones((2000, 1), np.float32), candidate, 5)
    assert (column[:, 0] == 7).all()
    assert all(len(set(row)) == 5 for row in column.tolist())
    times = np.bincount(column[:, 1:].ravel(), minlength=20)
    expected = 2000 * 4 / 19
    chi_square = sum((number - expected) ** 2 / expected for place, number in enumerate(times) if place != 7)
    assert chi_square < 42.3  # 99.9% of chi-square with 18 degrees of freedom
    np.testing.assert_array_equal(column, first_k(np.ones((2000, 1), np.float32), candidate, 5)[0])


def test_first_stand_before_all_others() -> None:
    # by cosine the order is 0 1 2 3 4; three of them are put in the order 2, then 0 and 1 as a tie
    query, candidate = np.ones((1, 1)), np.array([[0.9], [0.8], [0.7], [0.6], [0.5]])
    first = First(np.array([[0, 1, 2]]), np.array([[1, 1, 0]]))
    for positive, higher, tied in ((2, 0, 1), (0, 1, 2), (1, 1, 2), (3, 3, 1), (4, 4, 1)):
        for max_scores in (1, 100):
            ranks = rank_embeddings(query, candidate, [[positive]], first=first, max_scores=max_scores)
            assert (ranks.higher.tolist(), ranks.tied.tolist()) == ([higher], [tied])
    nothing = First(np.zeros((1, 0), np.int64), np.zeros((1, 0), np.int64))
    assert rank_embeddings(query, candidate, [[3]], first=nothing).higher.tolist() == [3]
