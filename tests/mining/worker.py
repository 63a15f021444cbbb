"""A process that mines a random task: ``python -m tests.mining.worker FOLDER SECONDS_A_SHARD``."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quarterlight.data.retrieval import RetrievalTask
from quarterlight.mining import negatives
from quarterlight.records import Candidate, Item, Query
from quarterlight.training import embeddings
from quarterlight.training.distributed import processes

RECIPE = negatives.MineRecipe(depth=20, window=(3, 12), sample=4)


class Hashing:
    """Vectors without meaning that depend on the text alone; counts what it is asked."""

    model_hash = "hashing"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.asked: list[str] = []

    def encode_query(self, items: Sequence[Item], /) -> np.ndarray:
        time.sleep(self.seconds)
        self.asked += [str(item.text) for item in items]
        seeds = [int(hashlib.md5(str(item.text).encode()).hexdigest()[:8], 16) for item in items]
        vectors = np.stack([np.random.default_rng(seed).normal(size=16) for seed in seeds])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    encode_document = encode_query


def random_task(name: str = "t2t", num_queries: int = 45, num_candidates: int = 60) -> RetrievalTask:
    """Texts; query i has the candidates i, i + 1, ... as positives, up to three."""
    return RetrievalTask(
        dataset="random",
        task=name,
        split="train",
        queries=[
            Query(qid=f"q{n}", item=Item(text=f"query {n}"), positives=tuple(f"d{n + k}" for k in range(1 + n % 3)))
            for n in range(num_queries)
        ],
        candidates=[Candidate(did=f"d{n}", item=Item(text=f"candidate {n}")) for n in range(num_candidates)],
    )


def main() -> None:
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    embeddings.SHARD, negatives.PART = 8, 10  # many of either, so that there is something to share and to lose
    encoder = Hashing(seconds)
    negatives.mine(encoder, [random_task()], folder / "out", RECIPE, seed=1, cache=folder / "cache")
    (folder / f"asked-{processes().process_index}").write_text("\n".join(encoder.asked))


if __name__ == "__main__":
    main()
