"""``quarterlight index``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from quarterlight.cli import console
from quarterlight.images import describe
from quarterlight.index import IndexStore, Precision
from quarterlight.search.encoder import identity_of
from quarterlight.search.ingest import IngestReport, TokenReport, ingest

DEFAULT_STORE = Path(".quarterlight")
"""Where `index` writes and `search` looks, in the current folder."""


def index(
    paths: Annotated[list[Path], typer.Argument(help="Folders, pictures, PDFs, Markdown and text files.")],
    store: Annotated[
        Path, typer.Option(help="Folder of the index, made if missing.", show_default="./.quarterlight")
    ] = DEFAULT_STORE,
    model: Annotated[str, typer.Option(help="A bundled name, a checkpoint folder or a hub id.")] = "nano",
    store_visual_tokens: Annotated[
        Precision | None,
        typer.Option(
            help="Also keep what the model saw of pictures and pages, so that `search --rerank` need not look again."
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if anything could not be indexed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one line of JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no summary, only problems.")] = False,
) -> None:
    """Index pictures, PDF pages and texts, so that `quarterlight search` finds them.

    Run it again to take up what is new, changed, moved or deleted; what has not changed is not read again.
    Hidden files are left out. Once visual tokens are stored, every later run keeps them up to date.

    \b
    quarterlight index ~/Pictures ~/papers
    quarterlight index ~/Pictures --store-visual-tokens int8
    quarterlight index . --store /tmp/index --model ./my-checkpoint --strict
    """
    from quarterlight.models.embedder import Embedder

    embedder = Embedder(model)
    target = IndexStore.create(store, identity_of(embedder))
    with console.progress("files", quiet=quiet or as_json) as bar:
        task = bar.add_task("Indexing", total=None)
        report = ingest(
            paths,
            target,
            embedder,
            visual_tokens=store_visual_tokens,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        about = {"store": str(store), "model": embedder.name, "model_hash": embedder.model_hash}
        problems = [{"path": problem.path, "reason": problem.reason} for problem in report.problems]
        console.print_json(about | asdict(report) | {"problems": problems})
    else:
        _print(report, store, quiet)
    if report.stopped or (strict and report.problems):
        raise typer.Exit(1)


def _print(report: IngestReport, store: Path, quiet: bool) -> None:
    for problem in report.problems:
        console.err.print(str(problem), style="yellow", markup=False, soft_wrap=True)
    if report.stopped:
        console.err.print(f"Stopped: {report.stopped}", style="red", markup=False, soft_wrap=True)
    if quiet:
        return
    names = ("new", "changed", "moved", "unchanged", "deleted")
    counts = ", ".join(f"{getattr(report, name):,} {name}" for name in names if getattr(report, name))
    problems = f"; {len(report.problems):,} not indexed, see above" if report.problems else ""
    other = f"; {report.num_other:,} of other kinds left alone" if report.num_other else ""
    console.err.print(
        f"Files: {counts or 'none'}{problems}{other}.\n"
        f"Index: {report.num_rows:,} pictures, pages and sections in {describe(store)} ({report.seconds:.1f} s).",
        markup=False,
        soft_wrap=True,
    )
    if report.visual_tokens is not None:
        console.err.print(_tokens(report.visual_tokens), markup=False, soft_wrap=True)


def _tokens(report: TokenReport) -> str:
    """``Visual tokens: 3 added; 12 pictures and pages, 32.8 kB each as float16, 393.2 kB in all.``"""
    changes = ", ".join(
        f"{number:,} {what}"
        for number, what in ((report.num_added, "added"), (report.num_removed, "removed"))
        if number
    )
    each = report.num_bytes / max(1, report.num_items)
    return (
        f"Visual tokens: {changes or 'kept up to date'}; {report.num_items:,} pictures and pages, "
        f"{decimal(round(each))} each as {report.precision}, {decimal(report.num_bytes)} in all."
    )
