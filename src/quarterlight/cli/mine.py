"""``quarterlight mine``: hard negatives for the queries of datasets, found by a model among all candidates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quarterlight.cli import console
from quarterlight.cli.evaluate import wanted_tasks
from quarterlight.data.retrieval import find_datasets, with_instructions
from quarterlight.errors import InputError

if TYPE_CHECKING:
    from quarterlight.mining.negatives import MineRecipe, TaskCounts


def mine(
    data: Annotated[Path, typer.Option(help="Dataset folder, or folder of datasets.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the files; a stopped run there is resumed.")],
    model: Annotated[str, typer.Option(help="Bundled model, checkpoint folder or hub id.")] = "nano",
    split: Annotated[str, typer.Option(help="Which split.")] = "train",
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, by commas: t2i,i2t.")] = None,
    depth: Annotated[int, typer.Option(help="Ranks that are looked at.")] = 100,
    window: Annotated[tuple[int, int], typer.Option(help="First and last rank to draw from.")] = (50, 100),
    top: Annotated[bool, typer.Option("--top", help="Take the best in order; no window.")] = False,
    sample: Annotated[int, typer.Option(min=0, help="How many a query; 0 takes all.")] = 2,
    everywhere: Annotated[
        bool, typer.Option("--global", help="Search the candidates of all tasks; others' are called DATASET/TASK/ID.")
    ] = False,
    max_score: Annotated[float | None, typer.Option(help="Leave out candidates from this cosine on.")] = None,
    margin: Annotated[
        float | None, typer.Option(help="Leave out candidates from this share of the positive's cosine on.")
    ] = None,
    max_unreadable: Annotated[float, typer.Option(help="Stop above this share of unreadable pictures.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Decides what is drawn.")] = 0,
    cache: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder of the embeddings.", show_default="embeddings, in that of --out"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, ...; default: the best.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Find hard negatives: candidates that a model ranks high for a query and that are not known to be right.

    \b
    quarterlight mine --model runs/warmup --data data/emoji --out runs/mined
    quarterlight mine --data data --tasks t2i --top --depth 20 --sample 0 --out runs/retrieved
    torchrun --nproc-per-node 8 -m quarterlight mine --model runs/2b --data data --out runs/mined

    Writes DATASET.TASK.parquet with the columns qid, did, score and rank. Embeddings stay in the cache, 4 bytes a
    number, so that mining again with other settings takes only the search.
    """
    from quarterlight.mining.negatives import MineRecipe

    recipe = MineRecipe(
        depth=depth,
        window=None if top else window,
        sample=sample or None,
        pool="global" if everywhere else "local",
        max_score=max_score,
        margin=margin,
        max_unreadable=max_unreadable,
    )
    wanted = wanted_tasks(find_datasets(data), split, tasks.split(",") if tasks else None)
    loaded = [with_instructions(dataset.load(name, split)) for dataset, names in wanted for name in names]

    from quarterlight.mining.negatives import mine as run
    from quarterlight.models.embedder import Embedder
    from quarterlight.training.distributed import processes

    process = processes()  # before the model, since it chooses the GPU of this process
    embedder = Embedder(model, device=device)
    try:
        counts = run(
            embedder, loaded, out, recipe, seed=seed, cache=cache or out / "embeddings", show_progress=not json
        )
    except OSError as error:
        raise InputError(
            f"Mining cannot go on: {error.strerror or error} ({error.filename or out}). What was found is kept; mend "
            "it and start the same command again."
        ) from error
    if process.is_main_process:
        _print(counts, recipe, out, json)


def _print(counts: Sequence[TaskCounts], recipe: MineRecipe, out: Path, json: bool) -> None:
    from dataclasses import asdict

    if json:
        console.print_json({"out": str(out), "recipe": asdict(recipe), "tasks": [asdict(one) for one in counts]})
        return
    numbers = ("queries", "candidates", "mined", "without", "unreadable", "recall")
    table = console.table("task", *numbers, title=f"Mined into {out}", right=numbers)
    for one in counts:
        cells = (one.num_queries, one.num_candidates, one.num_mined, one.num_without, one.num_unreadable)
        table.add_row(f"{one.dataset}/{one.task}", *(f"{cell:,}" for cell in cells), f"{one.recall:.3f}")
    console.out.print(table)
    for one in counts:
        if one.num_short and recipe.window:
            console.err.print(
                f"{one.dataset}/{one.task}: {one.num_short:,} queries have fewer than {recipe.window[0]} candidates, "
                "of which the last ones were taken.",
                style="yellow",
            )
    if any(one.num_unreadable for one in counts):
        console.err.print(f"What cannot be read is in {out / 'unreadable.txt'}.", style="yellow", soft_wrap=True)
