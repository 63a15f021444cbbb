"""Rows of a reranker: what may stand in them, where the positive stands, and that they are the same every time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.data.test_contrastive import ask, one_task, random_task

from quarterlight.data.contrastive import TaskMixture
from quarterlight.data.rerank import RerankRow, RerankSampler
from quarterlight.errors import DatasetError, InputError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def sampler(*queries: Any, texts: str = LETTERS, **options: Any) -> RerankSampler:
    mixture = TaskMixture(tasks=[one_task(list(queries), texts)])
    return RerankSampler(mixture, **({"batch_size": 8} | options))


def drawn(one: RerankSampler, steps: int) -> list[RerankRow]:
    return [row for step in range(steps) for row in one.rows(step)]


def shown(row: RerankRow) -> tuple[Any, ...]:
    return row.query.qid, row.positive.did, row.negative.did, [one.did for one in row.listed], row.slot


def test_rows_hold_what_they_may() -> None:
    task = random_task("a", 200, 150, texts=60)
    queries = [replace(one, negatives=(*one.negatives, f"a:{n % 150}")) for n, one in enumerate(task.queries)]
    mixture = TaskMixture(tasks=[replace(task, queries=queries)])
    text = {one.did: one.item.text for one in task.candidates}
    sizes = Counter()
    for row in drawn(RerankSampler(mixture, batch_size=25, min_negatives=2, max_negatives=3), 40):
        answers = {text[did] for did in row.query.positives}
        assert row.positive.did in row.query.positives
        assert row.negative.did in row.query.negatives and row.negative.item.text not in answers
        if row.slot is None:
            assert not row.listed
            continue
        assert row.listed[row.slot] is row.positive
        others = [one.item.text for n, one in enumerate(row.listed) if n != row.slot]
        assert len({*others}) == len(others) and not answers & {*others}
        assert {one.did for n, one in enumerate(row.listed) if n != row.slot} <= {*row.query.negatives}
        sizes[len(others)] += 1
    assert sizes.keys() == {2, 3}


def test_positives_are_augmented_with_what_was_judged() -> None:
    one = sampler(ask("q", "a", "cdef", also_relevant=("b",)))
    assert Counter(row.positive.did for row in drawn(one, 50)).keys() == {"a", "b"}
    assert not any({"a", "b"} & {row.negative.did} for row in drawn(one, 50))


def test_an_answer_to_the_same_question_is_no_negative() -> None:
    one = sampler(ask("q1", "a", "bcd", text="same"), ask("q2", "b", "acd", text="same"))
    negatives = {did for row in drawn(one, 20) for did in [row.negative.did, *(c.did for c in row.listed)]}
    assert negatives <= {"a", "b", "c", "d"}
    assert {row.negative.did for row in drawn(one, 20)} == {"c", "d"}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sizes_and_slots_are_uniform(seed: int) -> None:
    one = sampler(ask("q", "a", "bcdefghij"), batch_size=4000, seed=seed)
    rows = one.rows(3)
    sizes = np.bincount([len(row.listed) - 1 for row in rows])[2:]
    assert len(sizes) == 4 and chi_square(sizes) < 16.3  # 3 degrees of freedom, 1 in 1,000
    for size in (3, 6):
        slots = np.bincount([row.slot for row in rows if len(row.listed) == size], minlength=size)
        assert len(slots) == size and chi_square(slots) < 20.5  # 5 degrees at most
    listed = Counter(one.did for row in rows for one in row.listed if one.did != "a")
    assert len(listed) == 9 and chi_square(np.array([*listed.values()])) < 26.1
    assert chi_square(np.array([*Counter(row.negative.did for row in rows).values()])) < 26.1


def chi_square(counts: Any) -> float:
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


def test_rows_depend_on_seed_and_step_alone() -> None:
    mixture = TaskMixture(tasks=[random_task("a", 50, 40), random_task("b", 9, 20)], weights=[1.0, 2.0])
    first, second = (RerankSampler(mixture, batch_size=7, seed=3) for _ in range(2))
    expected = [[shown(row) for row in first.rows(step)] for step in range(30)]
    for step in reversed(range(30)):
        assert [shown(row) for row in second.rows(step)] == expected[step]
    other = RerankSampler(mixture, batch_size=7, seed=4)
    assert [[shown(row) for row in other.rows(step)] for step in range(30)] != expected
    # the rows of a batch of another size are the same rows
    large = RerankSampler(mixture, batch_size=14, seed=3)
    assert [shown(row) for row in large.rows(2)] == expected[4] + expected[5]


def test_tasks_have_their_share_and_queries_come_once_in_a_pass() -> None:
    mixture = TaskMixture(tasks=[random_task("a", 60, 40), random_task("b", 30, 20)], weights=[2.0, 1.0])
    rows = drawn(RerankSampler(mixture, batch_size=9), 10)
    assert set(Counter(row.query.qid for row in rows).values()) == {1} and len(rows) == 90
    assert Counter(row.query.qid[0] for row in rows)["a"] == pytest.approx(60, abs=1)


def test_few_negatives_make_pairs_alone_and_none_make_nothing() -> None:
    queries = [ask("many", "a", "bcdef"), ask("one", "b", "c"), ask("none", "c"), ask("copy", "d", "d")]
    one = sampler(*queries)
    rows = drawn(one, 10)
    assert {row.query.qid for row in rows} == {"many", "one"}
    assert all(bool(row.listed) == (row.query.qid == "many") for row in rows)
    counts = one.counts
    assert (counts.queries, counts.trained, counts.pointwise_only, counts.skipped) == (4, 2, 1, 2)
    lists = sampler(*queries, only_lists=True)
    assert {row.query.qid for row in drawn(lists, 5)} == {"many"} and lists.counts.skipped == 3
    three = sampler(ask("q", "a", "bcd"), min_negatives=2, max_negatives=5)
    assert {len(row.listed) for row in drawn(three, 10)} == {3, 4}  # as many as there are


def test_what_is_held_out_is_not_trained_on() -> None:
    tasks = [random_task("a", 100, 40), random_task("b", 100, 40)]
    twin = replace(tasks[0], dataset="twin")  # the same queries named a second time, as recipes do
    mixture = TaskMixture(tasks=[*tasks, twin], weights=[1.0, 3.0, 1.0])
    one = RerankSampler(mixture, batch_size=30, held_out=25)
    held = one.held_out
    assert len(held) == 25
    asked = {row.query.item.text for row in held}
    assert not asked & {row.query.item.text for row in drawn(one, 60)}
    assert one.counts.held_out >= 25 and one.counts.trained + one.counts.held_out == 300
    assert Counter(row.query.qid[0] for row in held)["b"] > 10
    assert [shown(row) for row in held] == [shown(row) for row in one.held_out]
    assert len(RerankSampler(mixture, batch_size=2, held_out=500).held_out) == 30  # a tenth at most
    assert not sampler(ask("q", "a", "bc"), held_out=5).held_out


def test_what_cannot_be_sampled_is_said() -> None:
    with pytest.raises(DatasetError, match=r"No query of a/t2t\.train has hard negatives enough: mine or judge"):
        sampler(ask("q", "a"))
    with pytest.raises(DatasetError, match="hard negatives enough"):
        sampler(ask("q", "a", "b"), only_lists=True)
    for wrong in ({"batch_size": 0}, {"seed": -1}, {"held_out": -1}, {"min_negatives": 0}, {"min_negatives": 6}):
        with pytest.raises(InputError, match="1 <= min_negatives <= max_negatives"):
            sampler(ask("q", "a", "b"), **wrong)
