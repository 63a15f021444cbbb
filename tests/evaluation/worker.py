"""A process that runs a made-up suite: ``python -m tests.evaluation.worker OUT CACHE SECONDS_A_SHARD SECONDS_A_BLOCK``
of embeddings and of pairs.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quarterlight.data.retrieval import RetrievalTask
from quarterlight.evaluation import pair_scores, retrieval
from quarterlight.evaluation.benchmark import run_suite
from quarterlight.evaluation.suites import Average, Suite, SuiteTask
from quarterlight.models.settings import RerankerSettings
from quarterlight.records import Candidate, ImageSource, Item, Query
from quarterlight.training import embeddings
from quarterlight.training.distributed import processes


def numbers(text: str, size: int) -> np.ndarray:
    """Random numbers that depend on the text alone."""
    seed = int(hashlib.md5(text.encode()).hexdigest()[:8], 16)
    return np.random.default_rng(seed).normal(size=size)


class Hashing:
    """Vectors without meaning that depend on the text alone; counts what it is asked."""

    model_hash = "hashing"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.asked: list[str] = []

    def encode_query(self, items: Sequence[Item], /) -> np.ndarray:
        time.sleep(self.seconds)
        self.asked += [str(item.text) for item in items]
        vectors = np.stack([numbers(str(item.text), 16) for item in items])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    encode_document = encode_query


class Coin:
    """A reranker without meaning, likewise."""

    settings = RerankerSettings()
    model_hash = "coin"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.asked: list[str] = []

    def predict(self, pairs: Sequence[tuple[Item, Item]], /) -> np.ndarray:
        time.sleep(self.seconds)
        self.asked += [f"{a.text} {b.text}" for a, b in pairs]
        return np.array([abs(numbers(f"{a.text} {b.text}", 1)[0]) % 1 for a, b in pairs], np.float32)


class Reading(embeddings.Contents):
    """Counts the pictures that this process reads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_read = 0

    def _read(self, source: ImageSource) -> bytes | str:  # type: ignore[override]
        self.num_read += 1
        return super()._read(source)


def read_pictures() -> tuple[list[str], int]:
    """What five pictures show, or what is wrong with them, and how many of them this process has read."""
    contents = Reading()
    items = [Item(image=one) for one in (b"a", b"b", "missing.png", b"c", b"a copy")]
    contents.read(items)
    found = [(contents.of(item) or b"").hex() or str(contents.problem(item)) for item in items]
    return found, contents.num_read


def suite() -> Suite:
    """Two tasks, of which the second has queries with candidates of their own."""
    tasks = tuple(
        SuiteTask(
            name=name,
            loader="none",
            metric=metric,
            ties="expected",
            group="all",
            in_distribution="",
            entry=None,
            direction="t2t",
            split="test",
        )
        for name, metric in (("whole", "ndcg@5"), ("own", "precision@1"))
    )
    return Suite(
        name="made-up",
        title="Made up",
        tasks=tasks,
        averages=(Average(name="Overall", of=("whole", "own")),),
        reference_table=None,
    )


def open_task(task: SuiteTask) -> RetrievalTask:
    """Texts, of which both tasks share the candidates."""
    own = task.name == "own"
    return RetrievalTask(
        dataset=task.name,
        task="t2t",
        split="test",
        queries=[
            Query(
                qid=f"q{n}",
                item=Item(text=f"{task.name} {n}"),
                positives=tuple(f"d{n + k}" for k in range(1 + n % 3)),
                candidates=tuple(f"d{m}" for m in range(n, n + 9)) if own else (),
                excluded=("d59",) if n == 5 else (),
            )
            for n in range(45)
        ],
        candidates=[Candidate(did=f"d{n}", item=Item(text=f"candidate {n}")) for n in range(60)],
    )


def run(out: Path, cache: Path, seconds: float = 0.0, rerank_seconds: float = 0.0) -> None:
    """Runs the suite; also notes what this process was asked, and what it found."""
    before = embeddings.SHARD, retrieval._QUERIES, pair_scores.BLOCK
    embeddings.SHARD, retrieval._QUERIES, pair_scores.BLOCK = (
        8,
        10,
        16,
    )  # many of either, so that there is something to share and to lose
    try:
        encoder, coin = Hashing(seconds), Coin(rerank_seconds)
        evaluator = retrieval.RetrievalEvaluator(
            encoder, reranker=coin, rerank=4, embeddings=cache, depth=5, prepare=lambda task: task
        )
        process = processes()
        made_up = suite()
        folder = out if process.is_main_process else None
        record = run_suite(evaluator, made_up, made_up.tasks, open_task, folder=folder).to_json()
    finally:
        embeddings.SHARD, retrieval._QUERIES, pair_scores.BLOCK = before
    out.mkdir(parents=True, exist_ok=True)
    (out / f"asked-{process.process_index}").write_text("\n".join(encoder.asked))
    (out / f"pairs-{process.process_index}").write_text("\n".join(coin.asked))
    (out / f"pictures-{process.process_index}.json").write_text(json.dumps(read_pictures()))
    (out / f"record-{process.process_index}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
