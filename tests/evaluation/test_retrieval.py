from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from quarterlight.data.retrieval import RetrievalDataset, RetrievalTask, with_instructions
from quarterlight.errors import InputError
from quarterlight.evaluation import retrieval as module
from quarterlight.evaluation.retrieval import Encoder, RetrievalEvaluator, TaskResult, sample_queries
from quarterlight.images import load_image
from quarterlight.metrics.ranking import METRICS
from quarterlight.models.embedder import Embedder
from quarterlight.models.pair import load_pair
from quarterlight.models.settings import RerankerSettings
from quarterlight.records import Candidate, Item, Query

FIXTURE = Path(__file__).parents[1] / "fixtures" / "retrieval"


class Oracle:
    """Gives every candidate an axis of its own and every query the axes of its positives; counts what it is asked."""

    def __init__(self, *tasks: RetrievalTask) -> None:
        items = list(dict.fromkeys(_bare(c.item) for task in tasks for c in task.candidates))
        self.axes = dict(zip(items, np.eye(len(items), dtype=np.float32), strict=True))
        self.answers: dict[Item, np.ndarray] = {}
        for task in tasks:
            pool = {c.did: _bare(c.item) for c in task.candidates}
            for query in task.queries:
                vector = sum(self.axes[pool[did]] for did in query.positives)
                self.answers[_bare(query.item)] = self.answers.get(_bare(query.item), 0) + vector
        self.asked: list[Item] = []

    def encode_query(self, items: Sequence[Item]) -> np.ndarray:
        vectors = self._look_up(items, self.answers)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode_document(self, items: Sequence[Item]) -> np.ndarray:
        return self._look_up(items, self.axes)

    def _look_up(self, items: Sequence[Item], table: dict[Item, np.ndarray]) -> np.ndarray:
        self.asked += items
        for item in items:
            for source in item.images:
                load_image(source)
        return np.stack([table[_bare(item)] for item in items])


class Constant:
    def encode_query(self, items: Sequence[Item]) -> np.ndarray:
        return np.full((len(items), 24), 24**-0.5, dtype=np.float32)

    encode_document = encode_query


class Hashing:
    """Vectors without meaning that depend on the item alone: its words and the names of its files, not their folder."""

    def encode_query(self, items: Sequence[Item]) -> np.ndarray:
        keys = (f"{item.text} {[Path(str(source)).name for source in item.images]}" for item in items)
        seeds = [int(hashlib.md5(key.encode()).hexdigest()[:8], 16) for key in keys]
        vectors = np.stack([np.random.default_rng(seed).normal(size=16) for seed in seeds])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    encode_document = encode_query


def _bare(item: Item) -> Item:
    return replace(item, instruction=None)


@pytest.fixture
def emoji() -> RetrievalDataset:
    return RetrievalDataset(FIXTURE / "emoji")


def test_oracle_is_perfect(emoji: RetrievalDataset) -> None:
    for name in ("t2i", "i2t", "i2i", "it2i"):
        task = emoji.load(name, "test")
        result = RetrievalEvaluator(Oracle(task)).evaluate(task)
        assert result.scores.num_queries == result.num_queries == len(task.queries)
        assert result.num_scored_candidates == result.num_candidates == len(task.candidates)
        for metric in ("precision@1", "hit@5", "ndcg@5", "mrr"):
            assert result.scores.metrics[metric] == pytest.approx(1.0), (name, metric)
            assert 0 < result.scores.chance[metric] < 1
        assert result.problems == ()


def test_constant_scores_chance(emoji: RetrievalDataset) -> None:
    result = RetrievalEvaluator(Constant()).evaluate(emoji.load("t2i", "test"))
    assert result.scores.metrics == pytest.approx(result.scores.chance)
    for group in result.groups:
        assert group.scores.metrics == pytest.approx(group.scores.chance)


def test_chance_counts_positives(emoji: RetrievalDataset) -> None:
    task = emoji.load("t2i", "test")
    result = RetrievalEvaluator(Constant()).evaluate(task)
    expected = np.mean([len(query.positives) / len(task.candidates) for query in task.queries])
    assert result.scores.chance["precision@1"] == pytest.approx(expected)


