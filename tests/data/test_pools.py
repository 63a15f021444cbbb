"""A global pool tells candidates of different tasks apart, and training finds those that were mined from elsewhere."""

from __future__ import annotations

import pytest

from quarterlight.data.pools import foreign_did, global_task, with_foreign
from quarterlight.data.retrieval import RetrievalTask, with_negatives
from quarterlight.errors import DatasetError
from quarterlight.records import Candidate, Item, Query


def task(dataset: str, name: str, **texts: str) -> RetrievalTask:
    candidates = [Candidate(did=did, item=Item(text=text)) for did, text in texts.items()]
    queries = [Query(qid="q", item=Item(text="?"), positives=(candidates[0].did,))]
    return RetrievalTask(dataset=dataset, task=name, split="train", queries=queries, candidates=candidates)


ONE, TWO, THREE = task("a", "t2t", d1="x", d2="y"), task("a", "t2i", d1="z"), task("b", "t2t", d1="w", d3="v")


def test_the_same_id_in_two_tasks_is_two_candidates() -> None:
    whole = global_task(ONE, [ONE, TWO, THREE])
    assert [(one.did, one.item.text) for one in whole.candidates] == [
        ("d1", "x"),
        ("d2", "y"),
        ("a/t2i/d1", "z"),
        ("b/t2t/d1", "w"),
        ("b/t2t/d3", "v"),
    ]
    assert whole.queries == ONE.queries
    with pytest.raises(DatasetError, match="also what a candidate of another task is called"):
        global_task(task("c", "t2t", **{"a/t2i/d1": "x"}), [TWO])


def test_a_negative_from_another_task_becomes_a_candidate() -> None:
    found = foreign_did(THREE, "d3")
    extended = with_foreign(ONE, [ONE, TWO, THREE], [found, "d2", found])
    assert [one.did for one in extended.candidates] == ["d1", "d2", "b/t2t/d3"]
    assert with_negatives(extended, {"q": [found, "d2"]}).queries[0].negatives == (found, "d2")
    with pytest.raises(DatasetError, match="not in the pool"):
        with_negatives(ONE, {"q": [found]})
    assert with_foreign(ONE, [TWO], ["d1"]) is ONE
    with pytest.raises(DatasetError, match="'b/t2t/d9', found for one of its queries"):
        with_foreign(ONE, [ONE, TWO, THREE], ["b/t2t/d9"])
