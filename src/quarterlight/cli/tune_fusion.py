"""``quarterlight tune-fusion``: the weight of a reranker for each task, chosen on validation splits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from quarterlight.cli import console
from quarterlight.cli.models import K, RerankerOption, open_pair
from quarterlight.data.retrieval import find_datasets
from quarterlight.errors import DatasetError, did_you_mean
from quarterlight.evaluation.fusion import METRIC, SPLIT, TunedWeight, by_direction, check_split, tune_fusion
from quarterlight.evaluation.retrieval import sample_queries
from quarterlight.manifest import environment
from quarterlight.metrics.fusion import RERANK
from quarterlight.models.checkpoint import save_fusion_weights
from quarterlight.models.reranker import reranker_folder


def tune_fusion_command(
    folders: Annotated[list[Path], typer.Argument(help="Dataset folders, or folders of datasets.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub id of the embedder.")],
    reranker: RerankerOption = None,
    split: Annotated[str, typer.Option(help=f"Only {SPLIT} will do.")] = SPLIT,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, by commas: t2i,i2t.")] = None,
    rerank: Annotated[
        int, typer.Option(min=1, metavar=K, help=f"Candidates of a query that are reranked ({RERANK} without K).")
    ] = RERANK,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many queries a task, a fixed random sample.")
    ] = None,
    metric: Annotated[str, typer.Option(help="By which weights are compared: mrr, precision@1, hit@5, ...")] = METRIC,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the weights and change nothing.")] = False,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, ...; default: the best.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Choose the weight of a reranker beside the cosine for each task, on its validation split, and save it.

    The first candidates of each query are reranked once; then weights from 0 to 1 are tried on the scores. The best of
    each task, and of each direction (t2i) the one that is best on average over its datasets, are written into the
    reranker's quarterlight.json. `evaluate` takes the weight of the task for these datasets; for all others, for the
    tasks of a suite and in `search`, that of the direction. Name all datasets at once: the next run replaces the
    weights of its directions.

    \b
    quarterlight tune-fusion ~/datasets --model runs/2b/rerank --rerank 50
    quarterlight tune-fusion ~/datasets/emoji --model runs/2b/distill --reranker runs/2b/rerank --dry-run
    """
    check_split(split)
    wanted = tasks.split(",") if tasks else None
    datasets = [dataset for folder in folders for dataset in find_datasets(folder)]
    found = [(one, name) for one in datasets for name in one.tasks(split) if wanted is None or name in wanted]
    known = {name for one in datasets for name in one.tasks(split)}
    for name in wanted or ():
        if name not in known:
            raise DatasetError(f"No dataset has a task {name!r} with a split {split!r}. {did_you_mean(name, known)}")
    if not found:
        raise DatasetError(f"None of the datasets has a split {split!r}, on which alone weights may be chosen.")
    loaded = [one.load(name, split) for one, name in found]
    folder = reranker_folder(reranker or model)
    embedder, judge = open_pair(model, reranker, device=device)
    with console.progress("queries", quiet=json) as bar:
        lines: dict[str, Any] = {}

        def advance(label: str, done: int, total: int) -> None:
            line = lines[label] if label in lines else lines.setdefault(label, bar.add_task(label, total=None))
            bar.update(line, completed=done, total=total)

        tuned = tune_fusion(
            embedder,
            judge,
            [sample_queries(task, limit) if limit else task for task in loaded],
            rerank=rerank,
            metric=metric,
            on_rerank=advance,
        )
    directions = by_direction(tuned)
    record = {
        "split": split,
        "metric": metric,
        "rerank": rerank,
        "limit": limit,
        "embedder": embedder.model_hash,
        "inputs_sha256": {f"{one.name}/{name}": one.fingerprint(name, split) for one, name in found},
        "tasks": {one.label: _plain(one) for one in tuned},
        "directions": {one.label: _plain(one) for one in directions},
        **environment(),
    }
    if not dry_run:
        save_fusion_weights(folder, {one.label: one.weight for one in (*tuned, *directions)}, record)
    if json:
        console.print_json(record)
        return
    columns = ("queries", "weight", metric, "cosine alone", "reranker alone")
    table = console.table("task", *columns, right=columns)
    for one in (*tuned, *directions):
        values = (one.scores[one.weight], one.scores[0.0], one.scores[1.0])
        label = one.label if one.dataset is not None else f"{one.label}, on average"
        table.add_row(label, f"{one.num_queries:,}", f"{one.weight:g}", *(f"{value:.3f}" for value in values))
    console.out.print(table)
    said = "Nothing was changed" if dry_run else f"Saved in {folder}"
    console.err.print(f"{said}.", markup=False, soft_wrap=True)


def _plain(one: TunedWeight) -> dict[str, Any]:
    values = asdict(one)
    return values | {"scores": {f"{weight:g}": score for weight, score in one.scores.items()}}
