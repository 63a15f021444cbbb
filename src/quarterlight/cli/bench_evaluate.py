"""``quarterlight bench evaluate``: what the evaluator costs beside the model, against a plain FAISS flat search."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from quarterlight.cli import console

_PART = 4096  # vectors that are made at once, few enough that this is not what takes most memory
_KILOBYTE = 1 if sys.platform == "darwin" else 1024  # unit of the kernel's peak memory


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The search of the evaluator and that of FAISS on the same vectors, in turns, in a process of its own.

    seconds, faiss_seconds: of each round.  ratio: of the two in a round: lowest, median, highest.
    above_mb: memory above the vectors and what was there before them, at its largest, of our search, 2^20 bytes.
    same_first: share of queries for which both find the same first candidate.
    gflop_per_s: of the dot products, over our median time.
    """

    queries: int
    candidates: int
    seconds: list[float]
    faiss_seconds: list[float]
    ratio: list[float]
    above_mb: float
    same_first: float
    gflop_per_s: float


def bench_evaluate(
    queries: Annotated[int, typer.Option(min=1, help="Queries, with one positive each.")] = 5_000,
    candidates: Annotated[int, typer.Option(min=101, help="Candidates.")] = 200_000,
    dimension: Annotated[int, typer.Option(min=2, help="Columns of a vector.")] = 256,
    depth: Annotated[int, typer.Option(min=1, help="First candidates that are kept of each query.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="How often both are timed.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON record to this file.")] = None,
) -> None:
    """Time ranking with random vectors in place of a model: the ranks of all positives and the first candidates.

    FAISS finds the first candidates only; both compute all dot products. The positives lie anywhere in the order, which
    is the slow case: where most are among the first, less has to be counted.

    \b
    quarterlight bench evaluate --out benchmarks/results/evaluate.json
    quarterlight bench evaluate --queries 100000 --candidates 1000000
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        run = pool.submit(measure, queries, candidates, dimension, depth, rounds).result()
    columns = ("queries", "candidates", "ours s", "FAISS s", "ratio", "GFLOP/s", "MB above")
    table = console.table(*columns, title=f"{dimension} columns, {depth} kept, median of {rounds}", right=columns)
    cells = (statistics.median(run.seconds), statistics.median(run.faiss_seconds), run.ratio[1])
    table.add_row(
        f"{queries:,}",
        f"{candidates:,}",
        *(f"{cell:,.3g}" for cell in cells),
        f"{run.gflop_per_s:,.0f}",
        f"{run.above_mb:,.0f}",
    )
    console.out.print(table)
    low, middle, high = run.ratio
    console.out.print(f"Ours takes {middle:.2f} times ({low:.2f} to {high:.2f}) what a plain FAISS flat search takes.")
    settings = {"dimension": dimension, "depth": depth, "rounds": rounds}
    console.print_record({"benchmark": "evaluate", "settings": settings, "run": asdict(run)}, out)


def measure(queries: int, candidates: int, dimension: int, depth: int, rounds: int) -> Ranking:
    """Both searches in turns, each first in every second round."""
    import faiss

    from quarterlight.metrics.search import Wanted, search

    query_QD, candidate_CD = (_points(rows, dimension, seed) for seed, rows in enumerate((queries, candidates)))
    positives = np.random.default_rng(2).integers(0, candidates, queries).tolist()
    wanted = [Wanted(positives=(column,)) for column in positives]
    search(query_QD[:64], candidate_CD, wanted[:64], k=depth)  # what is loaded at the first call is not ours to time
    faiss.knn(query_QD[:64], candidate_CD[:1000], depth, metric=faiss.METRIC_INNER_PRODUCT)
    before_mb = _peak_mb()
    ours: list[float] = []
    theirs: list[float] = []
    above_mb = same = 0.0
    for number in range(rounds):
        for which in ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours"):
            started = time.perf_counter()
            if which == "ours":
                found = search(query_QD, candidate_CD, wanted, k=depth)
                ours.append(time.perf_counter() - started)
                if not theirs:
                    above_mb = _peak_mb() - before_mb
            else:
                _, column_QK = faiss.knn(query_QD, candidate_CD, depth, metric=faiss.METRIC_INNER_PRODUCT)
                theirs.append(time.perf_counter() - started)
        same = float((found.column_QK[:, 0] == column_QK[:, 0]).mean())
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return Ranking(
        queries=queries,
        candidates=candidates,
        seconds=ours,
        faiss_seconds=theirs,
        ratio=[ratios[0], statistics.median(ratios), ratios[-1]],
        above_mb=above_mb,
        same_first=same,
        gflop_per_s=2e-9 * queries * candidates * dimension / statistics.median(ours),
    )


def _points(rows: int, dimension: int, seed: int) -> np.ndarray:
    """Random directions, made in parts so that the largest memory is that of the search."""
    points_ND = np.empty((rows, dimension), np.float32)
    generator = np.random.default_rng(seed)
    for start in range(0, rows, _PART):
        part = generator.standard_normal((min(_PART, rows - start), dimension), np.float32)
        points_ND[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return points_ND


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KILOBYTE / 2**20