def test_groups(emoji: RetrievalDataset) -> None:
    task = emoji.load("t2i", "test")
    result = RetrievalEvaluator(Hashing()).evaluate(task)
    english = [query for query in task.queries if query.fields["lang"] == "en"]
    group = next(group for group in result.groups if (group.field, group.value) == ("lang", "en"))
    alone = RetrievalEvaluator(Hashing()).evaluate(replace(task, queries=english))
    assert group.scores == alone.scores
    for field in ("lang", "text_kind"):
        parts = [group.scores for group in result.groups if group.field == field]
        assert sum(part.num_queries for part in parts) == len(task.queries)
        for metric in METRICS:
            mean = sum(part.metrics[metric] * part.num_queries for part in parts) / len(task.queries)
            assert mean == pytest.approx(result.scores.metrics[metric])


def test_a_field_with_one_value_makes_no_group() -> None:
    pool = [Candidate(did="d", item=Item(text="d"))]
    query = Query(qid="q", item=Item(text="q"), positives=("d",), fields={"lang": "en", "change": None})
    task = RetrievalTask(dataset="a", task="t2t", split="test", queries=[query], candidates=pool)
    assert RetrievalEvaluator(Constant()).evaluate(task).groups == ()


def test_tasks_share_what_is_embedded(emoji: RetrievalDataset) -> None:
    tasks = [emoji.load(name, "test") for name in ("t2i", "it2i", "i2i")]
    oracle = Oracle(*tasks)
    progress: list[tuple[int, int]] = []
    evaluator = RetrievalEvaluator(oracle, on_progress=lambda done, total: progress.append((done, total)))
    results = [evaluator.evaluate(task) for task in tasks]
    again = evaluator.evaluate(tasks[0])
    assert len(oracle.asked) == len(set(oracle.asked)) == sum(result.num_embedded for result in results)
    assert (again.num_embedded, again.scores) == (0, results[0].scores)
    assert progress[0] == (0, results[0].num_embedded)
    assert progress[-2:] == [(results[2].num_embedded,) * 2, (0, 0)]


def test_queries_carry_their_instructions(emoji: RetrievalDataset) -> None:
    task = emoji.load("t2i", "test")
    result = RetrievalEvaluator(Oracle(task)).evaluate(task)
    assert result.instructions == ("Retrieve relevant images based on a given query.",)
    bare = RetrievalEvaluator(Oracle(task), prepare=lambda task: task).evaluate(task)
    assert bare.instructions == ()


def test_to_json(emoji: RetrievalDataset) -> None:
    result = RetrievalEvaluator(Hashing()).evaluate(emoji.load("t2i", "test"))
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert plain["scores"]["metrics"].keys() == METRICS.keys()
    assert {"field": "lang", "value": "en"}.items() <= plain["groups"][0].items()


def evaluate_with_damage(
    tmp_path: Path, damaged: Callable[[RetrievalTask], Path], embedder: Encoder | None = None
) -> tuple[RetrievalTask, TaskResult]:
    """The result, by default of an oracle, on a task whose pictures are files, one of them truncated."""
    shutil.copytree(FIXTURE / "emoji", tmp_path / "emoji")
    shutil.unpack_archive(tmp_path / "emoji" / "images.zip", tmp_path / "emoji" / "images")
    (tmp_path / "emoji" / "images.zip").unlink()
    task = RetrievalDataset(tmp_path / "emoji").load("i2i", "test")
    path = damaged(task)
    path.write_bytes(path.read_bytes()[:100])
    return task, RetrievalEvaluator(embedder or Oracle(task)).evaluate(task)


