"""Suites from files to report: with a model whose vectors can be worked out by hand, and with a tiny real one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.data.layouts import opened_tasks, write_suite

from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError, InputError
from quarterlight.evaluation.benchmark import (
    BY_PICTURE,
    READINGS,
    averages,
    check,
    file_name,
    fingerprint,
    num_asked,
    one_per_picture,
    read_record,
    run_suite,
    tasks_of,
    wanted,
    write_task,
)
from quarterlight.evaluation.retrieval import RetrievalEvaluator
from quarterlight.evaluation.suites import SUITES, Average, Suite, SuiteTask, load_suite, open_task
from quarterlight.models.settings import RerankerSettings
from quarterlight.records import Candidate, Item, Problem, Query

Vectors = dict[str, tuple[float, ...]]


class Table:
    """Gives every text the vector that it is told, with norm 1."""

    model_hash = "table"

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self.asked: list[str] = []

    def encode_query(self, items: Sequence[Item], /) -> np.ndarray:
        self.asked += [str(item.text) for item in items]
        rows = np.array([self.vectors[str(item.text)] for item in items], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    encode_document = encode_query


def declared(name: str, metric: str = "precision@1", **more: Any) -> SuiteTask:
    fields: dict[str, Any] = {
        "loader": "none",
        "ties": "expected",
        "group": "all",
        "in_distribution": "",
        "entry": None,
        "direction": "t2t",
        "split": "test",
        **more,
    }
    return SuiteTask(name=name, metric=metric, **fields)


def suite_of(*tasks: SuiteTask, name: str = "made-up") -> Suite:
    names = tuple(task.name for task in tasks)
    return Suite(
        name=name,
        title="A suite",
        tasks=tasks,
        averages=(Average(name="Some", of=names[:2]), Average(name="Overall", of=("Some", *names[2:]))),
        reference_table=None,
    )


def task_of(queries: Sequence[Query], dids: Sequence[str], **more: Any) -> RetrievalTask:
    pool = [Candidate(did=did, item=Item(text=did)) for did in dids]
    return RetrievalTask(dataset="made-up", task="t2t", split="test", queries=list(queries), candidates=pool, **more)


def query(qid: str, *positives: str, **more: Any) -> Query:
    return Query(qid=qid, item=Item(text=qid), positives=positives, **more)


VECTORS: Vectors = {"north": (0, 1), "east": (1, 0), "both": (1, 1), "n2": (0, 2), "nne": (1, 2), "ene": (2, 1)}


def bare(embedder: Table, **options: Any) -> RetrievalEvaluator:
    return RetrievalEvaluator(embedder, prepare=lambda task: task, **options)


def test_own_candidates_exclusions_and_grades_by_hand() -> None:
    tasks = [
        # over all: both, north, n2 tie or are near; its own list has neither north nor n2
        query("nne", "both", candidates=("east", "both")),
        query("nne2", "north", excluded=("both",)),
        query("ene", "east", "both", grades={"east": 1, "both": 3}),
    ]
    embedder = Table({**VECTORS, "nne2": VECTORS["nne"]})
    task = task_of(tasks, ["north", "east", "both", "n2"])
    result = bare(embedder, depth=4).evaluate(task, metric="ndcg_linear@5", ties="first", also=("map@5",))
    ranking = result.ranking
    assert ranking is not None and result.official is not None
    # nne2 without "both": north and n2 are the same vector; the positive is listed first
    assert ranking.rank_Q.tolist() == [1, 1, 1]
    assert ranking.tied_Q.tolist() == [1, 2, 1]
    assert ranking.num_candidates_Q.tolist() == [2, 3, 4]
    assert ranking.dids[0] == ["both", "east"]
    assert set(ranking.dids[1]) == {"north", "n2", "east"} and ranking.dids[1][2] == "east"
    # ene: both (3) and east (1) have cosines 3/sqrt(10) and 2/sqrt(5), so this order is the ideal one
    assert ranking.metrics["ndcg_linear@5"].tolist() == [1, 1, 1]
    assert result.official.expected == pytest.approx((1 + (1 + 1 / np.log2(3)) / 2 + 1) / 3)
    assert result.official.num_tied == 1
    assert result.scores.metrics["map@5"] == pytest.approx((1 + 3 / 4 + 1) / 3)
    assert result.scores.chance["precision@1"] == pytest.approx((1 / 2 + 1 / 3 + 2 / 4) / 3)


def test_optimistic_and_strict_ties() -> None:
    task = task_of([query("north", "n2"), query("n2", "north", candidates=("north", "n2"))], ["north", "east", "n2"])
    for ties, expected in (("first", 0.5), ("strict", 0.0), ("expected", 0.5)):
        official = bare(Table(VECTORS)).evaluate(task, metric="precision@1", ties=ties).official
        assert official is not None and (official.value, official.num_tied) == (expected, 2), ties
        assert official.expected == 0.5
    official = bare(Table(VECTORS)).evaluate(task, metric="hit@1").official
    assert official is not None and official.trec_eval in (0.0, 0.5, 1.0)


def test_positives_that_cannot_be_found() -> None:
    task = task_of(
        [
            query("north", "n2", candidates=("north", "east")),
            query("east", "east", excluded=("east",)),
            query("both", "both"),
        ],
        ["north", "east", "n2", "both"],
    )
    result = bare(Table(VECTORS)).evaluate(task, metric="precision@1")
    assert [problem.id for problem in result.problems] == ["north", "east"]
    assert "among its own candidates" in result.problems[0].reason
    assert (result.scores.num_queries, result.num_queries) == (1, 3)


def test_ids_that_occur_twice_are_named() -> None:
    with pytest.raises(InputError, match=r"made-up/t2t\.test: the candidate id 'n2' occurs a second time"):
        bare(Table(VECTORS)).evaluate(task_of([query("north", "n2")], ["n2", "east", "n2"]))
    with pytest.raises(InputError, match="the query id 'north' occurs a second time"):
        bare(Table(VECTORS)).evaluate(task_of([query("north", "n2")] * 2, ["n2"]))


class Backwards:
    """A reranker that likes what comes late in the alphabet, and has no opinion of one query."""

    settings = RerankerSettings()

    def predict(self, pairs: Sequence[tuple[Item, Item]], /) -> np.ndarray:
        scores = [ord(str(candidate.text)[0]) / 200 for _, candidate in pairs]
        lost = [one.text == "ene" for one, _ in pairs]
        return np.where(lost, np.nan, scores).astype(np.float32)


def test_reranking_within_own_candidates_and_scores_that_are_no_numbers() -> None:
    task = task_of(
        [query("nne", "east", candidates=("east", "both")), query("ene", "east"), query("both", "north")],
        ["north", "east", "both"],
    )
    result = bare(Table(VECTORS), reranker=Backwards(), rerank=3, depth=3).evaluate(task, metric="precision@1")
    after = result.ranking_reranked
    assert after is not None and result.official_reranked is not None
    assert after.dids[0] == ["east", "both"]  # of three places it has two
    assert after.dids[1][0] == "both"  # the order of the search
    assert after.dids[2] == ["north", "east", "both"]
    assert [problem.id for problem in result.problems] == ["ene"] and "not a number" in result.problems[0].reason
    assert result.num_pairs == 2 + 3 + 3
    assert result.official_reranked.value == pytest.approx(2 / 3)


def test_a_run_counts_what_it_scored(tmp_path: Path) -> None:
    suite = suite_of(declared("a/1 x"), declared("b"), declared("c"))
    tasks = {
        "a/1 x": task_of([query("north", "n2"), query("east", "east", excluded=("east",))], ["n2", "east"]),
        "b": task_of(
            [query("east", "east")],
            ["n2", "east"],
            problems=(Problem("row 7", "it has no positive"),),
            num_lost_queries=5,
        ),
    }
    evaluator = bare(Table(VECTORS), depth=2)
    seen: list[str] = []
    record = run_suite(
        evaluator,
        suite,
        list(suite.tasks),
        lambda task: tasks[task.name],
        not_run={"c": "it is not there"},
        folder=tmp_path,
        on_task=lambda task: seen.append(task.name),
    )
    assert seen == ["a/1 x", "b"]
    first, second = record.tasks
    assert (first["num_scored"], first["num_queries"], first["num_problems"]) == (1, 2, 1)
    assert (second["num_scored"], second["num_queries"], second["num_left_out"]) == (1, 1, 1)
    assert (second["num_lost_queries"], num_asked(first), num_asked(second)) == (5, 2, 6)
    assert second["problems"] == [{"id": "row 7", "reason": "it has no positive"}]
    assert record.not_run == [{"name": "c", "reason": "it is not there"}]
    assert [(one["name"], one["score"], one["num_missing"]) for one in record.averages] == [
        ("Some", 1.0, 0),
        ("Overall", None, 1),
    ]
    table = pq.read_table(tmp_path / "queries" / "a.1_x.parquet").to_pydict()
    assert table["qid"] == ["north", "east"] and table["scored"] == [True, False]
    assert table["rank"] == [1, None] and table["precision@1"] == [1.0, None]
    assert (tmp_path / "runs" / "b.trec").read_text() == (
        "east Q0 east 1 1.000000 quarterlight\neast Q0 n2 2 0.000000 quarterlight\n"
    )
    assert (tmp_path / "qrels" / "a.1_x.trec").read_text() == "north 0 n2 1\neast 0 east 1\n"


def test_a_task_without_any_score_has_no_average() -> None:
    suite = suite_of(declared("a"), declared("b"))
    lost = task_of([query("east", "east", excluded=("east",))], ["east"])
    good = task_of([query("east", "east")], ["n2", "east"])
    record = run_suite(bare(Table(VECTORS)), suite, suite.tasks, lambda task: lost if task.name == "a" else good)
    assert record.tasks[0]["score"] is None and record.averages[0]["score"] is None
    assert record.averages[0]["num_missing"] == 1


def test_the_reading_of_mmeb_v2_takes_candidates_with_one_picture_for_one() -> None:
    queries = [query("q", "d2", candidates=("d1", "d2", "d3"), grades={"d2": 2})]
    pool = [
        Candidate(did="d1", item=Item(text="one", image="a.png")),
        Candidate(did="d2", item=Item(text="two", image="a.png")),
        Candidate(did="d3", item=Item(text="one", image="b.png")),
        Candidate(did="d4", item=Item(text="one")),
    ]
    task = RetrievalTask(dataset="EDIS", task="t2it", split="test", queries=queries, candidates=pool)
    merged = one_per_picture(task)
    assert merged is not None
    assert [one.did for one in merged.candidates] == ["d1", "d3", "d4"]
    (one,) = merged.queries
    assert (one.positives, one.candidates, one.grades) == (("d1",), ("d1", "d3"), {"d1": 2})
    assert one_per_picture(replace(task, candidates=pool[1:])) is None

    class Pictures(Table):
        def encode_query(self, items: Sequence[Item], /) -> np.ndarray:
            vectors = {"q": (1, 0), "one": (1, 0.1), "two": (0, 1)}
            rows = np.array([vectors[str(item.text)] for item in items], np.float32)
            return rows / np.linalg.norm(rows, axis=1, keepdims=True)

        encode_document = encode_query

    class Counting:
        """Likes the candidates of this text; knows how often it was asked for a pair."""

        settings, model_hash = RerankerSettings(), "counting"
        asked: list[tuple[Item, Item]]

        def predict(self, pairs: Sequence[tuple[Item, Item]], /) -> np.ndarray:
            self.asked += pairs
            return np.array([candidate.text == "two" for _, candidate in pairs], np.float32)

    reranker = Counting()
    reranker.asked = []
    read = declared("EDIS", direction="t2it", ties="first", readings=(BY_PICTURE,))
    suite = suite_of(read, declared("VisDial", direction="t2it", ties="first"))
    evaluator = bare(Pictures({}), reranker=reranker, rerank=3)
    record = run_suite(evaluator, suite, suite.tasks, lambda _: task)
    assert record.tasks[0]["score"] == 0.0 and record.tasks[0]["reranked"] == 1.0
    # d1 stands for d2, and is first before the reranker and, with d3, after it
    assert record.tasks[0]["readings"] == {BY_PICTURE: {"score": 1.0, "reranked": 1.0}}
    assert record.tasks[1]["readings"] == {}
    of_edis = reranker.asked[: record.cost[0]["num_pairs"]]
    assert len(of_edis) == len(set(of_edis)) == 3


def test_only_the_parser_of_webqa_and_edis_takes_pictures_for_names() -> None:
    declared_by = {(suite, task.name): task.readings for suite in SUITES for task in load_suite(suite).tasks}
    assert {name for name, readings in declared_by.items() if readings} == {
        ("mmeb-v2-image", "WebQA"),
        ("mmeb-v2-image", "EDIS"),
    }
    assert {one for readings in declared_by.values() for one in readings} <= READINGS.keys()


def test_ids_with_blanks_stay_different_in_trec_files(tmp_path: Path) -> None:
    """VisRAG has ids of both kinds."""
    vectors: Vectors = {"q": (1, 0), "a b": (1, 0), "a_b": (0, 1)}
    task = task_of([query("q", "a b")], ["a b", "a_b"])
    write_task(tmp_path, "t", task, bare(Table(vectors), depth=2).evaluate(task, metric="precision@1"))
    assert (tmp_path / "qrels/t.trec").read_text() == "q 0 a%20b 1\n"
    run = [line.split() for line in (tmp_path / "runs/t.trec").read_text().splitlines()]
    assert [line[2] for line in run] == ["a%20b", "a_b"] and {len(line) for line in run} == {6}


def test_names_and_groups() -> None:
    suite = load_suite("mini")
    assert [task.name for task in wanted(suite, ["t2vd", "emoji/t2i"])] == [
        "emoji/t2i",
        "jose_pages/t2vd",
        "wtq_tables/t2vd",
    ]
    with pytest.raises(InputError, match=r"no task or group 'emoji/t2x'. Did you mean 'emoji/t2"):
        wanted(suite, ["emoji/t2x"])
    assert tasks_of(suite, "t2vd") == {"jose_pages/t2vd", "wtq_tables/t2vd"}
    assert len(tasks_of(load_suite("zeroshot"), "SugarCrepe")) == 7
    assert file_name("Visual Genome/a|b") == "Visual_Genome.a_b"


def test_missing_data_stops_the_run_before_it_costs_anything() -> None:
    tasks = [declared("a"), declared("b"), declared("c")]

    def open_one(task: SuiteTask) -> RetrievalTask:
        if task.name != "a":
            raise DatasetError(f"{task.name}: line 3 is damaged.")
        return task_of([query("north", "n2")], ["n2"])

    with pytest.raises(DatasetError, match=r"2 of 3 tasks cannot be read\. b: line 3 is damaged.*and so 1 more: c\.$"):
        check(tasks, open_one)
    reasons, opened = check(tasks, open_one, skip_missing=True)
    assert reasons == {"b": "b: line 3 is damaged.", "c": "c: line 3 is damaged."} and [*opened] == ["a"]
    assert check(tasks[:1], open_one, keep=2) == ({}, opened) and check(tasks[:1], open_one, keep=1) == ({}, {})
    with pytest.raises(DatasetError, match="2 of 2 tasks"):
        check(tasks[1:], open_one, skip_missing=True)


def test_rows_have_a_fingerprint() -> None:
    task = task_of([query("north", "n2")], ["n2", "east"])
    assert fingerprint(task) == fingerprint(replace(task, revision="other", dataset="other"))
    for other in (
        replace(task, queries=[query("north", "east")]),
        replace(task, queries=[query("north", "n2", candidates=("n2",))]),
        replace(task, candidates=task.candidates[::-1]),
    ):
        assert fingerprint(other) != fingerprint(task)


def test_not_a_record(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[]")
    for file in (tmp_path, tmp_path / "results.json", tmp_path / "gone.json"):
        with pytest.raises(InputError, match=r"is not the results\.json"):
            read_record(file)


class Lengths:
    """A model without a network: the letters of a text, and how bright the parts of a picture are."""

    name, model_hash, dimension = "lengths", "1e46", 42

    def __init__(self) -> None:
        from quarterlight.models.settings import EmbedderSettings

        self.settings = EmbedderSettings()

    def encode_query(self, items: Sequence[Item], /) -> np.ndarray:
        from quarterlight.images import load_image

        rows = np.full((len(items), 42), 1e-3, np.float32)
        for row, item in zip(rows, items, strict=True):
            for letter in (item.text or "").lower():
                if "a" <= letter <= "z":
                    row[ord(letter) - ord("a")] += 1
            for one in item.images:
                small = load_image(one).convert("L").resize((4, 4))
                row[26:] += np.asarray(small, np.float32).reshape(-1) / 32
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    encode_document = encode_query


def naive(task: RetrievalTask, metric: str, ties: str) -> list[float]:
    """A benchmark's metric as its own evaluator would be written, one query and one candidate at a time."""
    model = Lengths()
    vector = {one.did: model.encode_document([one.item])[0] for one in task.candidates}
    values = []
    for one in task.queries:
        pool = [did for did in one.candidates or vector if did not in one.excluded]
        asked = model.encode_query([one.item])[0]
        score = {did: round(float(vector[did].astype(float) @ asked), 6) for did in pool}
        right = set(one.positives)
        orders = []
        if ties == "strict":
            orders = [sorted(pool, key=lambda did: (-score[did], did in right))]
        elif ties == "first":
            orders = [sorted(pool, key=lambda did: -score[did])]
        else:  # every order of what is tied, or many
            generator = np.random.default_rng(0)
            every = len(pool) <= 5
            shuffled = permutations(pool) if every else (generator.permutation(pool).tolist() for _ in range(300))
            if len(set(score.values())) == len(pool):
                shuffled = iter([pool])
            orders = [sorted(some, key=lambda did: -score[did]) for some in shuffled]
        values.append(float(np.mean([_value(metric, order, one) for order in orders])))
    return values


