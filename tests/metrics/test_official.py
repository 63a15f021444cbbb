"""Metrics that benchmarks define, against cases worked out by hand and against the code of trec_eval."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from quarterlight.errors import InputError
from quarterlight.metrics.ranking import Ranks, Ties, chance_ranks, measure, metric_named, rank_scores
from quarterlight.metrics.trec import trec_name, trec_values

NAMES = (
    "precision@1",
    "precision@3",
    "hit@2",
    "recall@3",
    "ndcg@3",
    "ndcg_linear@3",
    "ndcg_exponential@3",
    "map@2",
    "map@5",
    "mrr@2",
    "mrr",
    "accuracy",
)


def value(name: str, score: list[float], positives: list[int], ties: Ties = "expected", **more: object) -> float:
    ranks = rank_scores(np.array([score]), [positives], **more)
    return measure(name, ranks, ties=ties).item()


def test_ties_by_hand() -> None:
    # the positive, listed second, has the score of the first and of the last of four
    score = [0.5, 0.5, 0.1, 0.5]
    assert value("hit@1", score, [1]) == pytest.approx(1 / 3)
    assert value("hit@1", score, [1], "first") == 0  # the first of the list wins, and that is another
    assert value("hit@1", score, [0], "first") == 1  # optimistic for a positive that the data lists first
    assert value("hit@1", score, [0], "strict") == value("hit@2", score, [0], "strict") == 0
    assert value("mrr", score, [1], "first") == 1 / 2
    assert value("mrr", score, [1], "strict") == 1 / 3
    assert value("mrr", score, [1]) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    # two positives in the tie: strictly they share its last two places
    assert value("recall@2", score, [0, 3], "strict") == 0.5
    assert value("recall@2", score, [0, 3], "first") == 0.5
    assert value("recall@2", score, [0, 1], "first") == 1
    assert value("hit@1", score, [3, 0], "first") == 1


def test_accuracy_is_strict() -> None:
    """SugarCrepe: right only when the caption scores higher than the negative one."""
    pairs = np.array([[0.7, 0.3], [0.3, 0.7], [0.5, 0.5]])
    ranks = rank_scores(pairs, [[0]] * 3)
    assert measure("accuracy", ranks, ties="strict").tolist() == [1, 0, 0]
    assert measure("accuracy", ranks, ties="expected").tolist() == [1, 0, 0.5]
    assert measure("accuracy", ranks, ties="first").tolist() == [1, 0, 1]


def test_average_precision_of_circo_by_hand() -> None:
    # positives at ranks 1, 3 and 6: precisions 1/1, 2/3, 3/6
    score, positives = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0, 2, 5]
    assert value("map@5", score, positives) == pytest.approx((1 + 2 / 3) / 3)  # min(5, 3) = 3
    assert value("map@2", score, positives) == pytest.approx(1 / 2)  # min(2, 3) = 2
    assert value("map@6", score, positives) == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    assert value("map@1", score, [3]) == 0


def test_graded_ndcg_by_hand() -> None:
    # grades 3, 2 at ranks 2 and 1; a third positive of grade 1 is outside the first 2
    score, positives, grades = [0.8, 0.9, 0.1, 0.5], [0, 1, 2], [[3, 2, 1]]
    ideal = 3 + 2 / math.log2(3)
    assert value("ndcg_linear@2", score, positives, grades=grades) == pytest.approx((2 + 3 / math.log2(3)) / ideal)
    assert value("ndcg@2", score, positives, grades=grades) == pytest.approx((2 + 3 / math.log2(3)) / ideal)
    exponential = (3 + 7 / math.log2(3)) / (7 + 3 / math.log2(3))
    assert value("ndcg_exponential@2", score, positives, grades=grades) == pytest.approx(exponential)
    # equal grades make no difference, whatever they are
    assert value("ndcg_linear@2", score, positives, grades=[[2, 2, 2]]) == pytest.approx(
        value("ndcg_exponential@2", score, positives)
    )


def test_expectation_is_the_mean_over_all_orders() -> None:
    generator = np.random.default_rng(0)
    for _ in range(12):
        score = generator.integers(0, 3, size=6).astype(float)
        positives = generator.choice(6, size=generator.integers(1, 5), replace=False).tolist()
        grades = generator.integers(1, 4, size=len(positives)).astype(float).tolist()
        orders = [
            order
            for order in itertools.permutations(range(6))
            if all(score[a] >= score[b] for a, b in itertools.pairwise(order))
        ]
        strict = np.stack([-np.argsort(order).astype(float) for order in orders])
        every = rank_scores(strict, [positives] * len(orders), grades=[grades] * len(orders))
        tied = rank_scores(score[None], [positives], grades=[grades])
        in_order = rank_scores(-np.argsort(np.argsort(-score, kind="stable"))[None], [positives], grades=[grades])
        for name in NAMES:
            assert measure(name, tied).item() == pytest.approx(measure(name, every).mean()), name
            first = measure(name, tied, ties="first").item()
            assert first == pytest.approx(measure(name, in_order).item()), name
            values = measure(name, every)
            if len(positives) == 1:  # the worst order; several positives also share places among themselves
                assert measure(name, tied, ties="strict").item() == pytest.approx(values.min()), name


def random_case(seed: int) -> tuple[np.ndarray, list[list[int]], list[list[float]]]:
    """Scores without ties, positives of which some queries have many, and their grades."""
    generator = np.random.default_rng(seed)
    score_QC = generator.permuted(np.tile(np.arange(40.0), (30, 1)), axis=1) / 40
    positives = [generator.choice(40, size=generator.integers(1, 13), replace=False).tolist() for _ in score_QC]
    return score_QC, positives, [generator.integers(1, 4, size=len(one)).astype(float).tolist() for one in positives]


def test_trec_eval_agrees_where_nothing_is_tied() -> None:
    score_QC, positives, grades = random_case(1)
    ranks = rank_scores(score_QC, positives, grades=grades)
    run = {f"q{q}": {f"d{c}": float(score) for c, score in enumerate(row)} for q, row in enumerate(score_QC)}
    qrels = {
        f"q{q}": {f"d{c}": int(grade) for c, grade in zip(columns, of_query, strict=True)}
        for q, (columns, of_query) in enumerate(zip(positives, grades, strict=True))
    }
    names = ("ndcg@5", "ndcg_linear@10", "recall@10", "hit@1", "hit@5", "precision@3", "mrr")
    official = trec_values([*names, "map@5", "accuracy"], run, qrels)
    assert official.keys() == set(names)
    for name in names:
        expected = [official[name][f"q{q}"] for q in range(len(score_QC))]
        for ties in ("expected", "first", "strict"):
            np.testing.assert_allclose(measure(name, ranks, ties=ties), expected, atol=1e-9, err_msg=name)


def test_average_precision_is_that_of_trec_eval_but_for_its_divisor() -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    score_QC, positives, _ = random_case(2)
    run = {f"q{q}": {f"d{c}": float(score) for c, score in enumerate(row)} for q, row in enumerate(score_QC)}
    qrels = {f"q{q}": {f"d{c}": 1 for c in columns} for q, columns in enumerate(positives)}
    values = pytrec_eval.RelevanceEvaluator(qrels, {"map_cut.5", "map"}).evaluate(run)
    counts = np.array([len(columns) for columns in positives])
    ranks = rank_scores(score_QC, positives)
    cut = np.array([values[f"q{q}"]["map_cut_5"] for q in range(len(positives))])
    np.testing.assert_allclose(measure("map@5", ranks), cut * counts / np.minimum(counts, 5), atol=1e-9)
    whole = [values[f"q{q}"]["map"] for q in range(len(positives))]
    np.testing.assert_allclose(measure("map@40", ranks), whole, atol=1e-9)


def test_chance_of_queries_with_pools_of_their_own() -> None:
    ranks = chance_ranks([1, 2], [4, 10])
    assert measure("hit@1", ranks).tolist() == pytest.approx([1 / 4, 2 / 10])
    with pytest.raises(ValueError, match="1 to 10 positives"):
        chance_ranks([5, 2], [4, 10])


def test_joined_ranks_are_those_of_the_parts() -> None:
    score_QC, positives, grades = random_case(3)
    whole = rank_scores(score_QC, positives, grades=grades)
    parts = [rank_scores(score_QC[rows], positives[rows], grades=grades[rows]) for rows in (slice(7), slice(7, None))]
    for name in NAMES:
        np.testing.assert_array_equal(measure(name, Ranks.joined(parts)), measure(name, whole))


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="Did you mean 'ndcg@k'"):
        metric_named("ndgc@5")
    for name in ("hit@0", "hit", "hit@-1", "ndcg@five"):
        with pytest.raises(InputError, match="There is no metric"):
            metric_named(name)
    with pytest.raises(InputError, match=r"no way 'frist' to break ties\. Did you mean 'first'"):
        measure("hit@1", rank_scores(np.array([[1.0]]), [[0]]), ties="frist")  # type: ignore[arg-type]
    assert trec_name("ndcg_exponential@5") is None
