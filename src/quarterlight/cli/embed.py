"""``quarterlight embed``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from quarterlight.cli import console
from quarterlight.cli.models import QuantizationOption
from quarterlight.images import describe
from quarterlight.index import VectorPrecision

if TYPE_CHECKING:
    from quarterlight.models.quantized import Quantization
    from quarterlight.search.cluster import Cluster
    from quarterlight.search.embed import EmbedReport

RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Run on a Ray cluster: its address (auto, HOST:PORT, ray://...), or `local` for one on this machine.",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(min=1, help="With --ray: copies of the model.", show_default="one for each GPU, else for each CPU"),
]


def embed(
    inputs: Annotated[list[Path], typer.Argument(help="Folders and files as for `index`, and .jsonl lists of items.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the shards; a stopped run there is resumed.")],
    model: Annotated[str, typer.Option(help="A bundled name, a checkpoint folder or a hub id.")] = "nano",
    precision: Annotated[
        VectorPrecision | None, typer.Option(help="How vectors are kept.", show_default="float32")
    ] = None,
    items_per_shard: Annotated[
        int, typer.Option(min=1, help="Files or lines in a shard: the most work that a kill can cost a worker.")
    ] = 500,
    ray: RayOption = None,
    workers: WorkersOption = None,
    quantization: QuantizationOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if anything could not be embedded.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one line of JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no summary, only problems.")] = False,
) -> None:
    """Embed files, folders and lists of items in bulk, into Parquet shards with a row and a vector for each.

    A line of a list is {"id": "shoe-7", "text": "red shoe", "image": "7.jpg"}; text or image may be missing, image may
    be a list, its names are relative to the file. Start the same command again to resume a stopped run, or to take up
    what is new or changed. `quarterlight index --from FOLDER` puts the shards into an index, without a model.

    \b
    quarterlight embed ~/Pictures ~/papers --out embeddings
    quarterlight embed catalogue.jsonl --out embeddings --model ./my-checkpoint --precision float16
    quarterlight embed /data --out embeddings --ray local --workers 4
    quarterlight index --from embeddings
    """
    from quarterlight.index.shards import ShardFolder
    from quarterlight.search.embed import EmbedConfig, Engine, Local
    from quarterlight.search.embed import embed as run
    from quarterlight.search.encoder import identity_of

    config = EmbedConfig(items_per_shard=items_per_shard)
    cluster = open_cluster(ray, workers, model, quantization)
    engine: Engine
    if cluster is not None:
        engine, identity = cluster, cluster.identity()
    else:
        from quarterlight.models.embedder import Embedder

        embedder = Embedder(model, quantization=quantization)
        engine, identity = Local(embedder), identity_of(embedder)
    folder = ShardFolder.create(out, identity, precision=precision)
    with console.progress("items", quiet=quiet or as_json) as bar:
        task = bar.add_task("Embedding", total=None)
        report = run(
            inputs,
            folder,
            engine,
            config=config,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        about = {"out": str(out), "model": identity.name, "model_hash": identity.hash, "precision": folder.precision}
        problems = [{"path": problem.path, "reason": problem.reason} for problem in report.problems]
        console.print_json(about | asdict(report) | {"problems": problems})
    else:
        _print(report, folder.precision, out, quiet)
    if strict and report.problems:
        raise typer.Exit(1)


def open_cluster(
    ray: str | None, workers: int | None, model: str, quantization: Quantization | None = None
) -> Cluster | None:
    """The Ray cluster that a command is told to use, connected; ``None`` for none.

    Raises BadParameter for options that do nothing without one.
    """
    if ray is None:
        if workers is not None:
            raise typer.BadParameter("--workers does nothing without --ray.")
        return None
    from quarterlight.search.cluster import Cluster, embedder_opener

    return Cluster.connect(ray, embedder_opener(model, quantization), num_workers=workers)


def _print(report: EmbedReport, precision: str, out: Path, quiet: bool) -> None:
    for problem in report.problems:
        console.err.print(str(problem), style="yellow", markup=False, soft_wrap=True)
    if quiet:
        return
    before = report.num_items - report.num_embedded
    there = f", {before:,} were there already" if before else ""
    problems = f"; {len(report.problems):,} not embedded, see above and problems.jsonl" if report.problems else ""
    other = f"; {report.num_other:,} of other kinds left alone" if report.num_other else ""
    console.err.print(
        f"Items: {report.num_embedded:,} looked at{there}{problems}{other}.\n"
        f"Embeddings: {report.num_rows:,} as {precision} ({decimal(report.num_bytes)}) in {report.num_shards:,} shards "
        f"in {describe(out)} ({report.seconds:.1f} s).",
        markup=False,
        soft_wrap=True,
    )
