"""``quarterlight index``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from quarterlight.cli import console
from quarterlight.images import describe
from quarterlight.index import IndexStore
from quarterlight.search.encoder import identity_of
from quarterlight.search.ingest import IngestReport, ingest

DEFAULT_STORE = Path(".quarterlight")
"""Where `index` writes and `search` looks, in the current folder."""


def index(
    paths: Annotated[list[Path], typer.Argument(help="Folders, pictures, PDFs, Markdown and text files.")],
    store: Annotated[
        Path, typer.Option(help="Folder of the index, made if missing.", show_default="./.quarterlight")
    ] = DEFAULT_STORE,
    model: Annotated[str, typer.Option(help="A bundled name, a checkpoint folder or a hub id.")] = "nano",
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if anything could not be indexed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one line of JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no summary, only problems.")] = False,
) -> None:
    """Index pictures, PDF pages and texts, so that `quarterlight search` finds them.

    Run it again to take up what is new, changed, moved or deleted; what has not changed is not read again.
    Hidden files are left out.

    \b
    quarterlight index ~/Pictures ~/papers
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
