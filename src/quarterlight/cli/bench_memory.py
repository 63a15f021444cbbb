"""``quarterlight bench memory``: whether embedding more items takes more memory."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from quarterlight.cli import console
from quarterlight.cli.allocator import keep_freed_memory
from quarterlight.cli.measure import MemoryPeak

if TYPE_CHECKING:
    from quarterlight.records import Item

_T = TypeVar("_T")

BAR = 1.2
"""The most that the peak may grow from the least to the most items."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """One call of an embedder with so many items, in a process of its own.

    peak_mb: the most memory at a time during the call, 2^20 bytes: what is resident, with Python, its libraries and the
    model, or on a GPU what is allocated.  more_mb: of these, what was not in use when the model was loaded.
    Both are ``None`` where the system does not say (not Linux).
    """

    items: int
    peak_mb: float | None
    more_mb: float | None
    seconds: float


def bench_memory(
    items: Annotated[
        list[int] | None, typer.Option(min=10, help="Items of a call; may be repeated.", show_default="500, 5000")
    ] = None,
    model: Annotated[str, typer.Option(help="A bundled name, a checkpoint folder or a hub id.")] = "nano",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write the JSON record to this file.")] = None,
) -> None:
    """Embed few and many items of the mixed workload of `bench throughput`, and compare the memory that it takes.

    Every number of items is embedded by one call in a new process; smaller calls get some of the items of the largest.

    \b
    quarterlight bench memory --out benchmarks/results/memory-nano.json
    """
    sizes = sorted(items or [500, 5000])
    runs = []
    with tempfile.TemporaryDirectory() as scratch, console.progress("runs") as bar:
        line = bar.add_task("Generating", total=1 + len(sizes))
        groups = _in_a_process(_generate, Path(scratch) / "files", sizes[-1])
        for size in sizes:
            bar.advance(line)
            bar.update(line, description=f"Embedding {size:,}")
            some = [one for items in groups for one in items[: round(size * len(items) / sizes[-1])]]
            runs.append(_in_a_process(_embed, some, model, device))
    columns = ("items", "peak MB", "beyond the model, MB", "seconds")
    table = console.table(*columns, title=f"Embedding with {model}, {device}", right=columns)
    for run in runs:
        table.add_row(f"{run.items:,}", _mb(run.peak_mb), _mb(run.more_mb), f"{run.seconds:,.1f}")
    console.out.print(table)
    growth = _ratio(runs[0].peak_mb, runs[-1].peak_mb)
    if growth is not None and len(runs) > 1:
        console.out.print(
            f"{runs[-1].items:,} items take {growth:.2f} times the memory of {runs[0].items:,} (bar: {BAR} times)."
        )
    record = {
        "benchmark": "memory",
        "settings": {"model": model, "device": device, "workload": "mixed"},
        "runs": [asdict(run) for run in runs],
        "growth": growth,
        "growth_beyond_the_model": _ratio(runs[0].more_mb, runs[-1].more_mb),
        "bar": BAR,
    }
    console.print_record(record, out)


def _in_a_process(function: Callable[..., _T], *arguments: Any) -> _T:
    """What a function gives in a process that has done nothing before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _generate(folder: Path, number: int) -> list[list[Item]]:
    """The items of each kind, with their files."""
    from quarterlight.cli.bench_infer import MIXTURES, _items

    return [items for _, items in _items(folder, MIXTURES["mixed"], number)]


def _embed(items: Sequence[Item], model: str, device: str) -> Embedding:
    import numpy as np

    from quarterlight.models.embedder import Embedder

    keep_freed_memory()  # as the commands that embed do when they start
    embedder = Embedder(model, device=device)
    mixed = [items[place] for place in np.random.default_rng(0).permutation(len(items))]
    start = time.perf_counter()
    with MemoryPeak(device) as peak:
        rows = embedder.encode_document(mixed)
    assert len(rows) == len(items)
    return Embedding(
        items=len(items), peak_mb=peak.total_mb, more_mb=peak.mb, seconds=round(time.perf_counter() - start, 1)
    )


def _ratio(few: float | None, many: float | None) -> float | None:
    return round(many / few, 3) if few and many is not None else None


def _mb(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
