"""``quarterlight index``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from quarterlight.cli import console
from quarterlight.cli.embed import RayOption, WorkersOption, open_cluster
from quarterlight.cli.models import QuantizationOption
from quarterlight.images import describe
from quarterlight.index import IndexStore, Precision, VectorPrecision
from quarterlight.index.store import models_of, precision_of
from quarterlight.search.encoder import Encoder, identity_of
from quarterlight.search.ingest import IngestReport, TokenReport, ingest, knows
from quarterlight.search.walk import Problem, is_gone, walk

if TYPE_CHECKING:
    from quarterlight.search.load import LoadReport

DEFAULT_STORE = Path(".quarterlight")
"""Where `index` writes and `search` looks, in the current folder."""


def index(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Folders, pictures, PDFs, Markdown and text files.", show_default=False)
    ] = None,
    store: Annotated[
        Path, typer.Option(help="Folder of the index, made if missing.", show_default="./.quarterlight")
    ] = DEFAULT_STORE,
    model: Annotated[str, typer.Option(help="A bundled name, a checkpoint folder or a hub id.")] = "nano",
    shards: Annotated[
        Path | None, typer.Option("--from", help="Take up what `quarterlight embed` wrote there; needs no model.")
    ] = None,
    precision: Annotated[
        VectorPrecision | None,
        typer.Option(help="How a new index keeps vectors.", show_default="float32, or that of the index or of --from"),
    ] = None,
    ray: RayOption = None,
    workers: WorkersOption = None,
    quantization: QuantizationOption = None,
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

    Run it again to take up what is new, changed, moved or deleted; what has not changed is not read again. The name of
    a file or folder that is gone takes it out of the index. Hidden files are left out, and texts larger than 16 MB.
    Once visual tokens are stored, every later run keeps them up to date.

    Files that cannot be read are listed. Exit code 1: one of them was named here, or nothing at all is indexed.

    \b
    quarterlight index ~/Pictures ~/papers
    quarterlight index ~/Pictures --store-visual-tokens int8
    quarterlight index . --store /tmp/index --model ./my-checkpoint --strict
    quarterlight index /data --precision int8 --ray auto --workers 8
    quarterlight index --from embeddings
    """
    if shards is not None:
        given = {
            "PATHS": paths,
            "--ray": ray,
            "--store-visual-tokens": store_visual_tokens,
            "--quantization": quantization,
        }
        for name, value in given.items():
            if value:
                raise typer.BadParameter(
                    f"{name} and --from do not go together: --from only takes up what is embedded."
                )
        _load(shards, store, precision, strict=strict, as_json=as_json, quiet=quiet)
        return
    if not paths:
        raise typer.BadParameter("Nothing to index: name files or folders, or shards with --from.")
    if ray is not None and store_visual_tokens is not None:
        raise typer.BadParameter("--ray and --store-visual-tokens do not go together: index without --ray for these.")
    _check_paths(paths, store)
    cluster = open_cluster(ray, workers, model, quantization)
    embedder: Encoder | None = None
    if cluster is not None:
        identity = cluster.identity()
    else:
        from quarterlight.models.embedder import Embedder

        embedder = Embedder(model, quantization=quantization)
        identity = identity_of(embedder)
    target = IndexStore.create(store, identity, precision=precision)
    with console.progress("files", quiet=quiet or as_json) as bar:
        task = bar.add_task("Indexing", total=None)
        report = ingest(
            paths,
            target,
            embedder,
            visual_tokens=store_visual_tokens,
            engine=cluster,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        console.print_json(_about(target) | asdict(report) | {"problems": _records(report.problems)})
    else:
        _print(report, target, quiet)
        if not (report.num_rows or report.deleted or report.problems or report.stopped):
            console.err.print("There was nothing to index.")
    if report.stopped or (strict and report.problems) or _failed(paths, report, target):
        raise typer.Exit(1)


def _load(
    shards: Path, store: Path, precision: VectorPrecision | None, *, strict: bool, as_json: bool, quiet: bool
) -> None:
    from quarterlight.index.shards import ShardFolder
    from quarterlight.search.load import check_can_load, load

    folder = ShardFolder.open(shards)
    kept = precision or precision_of(store, folder.model) or folder.precision
    target = IndexStore.create(store, folder.model, precision=kept)
    check_can_load(folder, target)
    with console.progress("rows", quiet=quiet or as_json) as bar:
        task = bar.add_task("Loading", total=None)
        report = load(folder, target, on_progress=lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        about = _about(target) | {"shards": str(shards)}
        console.print_json(about | asdict(report) | {"problems": _records(report.problems)})
    else:
        _print_problems(report.problems)
        if not quiet:
            gone = f"; {report.num_deleted:,} items are no longer in their lists" if report.num_deleted else ""
            console.err.print(
                f"Loaded: {report.num_loaded:,} rows of {report.num_shards:,} shards{gone}.\n{_index(target, report)}",
                markup=False,
                soft_wrap=True,
            )
    if strict and report.problems:
        raise typer.Exit(1)


def _check_paths(paths: Sequence[Path], store: Path) -> None:
    """Raises InputError for a path that is neither there nor in an index, before a model is loaded."""
    for path in paths:
        if is_gone(path) and not any(knows(IndexStore.open(store, model), path) for model in models_of(store)):
            walk([path])  # raises it


def _failed(paths: Sequence[Path], report: IngestReport, store: IndexStore) -> bool:
    """Whether what was asked for was not done: nothing is indexed, or not what was named itself.

    What lies in a folder that was named counts with ``--strict`` only.
    """
    if not report.num_rows and not report.deleted:
        return True
    troubled = {problem.path for problem in report.problems}
    named = [path for path in paths if os.path.abspath(path) in troubled]  # noqa: PTH100 keeps links
    return any(path.is_dir() or not store.count(within=path) for path in named)


def _about(store: IndexStore) -> dict[str, Any]:
    return {
        "store": str(store.folder),
        "model": store.model.name,
        "model_hash": store.model.hash,
        "precision": store.precision,
        "num_bytes": store.size_in_bytes(),
    }


def _records(problems: Sequence[Problem]) -> list[dict[str, str]]:
    return [{"path": problem.path, "reason": problem.reason} for problem in problems]


def _print_problems(problems: Sequence[Problem]) -> None:
    for problem in problems:
        console.err.print(str(problem), style="yellow", markup=False, soft_wrap=True)


def _index(store: IndexStore, report: IngestReport | LoadReport) -> str:
    return (
        f"Index: {report.num_rows:,} pictures, pages and sections in {describe(store.folder)}, vectors as "
        f"{store.precision} {decimal(store.size_in_bytes())} ({report.seconds:.1f} s)."
    )


def _print(report: IngestReport, store: IndexStore, quiet: bool) -> None:
    _print_problems(report.problems)
    if report.stopped:
        console.err.print(f"Stopped: {report.stopped}", style="red", markup=False, soft_wrap=True)
    if quiet:
        return
    names = ("new", "changed", "moved", "copied", "unchanged", "deleted")
    counts = ", ".join(f"{getattr(report, name):,} {name}" for name in names if getattr(report, name))
    problems = f"; {len(report.problems):,} not indexed, see above" if report.problems else ""
    other = f"; {report.num_other:,} of other kinds left alone" if report.num_other else ""
    console.err.print(
        f"Files: {counts or 'none'}{problems}{other}.\n{_index(store, report)}",
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
