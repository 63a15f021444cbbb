"""Section 3.4 and the last row of table 7 on nano: what a reranker adds, trained in pairs, in lists, and in both.

    python benchmarks/reproduce/rerank.py --data DATASETS --judged runs/nano --out runs/reproduce

`--judged` is a run whose stages up to `judge` are finished; its recipe, with fewer steps, trains three rerankers for
each seed.  Each reranks the first five candidates of the bundled embedder on the test tasks: alone, as in the paper,
and with the cosine beside its score, weighted by what is best on the validation split.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import common
import numpy as np
import numpy.typing as npt

from quarterlight.data.retrieval import RetrievalDataset, with_instructions
from quarterlight.evaluation.retrieval import sample_queries
from quarterlight.metrics.fusion import fuse
from quarterlight.metrics.search import first_k
from quarterlight.models.embedder import Embedder
from quarterlight.models.reranker import Reranker
from quarterlight.pipeline import run
from quarterlight.recipe import load_recipe

VARIANTS = {"pairs": (1.0, 0.0), "lists": (0.0, 1.0), "both": (1.0, 1.0)}
"""What is trained -> weights of the pointwise and of the listwise loss."""

PAPER = {"E": (68.0, 72.1), "E+R": (70.2, 73.3)}
K = 5
WEIGHTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)

Found = dict[str, tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32], list[tuple[Any, list[Any]]]]]


def main() -> None:
    arguments = common.arguments(__doc__, trunk=False, judged=True, embedder="nano", seeds=3, steps=300)
    embedder = Embedder(arguments.embedder)
    found = {split: first_candidates(embedder, arguments.data, split) for split in ("val", "test")}
    before = {task: float(right[:, 0].mean()) for task, (right, *_) in found["test"].items()}
    before["mean"] = statistics.mean(before.values())
    records: dict[str, list[dict[str, Any]]] = {}
    for name, weights in VARIANTS.items():
        for seed in range(arguments.seeds):
            folder = train(arguments, name, weights, seed)
            records.setdefault(name, []).append(score(folder, found, listwise=not weights[0]))
    lines = [
        f"| trained in | alone, mean P@1 of 8 tasks, {arguments.seeds} seeds | with the cosine | above E in |",
        "| --- | --- | --- | --- |",
        f"| (E, the embedder alone) | {before['mean']:.3f} | | |",
    ]
    for name, runs in records.items():
        alone, fused = ([one[kind]["mean"] for one in runs] for kind in ("alone", "fused"))
        above = sum(one > before["mean"] for one in fused)
        lines.append(f"| {name} | {common.spread(alone)} | {common.spread(fused)} | {above} of {len(fused)} seeds |")
    lines += ["", "The paper (2B, MMEB / VisDoc): E 68.0 / 72.1, E+R 70.2 / 73.3."]

    def draw(axes: Any) -> None:
        axes.axhline(before["mean"], color="grey", linestyle="--", label="E")
        for kind, mark in (("alone", "o"), ("fused", "s")):
            for place, (name, runs) in enumerate(records.items()):
                label = {"alone": "E+R, reranker alone", "fused": "E+R, with the cosine"}[kind] if not place else None
                values = [one[kind]["mean"] for one in runs]
                axes.plot([name] * len(values), values, mark, color="C0" if kind == "alone" else "C1", label=label)
        axes.set(ylabel="mean P@1", title=f"Reranking the first {K} on nano")
        axes.legend()

    record = {"section": "3.4", "steps": arguments.steps, "embedder": before, "runs": records, "paper": PAPER}
    common.finish("rerank", "\n".join(lines), record, draw)


def train(arguments: Any, name: str, weights: tuple[float, float], seed: int) -> Path:
    """The folder of a reranker's run of so many steps."""
    values = {
        "rerank.optimizer.num_steps": arguments.steps,
        "rerank.loss.pointwise_weight": weights[0],
        "rerank.loss.listwise_weight": weights[1],
        "rerank.loss.eval_every": 0,
        "seed": seed,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    recipe = load_recipe(arguments.judged / "judge" / "recipe.yaml", overrides)
    before = recipe.stages[: recipe.stages.index("rerank")]
    folder = common.begin(arguments.judged, before, arguments.out / "rerank" / f"{name}{seed}")
    return run(recipe, arguments.data, folder, first="rerank", last="rerank", report=print)


def first_candidates(embedder: Embedder, data: Path, split: str) -> Found:
    """Task -> which of the first K candidates of each query are right, their cosines, and the items."""
    found: Found = {}
    for name, tasks in common.TASKS.items():
        dataset = RetrievalDataset(data / name)
        for one in tasks:
            task = with_instructions(sample_queries(dataset.load(one, split), common.QUERIES))
            queries = embedder.encode_query([query.item for query in task.queries])
            pool = embedder.encode_document([candidate.item for candidate in task.candidates])
            columns, cosines = first_k(queries, pool, K)
            right = [
                [task.candidates[column].did in query.positives for column in row]
                for query, row in zip(task.queries, columns, strict=True)
            ]
            items = [
                (query.item, [task.candidates[column].item for column in row])
                for query, row in zip(task.queries, columns, strict=True)
            ]
            found[f"{name}/{one}"] = np.array(right), cosines, items
    return found


def score(folder: Path, found: dict[str, Found], *, listwise: bool) -> dict[str, Any]:
    """Mean P@1 on test: by the reranker alone, and with the weight that is best on the validation split."""
    file = folder / "p1.json"
    if file.is_file():
        return json.loads(file.read_text())
    reranker = Reranker(folder)
    scores = {
        split: {task: by_reranker(reranker, items, listwise) for task, (_, _, items) in tasks.items()}
        for split, tasks in found.items()
    }

    def p1(split: str, weight: float) -> dict[str, float]:
        values = {}
        for task, (right, cosines, _) in found[split].items():
            best = fuse(cosines, scores[split][task], weight).argmax(axis=1)
            values[task] = float(right[np.arange(len(best)), best].mean())
        return {**values, "mean": statistics.mean(values.values())}

    weight = max(WEIGHTS, key=lambda one: p1("val", one)["mean"])
    record = {"alone": p1("test", 1.0), "fused": p1("test", weight), "weight": weight}
    record["by_weight"] = {split: {str(one): p1(split, one)["mean"] for one in WEIGHTS} for split in found}
    file.write_text(json.dumps(record, indent=1))
    return record


def by_reranker(reranker: Reranker, items: list[tuple[Any, list[Any]]], listwise: bool) -> npt.NDArray[np.float32]:
    """The scores of the first K of each query: in pairs, or in one list each."""
    if not listwise:
        pairs = [(query, candidate) for query, row in items for candidate in row]
        return reranker.predict(pairs, show_progress=True).reshape(len(items), -1)
    rows = []
    for query, row in items:
        ranked = {one["corpus_id"]: one["score"] for one in reranker.rank_listwise(query, row)}
        rows.append([ranked[place] for place in range(len(row))])
    return np.array(rows, np.float32)


if __name__ == "__main__":
    main()