def test_a_bad_query_picture_is_named_and_counted(tmp_path: Path) -> None:
    task, result = evaluate_with_damage(tmp_path, lambda task: Path(str(task.queries[0].item.image)))
    assert [problem.id for problem in result.problems] == [task.queries[0].qid]
    assert str(task.queries[0].item.image) in result.problems[0].reason
    assert (result.scores.num_queries, result.num_queries) == (len(task.queries) - 1, len(task.queries))
    assert result.num_scored_candidates == len(task.candidates)
    assert result.scores.metrics["precision@1"] == 1


def test_a_bad_candidate_takes_its_query_along(tmp_path: Path) -> None:
    def picture_of_first_positive(task: RetrievalTask) -> Path:
        return next(Path(str(c.item.image)) for c in task.candidates if c.did == task.queries[0].positives[0])

    task, result = evaluate_with_damage(tmp_path, picture_of_first_positive)
    assert [problem.id for problem in result.problems] == [task.queries[0].positives[0], task.queries[0].qid]
    assert result.num_scored_candidates == len(task.candidates) - 1
    assert result.scores.num_queries == len(task.queries) - 1
    assert result.scores.chance["precision@1"] == pytest.approx(1 / (len(task.candidates) - 1))


def test_a_real_embedder_gives_the_same_account(tmp_path: Path, tiny_embedder: Embedder) -> None:
    task, result = evaluate_with_damage(tmp_path, lambda task: Path(str(task.queries[0].item.image)), tiny_embedder)
    assert [problem.id for problem in result.problems] == [task.queries[0].qid]
    assert result.scores.num_queries == len(task.queries) - 1
    assert 0 <= result.scores.metrics["precision@1"] <= 1


def test_nothing_can_be_scored(tmp_path: Path) -> None:
    pool = [Candidate(did="d", item=Item(image=str(tmp_path / "missing.png")))]
    query = Query(qid="q", item=Item(text="q"), positives=("d",))
    task = RetrievalTask(dataset="a", task="t2i", split="test", queries=[query], candidates=pool)

    class Strict(Constant):
        def encode_document(self, items: Sequence[Item]) -> np.ndarray:
            raise InputError("item 0 is bad")

    result = RetrievalEvaluator(Strict()).evaluate(task)
    assert (result.scores.num_queries, result.scores.metrics, result.num_scored_candidates) == (0, {}, 0)
    assert [problem.id for problem in result.problems] == ["d", "q"]


def test_an_error_that_no_picture_explains_is_raised(emoji: RetrievalDataset) -> None:
    class Broken(Constant):
        def encode_query(self, items: Sequence[Item]) -> np.ndarray:
            raise InputError("text 3 is too long")

    with pytest.raises(InputError, match="too long"):
        RetrievalEvaluator(Broken()).evaluate(emoji.load("t2i", "test"))


def test_not_a_number_is_a_problem_of_the_item(emoji: RetrievalDataset) -> None:
    task = emoji.load("i2i", "test")
    oracle = Oracle(task)
    oracle.answers[_bare(task.queries[1].item)][0] = np.nan
    result = RetrievalEvaluator(oracle).evaluate(task)
    assert [problem.id for problem in result.problems] == [task.queries[1].qid]
    assert "not finite" in result.problems[0].reason


def test_sample_queries(emoji: RetrievalDataset) -> None:
    task = emoji.load("t2i", "test")
    few = sample_queries(task, 3)
    rows = [task.queries.index(query) for query in few.queries]
    assert len(rows) == 3 and rows == sorted(set(rows))
    assert few == sample_queries(task, 3)
    assert few.candidates == task.candidates
    assert sample_queries(task, 10**6) == task


class Judge:
    """Says Yes to the positives of a task, or, when it lies, to everything else; counts what it is asked."""

    def __init__(self, task: RetrievalTask, *, lies: bool = False, constant: float | None = None) -> None:
        self.settings = RerankerSettings()
        pool = {c.did: _bare(c.item) for c in task.candidates}
        self.answers = {(_bare(q.item), pool[did]) for q in task.queries for did in q.positives}
        self.lies, self.constant = lies, constant
        self.asked: list[tuple[Item, Item]] = []

    def predict(self, pairs: Sequence[tuple[Item, Item]]) -> np.ndarray:
        assert len(pairs) == len(set(pairs))
        self.asked += pairs
        if self.constant is not None:
            return np.full(len(pairs), self.constant, np.float32)
        right = [((_bare(query), _bare(candidate)) in self.answers) != self.lies for query, candidate in pairs]
        return np.where(right, 0.9, 0.1).astype(np.float32)


