"""Our models on mteb's tasks, ours and its own: nothing is downloaded, tasks of mteb are given rows of ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import mteb
import numpy as np
import pytest
import torch
from mteb.types import PromptType
from PIL import Image

from quarterlight.data.retrieval import RetrievalTask, with_instructions
from quarterlight.errors import DatasetError, InputError
from quarterlight.evaluation.mteb import MtebEmbedder, MtebReranker, OfflineTask, offline_tasks
from quarterlight.evaluation.retrieval import RetrievalEvaluator
from quarterlight.images import image_bytes
from quarterlight.models.embedder import Embedder
from quarterlight.models.reranker import Reranker
from quarterlight.prompts import QUERY_INSTRUCTIONS
from quarterlight.records import Candidate, Item, Query

FIXTURE = Path(__file__).parents[1] / "fixtures" / "retrieval"
QUIET = {"show_progress_bar": False, "batch_size": 4}
SHARED = ("precision@1", "hit@5", "hit@10", "recall@10", "ndcg@5")


@pytest.fixture
def embedder(tiny_embedder: Embedder) -> MtebEmbedder:
    return MtebEmbedder(tiny_embedder)


@pytest.fixture
def reranker(tiny_pair: Path) -> MtebReranker:
    return MtebReranker(Reranker(tiny_pair, dtype=torch.float32, device="cpu"))


@pytest.fixture
def pages(picture: Callable[..., Image.Image]) -> RetrievalTask:
    """Words to pages of 2 x 2 tiles, two of which answer the first query."""
    pool = [
        Candidate(did=f"d{number}", item=Item(image=image_bytes(picture(number, 128, 128)), max_tiles=4))
        for number in range(12)
    ]
    words = ("find the page", "given query", "relevant visual documents", "answers", "Represent", "the text", "images")
    queries = [Query(qid=f"q{n}", item=Item(text=one), positives=(f"d{n}",)) for n, one in enumerate(words)]
    queries[0] = replace(queries[0], positives=("d0", "d11"), fields={})
    return RetrievalTask(dataset="pages", task="t2vd", split="test", queries=queries, candidates=pool)


def scores_of(model: Any, task: Any, **more: Any) -> dict[str, float]:
    result = mteb.evaluate(
        model, task, cache=None, co2_tracker=False, encode_kwargs=QUIET, show_progress_bar=False, **more
    )
    ((scores,),) = result.task_results[0].scores.values()
    return scores


def tasks_of_ours(pages: RetrievalTask) -> Iterator[RetrievalTask]:
    yield pages
    for task in offline_tasks(FIXTURE):
        yield task.task


def test_mteb_and_we_agree(embedder: MtebEmbedder, pages: RetrievalTask) -> None:
    evaluator = RetrievalEvaluator(embedder.embedder)
    directions = []
    for task in tasks_of_ours(pages):
        theirs, ours = scores_of(embedder, OfflineTask(task)), evaluator.evaluate(task).scores.metrics
        for metric in SHARED:
            assert theirs[metric] == pytest.approx(ours[metric], abs=1e-6), (task.label, metric)
        assert theirs["mrr_at_1000"] == pytest.approx(ours["mrr"], abs=1e-6)
        assert theirs["ndcg_at_5"] == pytest.approx(ours["ndcg@5"], abs=1e-5)  # which mteb rounds
        assert theirs["num_scored_queries"] == theirs["num_queries"] == len(task.queries)
        assert not all(ours[metric] in (0.0, 1.0) for metric in SHARED), "this task would agree by chance"
        directions.append(task.task)
    assert {"t2vd", "t2i", "i2t", "i2i", "it2i", "it2t"} <= {*directions}


def test_reranker_agrees(embedder: MtebEmbedder, reranker: MtebReranker, pages: RetrievalTask, tmp_path: Path) -> None:
    emoji = next(task.task for task in offline_tasks(FIXTURE / "emoji", tasks=["it2i"]))
    for task in (pages, emoji):
        first = OfflineTask(task)
        scores_of(embedder, first, prediction_folder=tmp_path)
        again = OfflineTask(task).convert_to_reranking(tmp_path, top_k=3)
        theirs = scores_of(reranker, again)
        evaluator = RetrievalEvaluator(embedder.embedder, reranker=reranker.reranker, rerank=3, fusion_weight=1.0)
        ours = evaluator.evaluate(task).reranked
        assert ours is not None
        assert theirs["precision@1"] == pytest.approx(ours.metrics["precision@1"], abs=1e-6)
        assert theirs["ndcg_at_3"] > 0


REAL = {
    "VidoreArxivQARetrieval": ("t2i", 4, "Find a screenshot that relevant to the user's question."),
    "Vidore2ESGReportsRetrieval": ("t2i", 4, "Find a screenshot that relevant to the user's question."),
    "Vidore3HrRetrieval": ("t2i", 4, "Find a screenshot that is relevant to the user's question."),
    "MMLongBenchDocRetrieval": ("t2i", 4, None),
    "VisRAGRetChartQA": ("t2i", 4, QUERY_INSTRUCTIONS["t2vd"]),
    "CUB200I2IRetrieval": ("i2i", 1, QUERY_INSTRUCTIONS["i2i"]),
    "BLINKIT2TRetrieval": ("it2t", 1, QUERY_INSTRUCTIONS["it2t"]),
    "MSCOCOI2TRetrieval": ("i2t", 1, "Find an image caption describing the following everyday image."),
    "CIRRIT2IRetrieval": (
        "it2i",
        1,
        "Retrieve a day-to-day image that aligns with the modification instructions of the provided image.",
    ),
    "WebQAT2ITRetrieval": ("t2it", 1, "Find a Wikipedia image that answers this question."),
    "InfoSeekIT2ITRetrieval": (
        "it2it",
        1,
        "Find an image and subject description from Wikipedia that answers my question about this image.",
    ),
}
"""Tasks of ViDoRe v1 to v3, VisRAG, MIEB and M-BEIR: direction, tiles, and what a query is told."""


@pytest.mark.filterwarnings("ignore:The task 'Vidore3HrRetrieval' is superseded:UserWarning")  # the benchmark has it
@pytest.mark.parametrize("name", REAL)
def test_tasks_of_mteb(name: str, embedder: MtebEmbedder, picture: Callable[..., Image.Image]) -> None:
    direction, max_tiles, instruction = REAL[name]
    asked, found = direction.split("2")

    def item(parts: str, seed: int) -> Item:
        text = f"text {seed} about images" if "t" in parts else None
        return Item(text=text, image=picture(seed, 128, 128) if "i" in parts else None)

    queries = [Query(qid=f"q{n}", item=item(asked, n), positives=(f"d{n}",)) for n in range(3)]
    pool = [Candidate(did=f"d{n}", item=item(found, 10 + n)) for n in range(5)]
    rows = OfflineTask(RetrievalTask(dataset="d", task=direction, split="test", queries=queries, candidates=pool))
    rows.load_data()
    task = mteb.get_task(name)
    assert task.metadata.category == direction
    task.hf_subsets = task.hf_subsets[:1]
    task.dataset = {task.hf_subsets[0]: dict.fromkeys(task.eval_splits, rows.dataset["default"]["test"])}
    task.data_loaded = True

    seen: dict[str, np.ndarray] = {}

    class Watched(MtebEmbedder):
        def encode(self, *args: Any, prompt_type: PromptType | None = None, **kwargs: Any) -> Any:
            seen[str(prompt_type)] = super().encode(*args, prompt_type=prompt_type, **kwargs)
            return seen[str(prompt_type)]

    scores = scores_of(Watched(embedder.embedder), task)
    tiles = {"max_tiles": max_tiles}
    instruction = instruction or task.metadata.prompt["query"]
    queries_QD = embedder.embedder.encode_query([replace(q.item, **tiles) for q in queries], instruction=instruction)
    pool_CD = embedder.embedder.encode_document([replace(c.item, **tiles) for c in pool])
    assert np.allclose(seen["query"], queries_QD, atol=1e-5)
    assert np.allclose(seen["document"], pool_CD, atol=1e-5)
    # mteb leaves the first out where a query is in its own pool
    best = (-queries_QD @ pool_CD.T).argsort(axis=1)[:, int(task.skip_first_result)]
    assert scores["hit_rate_at_1"] == pytest.approx(np.mean(best == np.arange(3)), abs=1e-5)


def test_results_are_kept_by_weights(tiny_embedder: Embedder, pages: RetrievalTask, tmp_path: Path) -> None:
    calls: list[str] = []

    class Counting(MtebEmbedder):
        def encode(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(self.mteb_model_meta.revision)
            return super().encode(*args, **kwargs)

    def run(model: MtebEmbedder) -> int:
        before = len(calls)
        cache = mteb.ResultCache(tmp_path)
        task = OfflineTask(pages)
        mteb.evaluate(model, task, cache=cache, co2_tracker=False, encode_kwargs=QUIET, show_progress_bar=False)
        return len(calls) - before

    assert run(Counting(tiny_embedder)) == 2
    assert run(Counting(tiny_embedder)) == 0
    other = Embedder.from_model(tiny_embedder.model, tiny_embedder.processor, tiny_embedder.settings, truncate_dim=16)
    assert run(Counting(other)) == 2
    assert run(Counting(tiny_embedder, instructions={"pages.t2vd.test": "Find it."})) == 2
    assert run(Counting(tiny_embedder, page_tasks=["VOQA"])) == 2
    assert run(Counting(tiny_embedder)) == 0


def test_instruction_comes_from_the_first_that_has_one(embedder: MtebEmbedder, tiny_embedder: Embedder) -> None:
    task = mteb.get_task("CUB200I2IRetrieval").metadata
    named = MtebEmbedder(tiny_embedder, instructions={task.name: "Which bird?"})
    assert named.query_instruction(task, "of the row") == "Which bird?"
    assert embedder.query_instruction(task, "of the row") == "of the row"
    prompted = task.model_copy(update={"prompt": {"query": "of the task"}})
    assert embedder.query_instruction(prompted) == "of the task"
    assert embedder.query_instruction(task.model_copy(update={"prompt": "for both"})) == "for both"
    assert embedder.query_instruction(task) == QUERY_INSTRUCTIONS["i2i"]
    assert embedder.query_instruction(task.model_copy(update={"category": "i2it"})) is None
    assert embedder.max_tiles(task) == 1
    assert MtebEmbedder(tiny_embedder, page_tasks=[task.name]).max_tiles(task) == 4


def test_own_words_candidates_and_grades(embedder: MtebEmbedder) -> None:
    pool = [Candidate(did=f"d{n}", item=Item(text=f"answer {n} text")) for n in range(6)]
    queries = [
        Query(
            qid=f"q{n}",
            item=Item(text=f"query {n} image", instruction=f"Retrieve {n}."),
            positives=(f"d{n}", "d5"),
            grades={"d5": 2},
            candidates=tuple(f"d{k}" for k in range(n, 6)) if n else (),
            excluded=("d3",) if n == 0 else (),
        )
        for n in range(2)
    ]
    data = RetrievalTask(dataset="own", task="t2t", split="test", queries=queries, candidates=pool)
    task = OfflineTask(data)
    assert task.metadata.prompt is None
    task.load_data()
    split = task.dataset["default"]["test"]
    assert split["relevant_docs"] == {"q0": {"d0": 1, "d5": 2}, "q1": {"d1": 1, "d5": 2}}
    assert split["top_ranked"] == {"q0": ["d0", "d1", "d2", "d4", "d5"], "q1": ["d1", "d2", "d3", "d4", "d5"]}
    seen = []

    class Watched(MtebEmbedder):
        def encode(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(super().encode(*args, **kwargs))
            return seen[-1]

    scores_of(Watched(embedder.embedder), task)
    expected = embedder.embedder.encode_query([query.item for query in queries])
    assert np.allclose(seen[0], expected, atol=1e-5)


def test_what_cannot_be_read_is_left_out_and_counted(
    embedder: MtebEmbedder, pages: RetrievalTask, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    broken = Candidate(did="d3", item=Item(image=str(tmp_path / "broken.png"), max_tiles=4))
    task = OfflineTask(replace(pages, candidates=[broken if c.did == "d3" else c for c in pages.candidates]))
    scores = scores_of(embedder, task)
    assert (scores["num_scored_queries"], scores["num_queries"]) == (6, 7)
    assert [problem.id for problem in task.problems] == ["d3", "q3"]


def test_an_input_without_content_scores_zero(
    embedder: MtebEmbedder, reranker: MtebReranker, caplog: pytest.LogCaptureFixture
) -> None:
    task = mteb.get_task("WebQAT2TRetrieval").metadata
    batch = {"id": ["a", "b"], "text": ["words", " "]}
    rows = embedder.encode([batch, batch], task_metadata=task, prompt_type=PromptType.document)  # type: ignore[arg-type]
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1, 0, 1, 0])
    assert "2 of 4 have neither text nor picture" in caplog.text
    with pytest.raises(InputError, match="precision='int8'"):
        embedder.encode([batch], task_metadata=task, precision="int8")  # type: ignore[arg-type]
    scores = reranker.predict([batch], [batch], task_metadata=task)  # type: ignore[arg-type]
    assert scores[0] > 0 and scores[1] == 0


def test_documents_have_one_instruction(pages: RetrievalTask) -> None:
    pool = [replace(one, item=replace(one.item, instruction=one.did)) for one in pages.candidates]
    with pytest.raises(DatasetError, match="12 instructions"):
        OfflineTask(replace(pages, candidates=pool))
    with pytest.raises(DatasetError, match="no queries"):
        OfflineTask(replace(pages, queries=[]))
    with pytest.raises(DatasetError, match="no split 'nowhere'"):
        offline_tasks(FIXTURE, split="nowhere")


def test_a_task_is_named_after_what_its_files_hold() -> None:
    names = {task.metadata.name for task in offline_tasks(FIXTURE)}
    assert len(names) == 5
    assert all(len(name.rpartition(".")[2]) == 12 for name in names)
    one = offline_tasks(FIXTURE / "emoji", tasks=["t2i"], prepare=lambda task: with_instructions(task, query="Find."))
    assert one[0].metadata.prompt == {"query": "Find."}
