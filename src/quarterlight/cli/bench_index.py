"""``quarterlight bench index``: speed and memory of indexing real files, by running ``quarterlight index`` itself."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from quarterlight.cli import console
from quarterlight.cli.generated import page, write_picture
from quarterlight.errors import InputError
from quarterlight.images import describe

PAGES_PER_PDF = 10

PAGE_SIZES = {"A4": (1240, 1754), "slide": (1600, 1200)}
"""Pixels of generated pages: A4 is cut into two tiles and a thumbnail, a 4:3 slide into four and a thumbnail."""


@dataclass(frozen=True, kw_only=True)
class Indexing:
    """One run of ``quarterlight index`` into an empty store, in a process of its own.

    rows: pictures, pages and sections.  seconds: from the first look at the folder to the finished index, without
    start of Python and loading of the model.  peak_mb: largest resident memory of the process, 2^20 bytes.
    """

    corpus: str
    rows: int
    problems: int
    seconds: float
    rows_per_s: float
    peak_mb: float


def bench_index(
    folder: Annotated[Path | None, typer.Argument(help="Files to index.", show_default="generated ones")] = None,
    images: Annotated[
        list[int] | None,
        typer.Option(help="Sizes of generated corpora of pictures; may be repeated.", show_default="2000, 20000"),
    ] = None,
    pages: Annotated[int, typer.Option(min=0, help="Pages of generated PDFs, of each of two formats.")] = 200,
    model: Annotated[str, typer.Option(help="A bundled name, a checkpoint folder or a hub id.")] = "nano",
    out: Annotated[Path | None, typer.Option(help="Also write the JSON record to this file.")] = None,
) -> None:
    """Time `quarterlight index` on files, and see whether its memory grows with their number.

    Generated pictures are JPEG and WebP files of 128 to 350 pixels a side with the detail of photographs; generated
    pages are scans with lines of text. Every corpus goes through a new process and into a new store.

    \b
    quarterlight bench index --out benchmarks/results/index.json
    quarterlight bench index ~/Pictures
    """
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        if folder:
            corpora = [(folder.name, folder.absolute())]
        else:
            # In a process of its own: a child's peak memory, as the kernel counts it, starts from that of its parent.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                corpora = pool.submit(_generate, Path(scratch), images, pages).result()
        with console.progress("runs") as bar:
            for number, (name, corpus) in enumerate(bar.track(corpora, description="Indexing")):
                runs.append(_index(name, corpus, Path(scratch) / f"store-{number}", model))
    columns = ("rows", "problems", "seconds", "rows/s", "peak MB")
    table = console.table("corpus", *columns, title=f"quarterlight index --model {model}", right=columns)
    for run in runs:
        cells = (f"{run.seconds:,.1f}", f"{run.rows_per_s:,.1f}", f"{run.peak_mb:,.0f}")
        table.add_row(run.corpus, f"{run.rows:,}", f"{run.problems:,}", *cells)
    console.out.print(table)
    pictures = [run for run in runs if run.corpus.endswith("pictures")]
    growth_mb = pictures[-1].peak_mb - pictures[0].peak_mb if len(pictures) > 1 else None
    if growth_mb is not None:
        console.out.print(
            f"From {pictures[0].rows:,} to {pictures[-1].rows:,} pictures the peak grows by {growth_mb:,.0f} MB."
        )
    record = {
        "benchmark": "index",
        "settings": {"model": model, "pages_per_pdf": PAGES_PER_PDF, "page_pixels": PAGE_SIZES},
        "runs": [asdict(run) for run in runs],
        "growth_mb": growth_mb,
    }
    console.print_record(record, out)


def _index(name: str, corpus: Path, store: Path, model: str) -> Indexing:
    command = [sys.executable, "-m", "quarterlight.cli.main", "index", str(corpus), "--store", str(store)]
    with subprocess.Popen([*command, "--model", model, "--json"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise InputError(
            f"{describe(corpus)} cannot be indexed: the process ended with {process.returncode}, see above."
        )
    summary = json.loads(output)
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return Indexing(
        corpus=name,
        rows=summary["num_rows"],
        problems=len(summary["problems"]),
        seconds=summary["seconds"],
        rows_per_s=summary["num_rows"] / summary["seconds"],
        peak_mb=usage.ru_maxrss * kilobyte / 2**20,
    )


def _generate(scratch: Path, images: Sequence[int] | None, pages: int) -> list[tuple[str, Path]]:
    """Name and folder of each corpus, smallest first."""
    sizes = sorted(images or [2_000, 20_000])
    corpora: list[tuple[str, Path, int, Callable[[Path, int], None]]] = [
        (f"{size:,} pictures", scratch / f"pictures-{size}", size, _write_picture) for size in sizes
    ]
    for name in PAGE_SIZES if pages else ():
        num_files = -(-pages // PAGES_PER_PDF)
        write = _pdf_writer(PAGE_SIZES[name])
        corpora.append((f"{num_files * PAGES_PER_PDF:,} {name} pages", scratch / f"pages-{name}", num_files, write))
    with console.progress("files") as bar:
        line = bar.add_task("Generating", total=sum(num for _, _, num, _ in corpora))
        for _, corpus, num, write in corpora:
            corpus.mkdir()
            for number in range(num):
                write(corpus, number)
                bar.advance(line)
    return [(name, corpus) for name, corpus, _, _ in corpora]


def _write_picture(folder: Path, number: int) -> None:
    write_picture(folder / f"{number:06}.{'jpg' if number % 2 else 'webp'}", number)


def _pdf_writer(size: tuple[int, int]) -> Callable[[Path, int], None]:
    def write(folder: Path, number: int) -> None:
        first, *rest = (page(size, (number, place)) for place in range(PAGES_PER_PDF))
        first.save(folder / f"{number:04}.pdf", save_all=True, append_images=rest)

    return write