def _value(metric: str, order: list[str], one: Query) -> float:
    name, _, number = metric.partition("@")
    k = int(number or 1)
    hits = [did in one.positives for did in order[:k]]
    if name in ("precision", "hit", "accuracy"):
        return float(any(hits))
    if name == "map":
        return sum(sum(hits[: n + 1]) / (n + 1) for n, hit in enumerate(hits) if hit) / min(k, len(one.positives))
    assert name == "ndcg_linear"
    gains = [one.grades.get(did, 1) if did in one.positives else 0 for did in order[:k]]
    ideal = sorted((one.grades.get(did, 1) for did in one.positives), reverse=True)[:k]
    return sum(g / np.log2(n + 2) for n, g in enumerate(gains)) / sum(g / np.log2(n + 2) for n, g in enumerate(ideal))


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_scores_its_files_as_its_own_evaluator_would(name: str, tmp_path: Path) -> None:
    suite = load_suite(name)
    data = write_suite(name, tmp_path / "data")
    tasks = opened_tasks(name)

    def opened(task: SuiteTask) -> RetrievalTask:
        return open_task(task, data, pictures=tmp_path)

    record = run_suite(RetrievalEvaluator(Lengths()), suite, tasks, opened)
    assert [one["name"] for one in record.tasks] == [task.name for task in tasks]
    for declaration, one in zip(tasks, record.tasks, strict=True):
        assert one["num_scored"] == one["num_queries"] > 0
        expected = np.mean(naive(opened(declaration), declaration.metric, declaration.ties))
        sampled = declaration.ties == "expected" and one["num_tied"] and one["num_candidates"] > 5
        assert one["score"] == pytest.approx(expected, abs=0.06 if sampled else 1e-9), declaration.name
    if len(tasks) == len(suite.tasks):
        assert all(one["score"] is not None for one in record.averages)
    json.dumps(record.to_json(), allow_nan=False)


def test_the_files_of_a_task(tmp_path: Path) -> None:
    task = task_of([query("north", "n2")], ["n2", "east"])
    result = bare(Table(VECTORS), depth=1).evaluate(task, metric="precision@1")
    write_task(tmp_path, "a", task, result)
    write_task(tmp_path, "a", task, result)  # in place of the first
    files = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {"queries/a.parquet", "runs/a.trec", "qrels/a.trec"}


def test_averages_of_reranked_scores_need_all_tasks() -> None:
    suite = suite_of(declared("a"), declared("b"))
    rows = averages(
        suite, [{"name": "a", "score": 0.5, "reranked": 0.75}, {"name": "b", "score": 1.0, "reranked": None}]
    )
    assert rows[0] == {"name": "Some", "score": 0.75, "reranked": None, "num_tasks": 2, "num_missing": 0}
