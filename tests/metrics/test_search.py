from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from quarterlight.metrics.ranking import METRICS, Ranks, chance_ranks, hit, rank_scores
from quarterlight.metrics.search import Wanted, first_k, put_first, rank_embeddings, search


def test_constant_scorer_scores_chance() -> None:
    vector_QD, vector_CD = np.ones((3, 7), np.float32) / 7**0.5, np.ones((50, 7), np.float32) / 7**0.5
    positives = [[4], [1, 2, 3], list(range(20))]
    ranks = rank_embeddings(vector_QD, vector_CD, positives)
    for metric in METRICS.values():
        np.testing.assert_allclose(metric(ranks), metric(chance_ranks([1, 3, 20], 50)), rtol=1e-12)
    np.testing.assert_allclose(hit(ranks, k=1), [1 / 50, 3 / 50, 20 / 50])


def test_blocks_do_not_change_anything() -> None:
    generator = np.random.default_rng(1)
    query_QD, candidate_CD = generator.normal(size=(37, 16)), generator.normal(size=(211, 16))
    query_QD, candidate_CD = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query_QD, candidate_CD))
    candidate_CD[100:110] = candidate_CD[0]
    positives = [generator.choice(211, size=1 + number % 5, replace=False).tolist() for number in range(37)]
    whole = rank_scores(query_QD @ candidate_CD.T, positives, tolerance=1e-9)
    for block in ((1, 1), (5, 17), (100, 1000)):
        blocks = rank_embeddings(query_QD, candidate_CD, positives, block=block)
        for name, metric in METRICS.items():
            np.testing.assert_allclose(metric(blocks), metric(whole), rtol=1e-9, err_msg=name)


def test_no_queries() -> None:
    ranks = rank_embeddings(np.zeros((0, 4)), np.zeros((3, 4)), [])
    assert all(metric(ranks).shape == (0,) for metric in METRICS.values())


def test_first_k_is_the_top_of_the_order() -> None:
    rng = np.random.default_rng(0)
    query, candidate = (rng.normal(size=(rows, 8)).astype(np.float32) for rows in (5, 30))
    exact = query @ candidate.T
    for block in ((1, 7), (9, 100)):
        column, score = first_k(query, candidate, 4, block=block)
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
    for positive, higher, tied in ((2, 0, 1), (0, 1, 2), (1, 1, 2), (3, 3, 1), (4, 4, 1)):
        wanted = [Wanted(positives=(positive,))]
        plain = search(query, candidate, wanted, k=4)
        found = put_first(plain, wanted, np.array([[1, 1, 0]]))
        assert (found.ranks.higher.tolist(), found.ranks.tied.tolist()) == ([higher], [tied])
        assert found.column_QK[0, 0] == 2 and sorted(found.column_QK[0, 1:3]) == [0, 1] and found.column_QK[0, 3] == 3
        assert put_first(plain, wanted, np.zeros((1, 0), np.int64)).ranks.higher.tolist() == [positive]


@pytest.mark.parametrize("seed", range(6))
def test_what_stands_first_is_ranked_as_if_all_scores_were_known(seed: int) -> None:
    """Ties between what stands first and what comes behind, several positives with grades, pools and exclusions."""
    query, candidate, wanted = random_search(seed)
    query, candidate = (np.sign(x[:, :3]) / 3**0.5 for x in (query, candidate))  # no more than four scores
    wanted = [replace(one, grades=np.arange(1.0, 1 + len(one.positives)).tolist()) for one in wanted]
    rng = np.random.default_rng(seed)
    plain = search(query, candidate, wanted, k=20)
    place_QF = np.array([np.minimum(rng.permutation(12), rng.integers(12)) for _ in wanted])
    found = put_first(plain, wanted, place_QF)
    expected = []
    for row, one in enumerate(wanted):
        score_C = np.round(candidate @ query[row], 3)
        score_C[list(one.excluded)] = -np.inf
        score_C[plain.column_QK[row, :12]] = 99 - place_QF[row]
        pool = np.arange(len(candidate)) if one.pool is None else one.pool
        positives = [pool.tolist().index(column) for column in one.positives]
        expected.append(rank_scores(score_C[None, pool], [positives], grades=[one.grades], tolerance=1e-6))
        np.testing.assert_allclose(score_C[found.column_QK[row, :12]], 99 - np.sort(place_QF[row]))
        assert set(found.column_QK[row, 12:]) == set(plain.column_QK[row, 12:])
    whole = Ranks.joined(expected)
    for one in fields(Ranks):
        np.testing.assert_array_equal(getattr(found.ranks, one.name), getattr(whole, one.name), err_msg=one.name)