def test_a_perfect_reranker_brings_forward_what_was_among_the_first(emoji: RetrievalDataset) -> None:
    task = emoji.load("t2i", "test")
    for k, metric in ((5, "hit@5"), (10, "hit@10")):
        judge = Judge(task)
        result = RetrievalEvaluator(Hashing(), reranker=judge, rerank=k).evaluate(task)
        assert result.reranked is not None and result.num_reranked == k
        plain, after = result.scores.metrics, result.reranked.metrics
        assert after["precision@1"] == pytest.approx(plain[metric]) and plain["precision@1"] < plain[metric] < 1
        assert (after["hit@10"], after["recall@10"]) == pytest.approx((plain["hit@10"], plain["recall@10"]))
        assert after["mrr"] > plain["mrr"] and result.reranked.chance == result.scores.chance
        assert result.num_pairs == len(judge.asked) <= k * len(task.queries) and result.rerank_seconds > 0
        assert all(query.instruction == result.instructions[0] for query, _ in judge.asked)


def test_a_lying_reranker_cannot_push_them_further_than_k(emoji: RetrievalDataset) -> None:
    task = emoji.load("t2i", "test")
    result = RetrievalEvaluator(Oracle(task), reranker=Judge(task, lies=True), rerank=5).evaluate(task)
    assert result.scores.metrics["precision@1"] == pytest.approx(1)
    assert result.reranked is not None and result.reranked.metrics["precision@1"] < 0.2
    assert result.reranked.metrics["hit@5"] == pytest.approx(1)


def test_a_reranker_without_an_opinion_changes_nothing(emoji: RetrievalDataset) -> None:
    task = emoji.load("t2i", "test")
    for options in ({"reranker": Judge(task, constant=0.5)}, {"reranker": Judge(task), "fusion_weight": 0.0}):
        result = RetrievalEvaluator(Hashing(), rerank=5, **options).evaluate(task)
        assert result.reranked == result.scores
    # a model that knows nothing draws the first at random, wherever the positives stand in the pool
    result = RetrievalEvaluator(Constant(), reranker=Judge(task, constant=0.5), rerank=5).evaluate(task)
    assert result.reranked is not None
    assert result.reranked.metrics["precision@1"] == pytest.approx(result.scores.chance["precision@1"], abs=0.15)


def test_fusion_weighs_cosine_and_reranker(emoji: RetrievalDataset) -> None:
    task = emoji.load("t2i", "test")
    means, scores = [], {}
    for weight in (0.0, 0.5, 1.0):
        judge = Judge(task)
        result = RetrievalEvaluator(Hashing(), reranker=judge, rerank=10, fusion_weight=weight).evaluate(task)
        assert result.reranked is not None
        means.append(result.reranked.metrics["mrr"])
        scores[weight] = result.reranked
        judge.settings = RerankerSettings(fusion_weight=weight)
        from_setting = RetrievalEvaluator(Hashing(), reranker=judge, rerank=10).evaluate(task)
        assert from_setting.reranked == result.reranked
    assert means[0] < means[1] <= means[2]
    judge = Judge(task)
    assert RetrievalEvaluator(Hashing(), reranker=judge, rerank=10).by_weight(task, tuple(scores)) == scores
    assert len(judge.asked) == result.num_pairs  # once for all of them


def test_pairs_are_kept_for_one_task(emoji: RetrievalDataset) -> None:
    """Where there is no folder: those of all tasks would fill the memory."""
    task = emoji.load("t2i", "test")
    evaluator = RetrievalEvaluator(Hashing(), reranker=(judge := Judge(task)), rerank=5)
    first, second = evaluator.evaluate(task), evaluator.evaluate(task)
    assert first.reranked == second.reranked and second.num_embedded == 0
    assert first.num_pairs == second.num_pairs == len(judge.asked) / 2 > 0


