"""``quarterlight bench search``: latency and recall of the store, beside exact search in memory."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from quarterlight.cli import console
from quarterlight.errors import InputError
from quarterlight.images import describe
from quarterlight.index.precision import check_precision

if TYPE_CHECKING:
    from quarterlight.index import IndexStore

THUMBNAIL_BYTES = 4096
"""Payload of each row, as large as a thumbnail of a photograph: it must not slow the search for vectors."""

ROWS_PER_COMMIT = 5000

LEAST_ROWS = 110
"""More than ten in each of ten folders, whose ten nearest are looked for."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Searches over so many rows.  Times in ms; recall is that of the exact ten nearest.

    scan_ms: the same search by one NumPy product over vectors in memory: no disk, no rows, nothing but arithmetic.
    vector_mb: what the vectors take in this precision, uncompressed; 2^20 bytes.
    """

    rows: int
    precision: str
    vector_mb: float
    build_s: float
    p50_ms: float
    p95_ms: float
    recall_at_10: float
    filtered_p50_ms: float
    filtered_recall_at_10: float
    scan_ms: float


def bench_search(
    rows: Annotated[
        list[int] | None, typer.Option(help="Rows; may be given twice.", show_default="10000, 100000")
    ] = None,
    dimension: Annotated[int, typer.Option(min=8, help="Columns of a vector.")] = 256,
    shards: Annotated[
        Path | None, typer.Option("--from", help="Real vectors, from `quarterlight embed`; some of them are queries.")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="How vectors are kept; may be repeated.", show_default="float32"),
    ] = None,
    queries: Annotated[
        int,
        typer.Option(min=1, help="Searches that are timed; as many again warm up; fewer where --from has few."),
    ] = 200,
    model: Annotated[str | None, typer.Option(help="Also time the embedding of a query with this model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON record to this file.")] = None,
) -> None:
    """Time warm searches of an index on disk, with results and thumbnails, and compare them with exact search.

    Vectors are random points around random centres, one hundred to a centre; queries are new points of the same kind.
    Filtered searches look into one of ten folders. Recall is that of the ten nearest by float32 vectors.

    \b
    quarterlight bench search --model nano --out benchmarks/results/search.json
    quarterlight bench search --rows 100000 --precision float32 --precision int8 --precision binary
    """
    kept = precision or ["float32"]
    for name in kept:
        check_precision(name)
    latencies: list[Latency] = []
    for number in [0] if shards else rows or [10_000, 100_000]:
        vector_ND, query_QD = _embedded(shards, queries) if shards else _random(number, dimension, queries)
        queries = len(query_QD) // 2
        latencies += [_latency(vector_ND, query_QD, name) for name in kept]
        dimension = vector_ND.shape[1]
    columns = (
        "rows",
        "vectors as",
        "MB",
        "build s",
        "p50 ms",
        "p95 ms",
        "recall@10",
        "filtered p50",
        "filtered recall",
        "scan in memory ms",
    )
    table = console.table(*columns, title=f"Warm search, top 10, {dimension} dimensions", right=columns)
    for one in latencies:
        cells = (one.p50_ms, one.p95_ms, one.recall_at_10, one.filtered_p50_ms, one.filtered_recall_at_10, one.scan_ms)
        table.add_row(
            f"{one.rows:,}",
            one.precision,
            f"{one.vector_mb:.1f}",
            f"{one.build_s:.1f}",
            *(f"{cell:.3g}" for cell in cells),
        )
    console.out.print(table)
    console.out.print("scan: the exact search by one product of a matrix in memory, the floor of a flat search.")
    embed_ms = _embed_ms(model, queries) if model else None
    if embed_ms is not None:
        console.out.print(f"Embedding a query of five words with {model}: {embed_ms:.1f} ms more.")
    record = {
        "benchmark": "search",
        "settings": {
            "dimension": dimension,
            "queries": queries,
            "vectors": shards.name if shards else "random",
            "model": model,
            "payload_bytes": THUMBNAIL_BYTES,
        },
        "latencies": [asdict(one) for one in latencies],
        "query_embedding_p50_ms": embed_ms,
    }
    console.print_record(record, out)


def _random(num_rows: int, dimension: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors, and twice as many queries as are timed."""
    rng = np.random.default_rng(0)
    centre_CD = rng.normal(size=(max(1, num_rows // 100), dimension)).astype(np.float32)
    return _points(centre_CD, num_rows, rng), _points(centre_CD, 2 * num_queries, rng)


def _embedded(folder: Path, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct vectors of some shards, and twice as many others as are timed, drawn from among them, as queries."""
    from quarterlight.index.shards import ShardFolder

    shards = ShardFolder.open(folder)
    vector_ND = np.unique(np.concatenate([shards.read(info)[1] for info in shards.shards()]), axis=0)
    num_queries = min(num_queries, (len(vector_ND) - LEAST_ROWS) // 2)
    if num_queries < 1:
        raise InputError(
            f"{describe(folder)} has {len(vector_ND)} distinct vectors, and a search cannot be timed on fewer than "
            f"{LEAST_ROWS + 2}: embed more files."
        )
    order = np.random.default_rng(0).permutation(len(vector_ND))
    return vector_ND[order[2 * num_queries :]], vector_ND[order[: 2 * num_queries]]


def _latency(vector_ND: np.ndarray, query_QD: np.ndarray, precision: Any) -> Latency:
    rng = np.random.default_rng(0)
    num_rows = len(vector_ND)
    with tempfile.TemporaryDirectory() as folder, console.progress("rows") as bar:
        start = time.perf_counter()
        store = _fill(folder, vector_ND, precision, rng, bar)
        build_s = time.perf_counter() - start
        vector_mb = store.size_in_bytes() / 2**20
        everywhere = np.arange(num_rows)
        seconds, recall = _search(store, query_QD, vector_ND, everywhere, None)
        filtered_seconds, filtered_recall = _search(store, query_QD, vector_ND, everywhere[::10], "/bench/0")
    return Latency(
        rows=num_rows,
        precision=precision,
        vector_mb=vector_mb,
        build_s=build_s,
        p50_ms=1e3 * statistics.median(seconds),
        p95_ms=1e3 * float(np.quantile(seconds, 0.95)),
        recall_at_10=recall,
        filtered_p50_ms=1e3 * statistics.median(filtered_seconds),
        filtered_recall_at_10=filtered_recall,
        scan_ms=1e3 * statistics.median(_scan_seconds(vector_ND, query) for query in query_QD[: len(query_QD) // 2]),
    )


def _points(centre_CD: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    spread = 0.7 * rng.normal(size=(num, centre_CD.shape[1])).astype(np.float32)
    points = centre_CD[rng.integers(len(centre_CD), size=num)] + spread
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def _fill(folder: str, vector_ND: np.ndarray, precision: Any, rng: np.random.Generator, bar: Any) -> IndexStore:
    from quarterlight.index import IndexStore, ModelIdentity, Row
    from quarterlight.index.rows import uri_of

    model = ModelIdentity(name="bench", hash="be" * 32, dimension=vector_ND.shape[1])
    store = IndexStore.create(folder, model, precision=precision)
    line = bar.add_task("Filling", total=len(vector_ND))
    with store.writing():
        for start in range(0, len(vector_ND), ROWS_PER_COMMIT):
            vectors = vector_ND[start : start + ROWS_PER_COMMIT]
            rows = [
                Row(
                    uri=uri_of(f"/bench/{number % 10}/{number}.jpg"),
                    kind="image",
                    part=0,
                    size=1,
                    mtime_ns=1,
                    content_hash="0" * 64,
                    thumbnail=rng.bytes(THUMBNAIL_BYTES),
                )
                for number in range(start, start + len(vectors))
            ]
            store.upsert(rows, vectors)
            bar.advance(line, len(vectors))
        store.optimize()
    return store


def _search(
    store: IndexStore, query_QD: np.ndarray, vector_ND: np.ndarray, allowed: np.ndarray, within: str | None
) -> tuple[list[float], float]:
    """Seconds of each search in the second half of the queries (the first warms up), and recall among ``allowed``."""
    from quarterlight.index.rows import path_of

    seconds, found = [], 0
    for query_D in query_QD:
        start = time.perf_counter()
        matches = store.search(query_D, top_k=10, within=within)
        seconds.append(time.perf_counter() - start)
        exact = allowed[np.argpartition(-(vector_ND[allowed] @ query_D), 10)[:10]]
        found += len({int(path_of(match.row.uri).stem) for match in matches} & set(exact.tolist()))
    return seconds[len(seconds) // 2 :], found / (10 * len(query_QD))


def _scan_seconds(vector_ND: np.ndarray, query_D: np.ndarray) -> float:
    start = time.perf_counter()
    score_N = vector_ND @ query_D
    np.argpartition(-score_N, 10)[:10]
    return time.perf_counter() - start


def _embed_ms(model: str, num: int) -> float:
    from quarterlight.models.embedder import Embedder

    embedder = Embedder(model)
    seconds = []
    for number in range(2 * num):
        start = time.perf_counter()
        embedder.encode_query([f"red apple on table {number}"])
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[num:])
