"""What ``quarterlight train --dry-run`` prints: the stages of a recipe, what they cost, and the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence

from quarterlight.cli import console
from quarterlight.plan import ASSUMPTIONS, DENSE_UTILISATION, UTILISATION, StagePlan, find_device
from quarterlight.recipe import Recipe

_COLUMNS = ("samples", "batch", "steps", "rate", "tokens", "visual", "trained", "GB", "hours")


def print_plan(recipe: Recipe, stages: Sequence[StagePlan], *, devices: int | None, device: str) -> None:
    """Prints a table of the stages, what is peculiar about each, and what the numbers rest on.

    devices, device: as they were given to :func:`quarterlight.plan.plan`.
    """
    count, kind = devices or recipe.devices, find_device(device)
    title = f"{recipe.name} on {count} {device.upper()}"
    table = console.table("stage", *_COLUMNS, title=title, right=_COLUMNS)
    for stage in stages:
        whole = "" if stage.steps else " in all"
        optimizer = getattr(getattr(recipe, stage.stage, None), "optimizer", None)
        table.add_row(
            stage.stage,
            _beside(_count(stage.samples), _count(stage.paper_samples)),
            _count(stage.batch),
            "" if stage.steps is None else f"{stage.steps:,}",
            "" if optimizer is None else f"{optimizer.learning_rate:g}",
            _count(stage.tokens, whole),
            _count(stage.visual_tokens, whole),
            _count(stage.trained),
            "" if stage.memory_gb is None else f"{stage.memory_gb:.0f}" if stage.memory_gb >= 10 else "<10",
            _beside(_hours(stage.hours), _hours(stage.paper_hours)),
        )
    console.out.print(table)
    known = [stage.hours for stage in stages if stage.hours is not None]
    console.out.print(f"All stages that can be estimated: {_hours(sum(known))}.", soft_wrap=True)
    for stage in stages:
        for note in stage.notes:
            console.out.print(f"{stage.stage}: {note}", soft_wrap=True, markup=False)
    utilisation = (
        f"{kind.utilisation:.0%}, by a short measurement"
        if kind.utilisation
        else f"{UTILISATION:.1%} in contrastive training and embedding, calibrated on Table 9 of the paper, and "
        f"{DENSE_UTILISATION:.0%} in restore and at the judge, assumed"
    )
    console.out.print()
    if count != recipe.devices:
        console.out.print(
            f"The batches of the recipe are meant for {recipe.devices} devices, not {count}.", soft_wrap=True
        )
    told = any(stage.paper_samples or stage.paper_hours for stage in stages)
    for sentence in (
        "batch, tokens, visual: of one optimiser step on all devices. rate: the learning rate at its peak.",
        "GB: memory of one device, without what the allocator wastes.",
        *["In brackets: what the paper reports, on 48 A800."] * told,
        f"hours: work / ({count} x {kind.tflops:g} TFLOP/s x utilisation). Utilisation: {utilisation}.",
        "work: tower, connector and language model; forward, backward through what is trained, what is computed twice.",
        f"Assumed: {'; '.join(ASSUMPTIONS)}.",
    ):
        console.out.print(sentence, soft_wrap=True, markup=False)


def _beside(ours: str, paper: str) -> str:
    return f"{ours} ({paper})" if paper else ours


def _count(number: int | None, suffix: str = "") -> str:
    """1,234 as such, larger numbers in K, M, G with three digits.

    >>> _count(1234), _count(16_606_300), _count(3_380_124_000)
    ('1,234', '16.6M', '3.38G')
    """
    if number is None:
        return ""
    if number < 10_000:
        return f"{number:,}{suffix}"
    size, unit = next((size, unit) for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")) if number >= size)
    return f"{number / size:.3g}{unit}{suffix}"


def _hours(hours: float | None) -> str:
    """Hours and minutes.

    >>> _hours(22.95), _hours(0.3), _hours(120.2)
    ('22h57m', '18m', '120h')
    """
    if hours is None:
        return ""
    minutes = round(60 * hours)
    if minutes >= 6000:
        return f"{hours:,.0f}h"
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m"
