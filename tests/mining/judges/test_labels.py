from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError
from quarterlight.mining.judges import Pair
from quarterlight.mining.judges.labels import LabelJudge
from quarterlight.records import Candidate, Item, Query


def query(qid: str, text: str, *positives: str, negatives: tuple[str, ...] = (), **fields: Any) -> Query:
    return Query(qid=qid, item=Item(text=text), positives=positives, negatives=negatives, fields=fields)


TASK = RetrievalTask(
    dataset="sea",
    task="t2i",
    split="train",
    queries=[
        query("q1", "a boat", "d1", kind="boat"),
        query("q2", "a boat", "d2", kind="ferry"),
        query("q3", "the ferry", "d3", negatives=("d5",), kind="ferry"),
    ],
    candidates=[
        Candidate(did=did, item=Item(image=name))
        for did, name in {"d1": "1", "d2": "2", "d3": "3", "d4": "2", "d5": "5", "d6": "6"}.items()
    ],
)


def relevant(judge: LabelJudge, qid: str, task: RetrievalTask = TASK) -> dict[str, bool | None]:
    asked = next(one for one in task.queries if one.qid == qid)
    pairs = [Pair(task="sea/t2i", query=asked, candidate=one, instruction="") for one in task.candidates]
    return {one.did: one.relevant for group in judge.judge(pairs) for one in group}


def said(**yes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"d{number}": False for number in range(1, 7)} | yes


def test_what_answers_the_same_words_is_relevant_and_so_are_copies_of_it() -> None:
    judge = LabelJudge([TASK])
    assert relevant(judge, "q1") == said(d1=True, d2=True, d4=True)
    assert relevant(judge, "q3") == said(d3=True)


def test_fields_can_say_that_queries_ask_the_same() -> None:
    judge = LabelJudge([TASK], same={"sea/t2i": ["kind"]})
    assert relevant(judge, "q3") == said(d3=True, d2=True, d4=True)
    assert relevant(judge, "q2") == said(d1=True, d2=True, d4=True, d3=True)
    assert relevant(judge, "q1") == said(d1=True, d2=True, d4=True)


def test_what_nobody_labelled_is_undecided_where_labels_are_incomplete() -> None:
    judge = LabelJudge([TASK], incomplete=["sea/t2i"])
    assert relevant(judge, "q3") == {"d1": None, "d2": None, "d3": True, "d4": None, "d5": False, "d6": None}


def test_positives_hidden_from_the_pairs_are_known_from_the_whole_task() -> None:
    whole = replace(TASK, queries=[query("q1", "a boat", "d1", "d6")])
    hidden = replace(TASK, queries=[query("q1", "a boat", "d1")])
    assert relevant(LabelJudge([whole]), "q1", hidden) == said(d1=True, d6=True)
    assert relevant(LabelJudge([hidden]), "q1", hidden) == said(d1=True)


def test_a_pair_without_labels_fails() -> None:
    judge = LabelJudge([replace(TASK, candidates=TASK.candidates[:5])])
    pair = Pair(task="sea/t2i", query=TASK.queries[0], candidate=TASK.candidates[5], instruction="")
    [[found]] = judge.judge([pair])
    assert found.failed == "the labels do not have 'd6'"


def test_rules_for_what_is_not_there_are_errors() -> None:
    with pytest.raises(DatasetError, match=r"treat 'sea/i2t' specially.*Known: sea/t2i"):
        LabelJudge([TASK], incomplete=["sea/i2t"])
    with pytest.raises(DatasetError, match=r"'q1' has no field 'knd'.*Did you mean 'kind'"):
        LabelJudge([TASK], same={"sea/t2i": ["knd"]})
