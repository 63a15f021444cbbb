"""``quarterlight judge``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from quarterlight.cli import console
from quarterlight.errors import DatasetError, RecipeError


def judge(
    data: Annotated[Path, typer.Option(help="A retrieval dataset, or a directory of several.")],
    retrieved: Annotated[Path, typer.Option(help="What `quarterlight mine` wrote: DATASET.TASK.parquet.")],
    out: Annotated[Path, typer.Option(help="Directory of the verdicts; a stopped run there is resumed.")],
    backend: Annotated[
        str, typer.Option(help="labels (of the data), transformers (a model here) or endpoint (a server).")
    ] = "labels",
    model: Annotated[str | None, typer.Option(help="Folder or hub id; for a server the name it knows.")] = None,
    url: Annotated[str | None, typer.Option(help="Of the server, such as http://localhost:8000/v1.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Only this dataset/task; may be repeated. Default: all that was retrieved.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split that was retrieved.")] = "train",
    instruction: Annotated[
        list[str] | None, typer.Option(help="dataset/task=What the judge is to determine; may be repeated.")
    ] = None,
    exempt: Annotated[
        list[str] | None, typer.Option(help="dataset/task whose candidates all count as irrelevant; may be repeated.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to the server under way at once.")] = 32,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request has failed.")] = 120.0,
    retries: Annotated[int, typer.Option(min=0, help="How often a failed request is sent again.")] = 5,
    tokens_per_batch: Annotated[int, typer.Option(min=1, help="Tokens that go through a model here at once.")] = 16_384,
    max_failed: Annotated[float, typer.Option(help="Share of pairs that may stay without an answer.")] = 0.01,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as one line of JSON.")] = False,
) -> None:
    """Ask a judge whether what was retrieved for a query is relevant to it. A stopped run goes on where it was.

    The labels of the data are a judge for what was retrieved with positives hidden; to find what labels missed takes a
    model. Writes DATASET.TASK.parquet with the verdicts, report.html with counts and example pairs, and report.json.
    The key of a server is read from OPENAI_API_KEY.

    \b
    quarterlight mine --data ~/datasets --top --depth 20 --sample 0 --out retrieved
    quarterlight judge --data ~/datasets --retrieved retrieved --out judged --backend endpoint \\
        --model Qwen/Qwen3-VL-8B-Instruct --url http://localhost:8000/v1 --concurrency 128
    quarterlight judge --data ~/datasets --retrieved retrieved --out judged --backend transformers \\
        --model Qwen/Qwen3-VL-8B-Instruct
    """
    from quarterlight.data.retrieval import find_datasets
    from quarterlight.mining.judge import JudgeRecipe
    from quarterlight.mining.judge import judge as run

    recipe = JudgeRecipe(
        backend=backend,
        model=model,
        url=url,
        concurrency=concurrency,
        timeout_s=timeout,
        retries=retries,
        tokens_per_batch=tokens_per_batch,
        instructions=dict(_pair(one) for one in instruction or ()),
        exempt=tuple(exempt or ()),
        max_failed=max_failed,
    )
    found = {f"{one.name}/{name}": (one, name) for one in find_datasets(data) for name in one.tasks(split)}
    chosen = task or [label for label in found if (retrieved / f"{label.replace('/', '.')}.parquet").is_file()]
    for label in chosen:
        if label not in found:
            raise DatasetError(f"{data} has no {label!r} with a split {split!r}; it has {', '.join(sorted(found))}.")
    if not chosen:
        raise DatasetError(
            f"{retrieved} has no DATASET.TASK.parquet of any task in {data}: run quarterlight mine first."
        )
    tasks = [one.load(name, split) for one, name in (found[label] for label in chosen)]
    key = os.environ.get("OPENAI_API_KEY")
    counts = run(tasks, retrieved, out, recipe, api_key=key, show_progress=console.err.is_terminal)
    if as_json:
        console.print_json({label: vars(one) for label, one in counts.items()})
    else:
        columns = ("pairs", "relevant", "not relevant", "undecided", "failed")
        table = console.table("task", *columns, right=columns)
        for label, one in counts.items():
            table.add_row(label, *(f"{value:,}" for value in (one.pairs, one.yes, one.no, one.undecided, one.failed)))
        console.out.print(table)
    if backend == "labels" and not any(one.yes for one in counts.values()):
        console.err.print(
            "The labels call nothing of this relevant: what they do, `quarterlight mine` has left out. To find what "
            "they missed, ask a model, with --backend transformers or endpoint.",
            style="yellow",
            soft_wrap=True,
        )
    console.err.print(f"Wrote {out / 'report.html'}.", markup=False, soft_wrap=True)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--instruction takes dataset/task=words, got {text!r}.")
    return name, value
