"""``quarterlight bench mine``: time and memory of ``quarterlight mine`` with a model that costs nothing."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from quarterlight.cli import console
from quarterlight.records import Candidate, Item, Query

MANY = 1_000_000
"""Queries, and candidates, of the extrapolation."""

_KILOBYTE = 1 if sys.platform == "darwin" else 1024  # unit of the kernel's peak memory


@dataclass(frozen=True, kw_only=True)
class Mining:
    """One call of :func:`quarterlight.mining.negatives.mine`, in a process of its own.

    seconds: from tasks in memory to the file, without a model.  gflop_per_s: of the dot products, over that time.
    peak_mb: largest resident memory, 2^20 bytes.  base_mb: the same before the call.
    """

    queries: int
    candidates: int
    seconds: float
    pairs_per_s: float
    gflop_per_s: float
    base_mb: float
    peak_mb: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a million queries and a million candidates would take, at most: blocks of vectors stop growing.

    hours: by seconds = a (queries + candidates) + b queries x candidates, fitted to the two runs.
    memory_mb: by peak = c + d (queries + candidates).  disk_gib: of the embeddings.
    """

    hours: float
    memory_mb: float
    disk_gib: float


def bench_mine(
    size: Annotated[int, typer.Option(min=64, help="Queries, and as many candidates.")] = 100_000,
    dimension: Annotated[int, typer.Option(min=2, help="Columns of a vector.")] = 256,
    depth: Annotated[int, typer.Option(min=100, help="Ranks that are looked at.")] = 100,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON record to this file.")] = None,
) -> None:
    """Time mining with random vectors in place of a model, and say what a million by a million would take.

    Everything else is real: hashing, writing and reading embeddings, the exact search, the file. A run of a quarter of
    the size comes first; time and memory are extrapolated from both. Points lie around random centres, a hundred each.

    \b
    quarterlight bench mine --out benchmarks/results/mine.json
    """
    runs = []
    with console.progress("runs") as bar:
        for number in bar.track((size // 4, size), description="Mining"):
            # In a process of its own, whose peak memory is that of this run alone.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                runs.append(pool.submit(_run, number, dimension, depth).result())
    columns = ("queries", "candidates", "seconds", "pairs/s", "GFLOP/s", "before MB", "peak MB")
    table = console.table(*columns, title=f"quarterlight mine, {dimension} columns, {depth} ranks", right=columns)
    for run in runs:
        cells = (run.seconds, run.pairs_per_s, run.gflop_per_s, run.base_mb, run.peak_mb)
        table.add_row(f"{run.queries:,}", f"{run.candidates:,}", *(f"{cell:,.4g}" for cell in cells))
    console.out.print(table)
    estimate = extrapolate(runs[0], runs[1], dimension)
    console.out.print(
        f"{MANY:,} x {MANY:,} by these two: {estimate.hours:.2f} hours, at most "
        f"{estimate.memory_mb / 1024:.1f} GiB of memory, {estimate.disk_gib:.1f} GiB of embeddings on disk, beside the "
        "time to embed."
    )
    record = {
        "benchmark": "mine",
        "settings": {"size": size, "dimension": dimension, "depth": depth},
        "runs": [asdict(run) for run in runs],
        "million_by_million": asdict(estimate),
    }
    console.print_record(record, out)


def extrapolate(small: Mining, large: Mining, dimension: int) -> Estimate:
    """What a million by a million takes, from two runs; neither part of the time is taken to be below zero."""
    rows = np.array([small.queries + small.candidates, large.queries + large.candidates], np.float64)
    pairs = np.array([small.queries * small.candidates, large.queries * large.candidates], np.float64)
    per_row, per_pair = np.linalg.solve(np.stack([rows, pairs], axis=1), [small.seconds, large.seconds])
    if min(per_row, per_pair) < 0:  # noise of short runs: all of it counts as the part that grows faster
        per_row, per_pair = 0.0, large.seconds / pairs[1]
    growth_mb = max(0.0, large.peak_mb - small.peak_mb) / (rows[1] - rows[0])
    return Estimate(
        hours=float(per_row * 2 * MANY + per_pair * MANY**2) / 3600,
        memory_mb=float(large.peak_mb + growth_mb * (2 * MANY - rows[1])),
        disk_gib=2 * MANY * dimension * 4 / 2**30,
    )


def _run(size: int, dimension: int, depth: int) -> Mining:
    from quarterlight.data.retrieval import RetrievalTask
    from quarterlight.mining.negatives import MineRecipe, mine

    task = RetrievalTask(
        dataset="random",
        task="t2t",
        split="train",
        queries=[Query(qid=f"q{n}", item=Item(text=f"{n}"), positives=(f"d{n}",)) for n in range(size)],
        candidates=[Candidate(did=f"d{n}", item=Item(text=f"{n}")) for n in range(size)],
    )
    recipe = MineRecipe(depth=depth)
    with tempfile.TemporaryDirectory() as scratch:
        base_mb, started = _peak_mb(), time.perf_counter()
        folder = Path(scratch)
        mine(_Random(dimension), [task], folder, recipe, seed=0, cache=folder / "embeddings")
        seconds = time.perf_counter() - started
    return Mining(
        queries=size,
        candidates=size,
        seconds=seconds,
        pairs_per_s=size**2 / seconds,
        gflop_per_s=2e-9 * size**2 * dimension / seconds,
        base_mb=base_mb,
        peak_mb=_peak_mb(),
    )


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KILOBYTE / 2**20


class _Random:
    """Embeds the number n as a random point around the random centre n // 100, on either side."""

    model_hash = "random"

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def encode_query(self, items: Sequence[Item], /) -> np.ndarray:
        return self._points(items, 1)

    def encode_document(self, items: Sequence[Item], /) -> np.ndarray:
        return self._points(items, 2)

    def _points(self, items: Sequence[Item], side: int) -> np.ndarray:
        numbers = [int(item.text or 0) for item in items]
        centres, of_item = np.unique([number // 100 for number in numbers], return_inverse=True)
        centre_CD = np.stack([np.random.default_rng((0, c)).normal(size=self.dimension) for c in centres.tolist()])
        spread_ND = np.random.default_rng((side, numbers[0])).normal(size=(len(items), self.dimension))
        point_ND = (centre_CD[of_item] + 0.7 * spread_ND).astype(np.float32)
        return point_ND / np.linalg.norm(point_ND, axis=1, keepdims=True)
