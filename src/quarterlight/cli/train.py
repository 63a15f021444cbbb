"""``quarterlight train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quarterlight.cli.console import err
from quarterlight.errors import RecipeError


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file, such as recipes/nano.yaml.")],
    data: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Directory of the datasets that the recipe names.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Directory of the run; a stopped run there is resumed.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Run this stage and take those before it as they are.")] = None,
    first: Annotated[
        str | None, typer.Option("--from", help="Run from this stage on; take those before it as they are.")
    ] = None,
    last: Annotated[str | None, typer.Option("--until", help="Stop after this stage.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="path.to.key=value; may be repeated.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what each stage would cost, and run nothing.")
    ] = False,
    devices: Annotated[int | None, typer.Option(help="Devices of the plan; the recipe's without it.")] = None,
    device: Annotated[str | None, typer.Option(help="Kind of device of the plan; A800 without it.")] = None,
) -> None:
    """Train a model by a recipe. Finished stages are skipped, a stopped one goes on.

    \b
    quarterlight train recipes/nano.yaml --data ~/datasets --out runs/nano
    quarterlight train recipes/nano.yaml --data ~/datasets --out runs/try --set warmup.optimizer.num_steps=1000
    quarterlight train recipes/magic_mm_2b.yaml --dry-run --device H100 --devices 8
    torchrun --nproc-per-node 8 -m quarterlight train recipes/magic_mm_2b.yaml --data ~/datasets --out runs/2b
    """
    from quarterlight.recipe import load_recipe

    plan_of = load_recipe(recipe, overrides or ())
    if dry_run:
        from quarterlight.cli.plan import print_plan
        from quarterlight.plan import plan

        kind = device or "A800"
        print_plan(plan_of, plan(plan_of, data, devices, kind), devices=devices, device=kind)
        return
    if devices is not None or device is not None:
        raise RecipeError("--devices and --device belong to --dry-run; a run takes what its launcher gives it.")
    if data is None or out is None:
        raise RecipeError("Training needs --data, the directory of the datasets, and --out, that of the run.")
    if only and (first or last):
        raise RecipeError("--only runs one stage: it cannot be combined with --from and --until.")
    from quarterlight.pipeline import run

    folder = run(plan_of, data, out, first=only or first, last=only or last, report=err.print)
    if (folder / "modules.json").is_file():
        err.print(f"The checkpoint is {folder}: open it with Embedder({str(folder)!r}).", markup=False, soft_wrap=True)
