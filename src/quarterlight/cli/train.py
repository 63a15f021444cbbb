"""``quarterlight train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quarterlight.cli.console import err


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file, such as recipes/nano.yaml.")],
    data: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Directory of the datasets that the recipe names.")
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Directory of the run; a stopped run there is resumed.")],
    only: Annotated[str | None, typer.Option(help="Run one stage: start, teacher, tower or contrast.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="path.to.key=value; may be repeated.")] = None,
) -> None:
    """Train a model by a recipe, on one GPU or on the CPU. Finished stages are skipped, a stopped one goes on.

    \b
    quarterlight train recipes/nano.yaml --data ~/datasets --out runs/nano
    quarterlight train recipes/nano.yaml --data ~/datasets --out runs/try --set contrast.optimizer.num_steps=1000
    """
    from quarterlight.pipeline import run
    from quarterlight.training.recipe import load_recipe

    folder = run(load_recipe(recipe, overrides or ()), data, out, only=only, report=err.print)
    if only in (None, "contrast"):
        err.print(f"The checkpoint is {folder}: open it with Embedder({str(folder)!r}).", markup=False, soft_wrap=True)