def test_groups_and_json_have_both(emoji: RetrievalDataset) -> None:
    task = emoji.load("t2i", "test")
    seen: list[tuple[int, int]] = []
    evaluator = RetrievalEvaluator(
        Hashing(), reranker=Judge(task), rerank=10, on_rerank=lambda done, total: seen.append((done, total))
    )
    result = evaluator.evaluate(task)
    assert seen == [(0, len(task.queries)), (len(task.queries), len(task.queries))]
    for field in ("lang", "text_kind"):
        parts = [group.reranked for group in result.groups if group.field == field]
        assert parts and result.reranked is not None
        for metric in METRICS:
            mean = sum(part.metrics[metric] * part.num_queries for part in parts if part) / len(task.queries)
            assert mean == pytest.approx(result.reranked.metrics[metric])
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert plain["reranked"]["metrics"]["mrr"] > plain["scores"]["metrics"]["mrr"]
    assert plain["groups"][0]["reranked"]["num_queries"] == plain["groups"][0]["scores"]["num_queries"]
    without = RetrievalEvaluator(Hashing()).evaluate(task)
    assert (without.reranked, without.groups[0].reranked, without.num_reranked) == (None, None, 0)


def test_chunks_change_nothing(emoji: RetrievalDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    task = emoji.load("t2i", "test")
    whole = RetrievalEvaluator(Hashing(), reranker=Judge(task)).evaluate(task)
    monkeypatch.setattr(module, "_QUERIES", 3)
    parts = RetrievalEvaluator(Hashing(), reranker=Judge(task)).evaluate(task)
    assert (parts.reranked, parts.groups) == (whole.reranked, whole.groups)


def test_a_real_pair_reranks(emoji: RetrievalDataset, tiny_pair: Path) -> None:
    embedder, reranker = load_pair(tiny_pair, dtype=torch.float32, device="cpu")
    task = sample_queries(emoji.load("it2i", "test"), 3)
    result = RetrievalEvaluator(embedder, reranker=reranker, rerank=4).evaluate(task)
    assert result.reranked is not None and result.num_pairs == 12
    # by hand: the first four in the order of the reranker, then the rest
    task = with_instructions(task)
    query, pool = task.queries[0], [c.item for c in task.candidates]
    order = np.argsort(-(embedder.encode_document(pool) @ embedder.encode_query([query.item])[0]), kind="stable")
    ranking = reranker.rank(query.item, [pool[n] for n in order[:4]])
    order = [*(order[one["corpus_id"]] for one in ranking), *order[4:]]
    ranks = [order.index(n) for n, c in enumerate(task.candidates) if c.did in query.positives]
    alone = RetrievalEvaluator(embedder, reranker=reranker, rerank=4).evaluate(replace(task, queries=[query]))
    assert alone.reranked is not None
    assert alone.reranked.metrics["mrr"] == pytest.approx(1 / (1 + min(ranks)))


def test_nothing_to_rerank(tmp_path: Path) -> None:
    pool = [Candidate(did="d", item=Item(image=str(tmp_path / "missing.png")))]
    task = RetrievalTask(
        dataset="a",
        task="t2i",
        split="test",
        queries=[Query(qid="q", item=Item(text="q"), positives=("d",))],
        candidates=pool,
    )

    class Strict(Constant):
        def encode_document(self, items: Sequence[Item]) -> np.ndarray:
            raise InputError("item 0 is bad")

    result = RetrievalEvaluator(Strict(), reranker=Judge(task)).evaluate(task)
    assert result.reranked is not None and result.reranked.metrics == {}
    with pytest.raises(InputError, match="rerank must be at least 1, got 0"):
        RetrievalEvaluator(Constant(), reranker=Judge(task), rerank=0)
    with pytest.raises(InputError, match="fusion_weight must be from 0 to 1"):
        RetrievalEvaluator(Constant(), reranker=Judge(task), fusion_weight=1.5)