def brute(query: np.ndarray, candidate: np.ndarray, wanted: list[Wanted]) -> list[list[int]]:
    """The order of what each query may find, ties as the data lists them."""
    orders = []
    for row, one in enumerate(wanted):
        columns = np.arange(len(candidate)) if one.pool is None else one.pool
        columns = np.array([column for column in columns.tolist() if column not in one.excluded])
        orders.append(columns[np.argsort(-(candidate[columns] @ query[row]), kind="stable")].tolist())
    return orders


def random_search(seed: int, num_queries: int = 23, num_candidates: int = 400) -> tuple[np.ndarray, np.ndarray, list]:
    rng = np.random.default_rng(seed)
    query, candidate = (rng.normal(size=(rows, 8)).astype(np.float32) for rows in (num_queries, num_candidates))
    wanted = []
    for number in range(num_queries):
        columns = rng.permutation(num_candidates)
        own = number % 3 == 2
        wanted.append(
            Wanted(
                positives=columns[: 1 + (number % 5) ** 2 * 2].tolist(),
                excluded=columns[40:50].tolist() if number % 2 else (),
                pool=columns[:60] if own else None,
            )
        )
    return query, candidate, wanted


def test_pools_exclusions_and_many_positives_against_brute_force() -> None:
    query, candidate, wanted = random_search(2)
    orders = brute(query, candidate, wanted)
    for block in ((1, 13), (7, 100), (512, 8192)):
        found = search(query, candidate, wanted, k=70, block=block)
        at = 0
        for row, (one, order) in enumerate(zip(wanted, orders, strict=True)):
            ranks = sorted(order.index(column) for column in one.positives)
            assert found.ranks.higher[at : at + len(ranks)].tolist() == ranks
            assert found.ranks.higher_positives[at : at + len(ranks)].tolist() == list(range(len(ranks)))
            at += len(ranks)
            top = order[:70] + [-1] * (70 - len(order))
            assert found.column_QK[row].tolist() == top
            assert found.best_Q[row] == pytest.approx(candidate[order[ranks[0]]] @ query[row], abs=1e-5)
        assert np.isneginf(found.score_QK[found.column_QK < 0]).all()


def test_a_part_of_the_queries_is_ranked_as_in_the_whole() -> None:
    query, candidate, wanted = random_search(3)
    candidate[50:] = candidate[50]  # a tie that does not fit into the first k
    whole = search(query, candidate, wanted, k=20)
    for block in ((4, 11), (512, 8192)):
        part = search(query[9:], candidate, wanted[9:], k=20, start=9, block=block)
        np.testing.assert_array_equal(part.column_QK, whole.column_QK[9:])


def test_what_is_listed_earlier_is_counted_across_blocks() -> None:
    score = np.array([[1, 3, 2, 2, 2, 5, 2]], np.float32)
    for pool in (None, np.array([6, 0, 4, 2])):
        for block in ((1, 2), (1, 3), (9, 9)):
            wanted = [Wanted(positives=(4,), pool=pool)]
            ranks = search(np.ones((1, 1)), score.T, wanted, block=block).ranks
            expected = (2, 4, 2) if pool is None else (0, 3, 1)
            assert (ranks.higher.item(), ranks.tied.item(), ranks.earlier.item()) == expected


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(positives=()), "at least one positive"),
        (Wanted(positives=(1, 1)), "named once"),
        (Wanted(positives=(9,)), "outside the 3 candidates"),
        (Wanted(positives=(1,), pool=np.array([0, 2])), "not among the 2 candidates"),
        (Wanted(positives=(1,), excluded=(1,)), "one may be excluded"),
        (Wanted(positives=(1,), excluded=(1,), pool=np.array([0, 1])), "one may be excluded"),
    ],
)
def test_impossible(wanted: Wanted, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(np.ones((1, 2)), np.ones((3, 2)), [wanted])


def test_vectors_that_are_no_numbers() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        search(np.ones((1, 2)), np.array([[1, np.nan]]), [Wanted(positives=(0,))])
