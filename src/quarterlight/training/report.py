"""A page about a run: ``report.md`` with its stages, loss curves, validation and counts of negatives."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from quarterlight.files import replace_file

_P1 = "eval_p1_"
_MISSING = "–"
_COLOURS = ("#E69F00", "#56B4E9", "#CC79A7", "#0072B2", "#009E73", "#D55E00")  # Okabe and Ito: apart for every eye
_GREY = "#555555"
_SHARED = ("seed", "devices", "model", "mixture", "augment", "validation")  # parts of a recipe that all stages read


@dataclass(frozen=True)
class _Stage:
    """What a stage left in its folder; nothing yet, if it has no manifest."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """Empty for a stage that is not finished."""
        return _read_json(self.folder / "manifest.json")

    @cached_property
    def log(self) -> Sequence[Mapping[str, Any]]:
        """Lines of the trainer's log, in order; empty if the stage trains nothing."""
        return _read_json(self.folder / "trainer_state.json").get("log_history", [])

    @property
    def num_steps(self) -> int | None:
        return _read_json(self.folder / "trainer_state.json").get("global_step")

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the stage's recipe says of it."""
        return self.manifest.get("recipe", {}).get(self.name) or {}

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of the log's lines that have ``key``."""
        lines = [line for line in self.log if key in line]
        return [int(line["step"]) for line in lines], [float(line[key]) for line in lines]

    def last(self, key: str) -> float | None:
        return self.curve(key)[1][-1] if self.curve(key)[1] else None

    @property
    def precisions(self) -> dict[str, float]:
        """P@1 of the last validation by ``dataset/task``, without the mean."""
        lines = [line for line in self.log if f"{_P1}mean" in line]
        if not lines:
            return {}
        names = [key.removeprefix(_P1) for key in lines[-1] if key.startswith(_P1) and key != f"{_P1}mean"]
        return {"/".join(name.rsplit("_", 1)): float(lines[-1][_P1 + name]) for name in names}


def write_report(folder: Path, stages: Sequence[Path]) -> Path:
    """Writes ``folder/report.md`` and its plots ``report-*.png``, all in place of older ones; returns the page.

    stages: the folders of the recipe's stages in order, finished or not; one that is not is listed as such.  What a
        finished stage did not leave (a log, a validation) shows as a dash.
    """
    all_stages = [_Stage(one) for one in stages]
    done = [one for one in all_stages if one.manifest]
    trained = [one for one in done if one.log]
    colours = {one.name: _COLOURS[number % len(_COLOURS)] for number, one in enumerate(trained)}
    plots = {
        "loss": ("Loss by step", _plot_losses(trained, colours)),
        "validation": ("P@1 by step, mean over the validation tasks", _plot_means(trained, colours)),
        "tasks": ("P@1 of each validation task at the end of each stage", _plot_tasks(trained, colours)),
    }
    shown = {}
    for name, (caption, figure) in plots.items():
        file = folder / f"report-{name}.png"
        if figure is None:
            file.unlink(missing_ok=True)  # of a run before, with other settings
            shown[name] = ""
        else:
            replace_file(file, _png(figure))
            shown[name] = f"![{caption}]({file.name})\n"
    parts = [
        _head(done),
        _stage_table(all_stages, folder),
        shown["loss"],
        _loss_notes(done),
        _validation(done, shown),
        _mined(done),
        _taught(done),
        _judged(done, folder),
        _recipe(done),
    ]
    page = folder / "report.md"
    replace_file(page, "\n".join(part for part in parts if part))
    return page


def _head(done: Sequence[_Stage]) -> str:
    if not done:
        return "# Training run\n\nNo stage is finished yet.\n"
    last = done[-1].manifest
    environment = last.get("environment", {})
    hardware, versions = environment.get("hardware", {}), environment.get("versions", {})
    devices = ", ".join(hardware.get("gpus", [])) or f"{hardware.get('cpu_cores', '?')} cores of {hardware.get('cpu')}"
    commit = environment.get("commit")
    source = f"commit {commit[:10]}{', changed since' if environment.get('dirty') else ''}" if commit else "no commit"
    return (
        f"# {last['recipe']['name']}\n\n"
        f"Seed {last['recipe'].get('seed', _MISSING)}, {last.get('processes', 1)} process(es), {devices}. "
        f"quarterlight {versions.get('quarterlight')} ({source}), torch {versions.get('torch')}, "
        f"transformers {versions.get('transformers')}. Last stage finished {environment.get('time', _MISSING)}.\n"
    )


def _stage_table(stages: Sequence[_Stage], folder: Path) -> str:
    rows = []
    for one in stages:
        if not one.manifest:
            begun = (folder / f"{one.name}.running").exists()
            rows.append([one.name, "begun, not finished" if begun else "not run", *[""] * 6])
            continue
        losses = one.curve("loss")[1]
        rows.append(
            [
                one.name,
                _duration(one.manifest.get("seconds")),
                _number(one.num_steps, ",d"),
                f"{losses[0]:.3f} → {losses[-1]:.3f}" if losses else _MISSING,
                _number(one.last("eval_loss"), ".3f"),
                _number(one.last(f"{_P1}mean"), ".1%"),
                _number(one.last("utilisation"), ".0%"),
                _unreadable(one),
            ]
        )
    finished = [one.manifest["seconds"] for one in stages if "seconds" in one.manifest]
    total = f"All finished stages together: {_duration(sum(finished))}. " if len(finished) > 1 else ""
    columns = ["stage", "time", "steps", "loss, first → last", "held-out loss", "P@1", "utilisation", "unreadable"]
    return (
        "## Stages\n\n"
        + _table(columns, rows)
        + f"\n{total}A time counts from the last start of its stage: of one that was stopped and resumed, what came "
        "before is not in it. P@1 is the mean over the validation tasks, at the last validation; utilisation is the "
        "part of the time in which the model computed; unreadable counts pictures.\n"
    )


def _loss_notes(done: Sequence[_Stage]) -> str:
    guided = [one.name for one in done if one.settings.get("teacher_weight")]
    notes = []
    if guided:
        notes.append(
            f"The loss of {', '.join(guided)} includes the distance to the teacher, whose weight falls to zero."
        )
    if any(one.log for one in done):
        notes.append("Losses of different stages are of different kinds or batch sizes and cannot be compared.")
    return " ".join(notes) + "\n" if notes else ""


def _validation(done: Sequence[_Stage], plots: Mapping[str, str]) -> str:
    losses = "\n".join(
        _held_out_rows(one) if one.name == "rerank" else _held_out(one)
        for one in done
        if one.last("eval_loss") is not None
    )
    scored = [one for one in done if one.precisions]
    if not scored:
        return "## Validation\n\nNo stage measured P@1 on validation tasks.\n\n" + losses
    names = sorted({name for one in scored for name in one.precisions})
    rows = [[name, *(_number(one.precisions.get(name), ".1%") for one in scored)] for name in names]
    means = [f"**{one.last(f'{_P1}mean'):.1%}**" for one in scored]
    steps = [f"{one.curve(f'{_P1}mean')[0][-1]:,}" for one in scored]
    rows = [["**mean**", *means], *rows, ["after steps", *steps]]
    return (
        "## Validation\n\nP@1 at the last validation of each stage, on a fixed sample of each task's queries and "
        "candidates: good for comparing stages, not with results on whole pools.\n\n"
        + plots["validation"]
        + "\n"
        + plots["tasks"]
        + "\n"
        + _table(["task", *(one.name for one in scored)], rows)
        + "\n"
        + losses
    )


def _held_out(stage: _Stage) -> str:
    """The loss of each source of held-out conversations, at each validation."""
    steps, means = stage.curve("eval_loss")
    names = dict.fromkeys(key for line in stage.log for key in line if key.startswith("eval_loss_"))
    rows = [["**all**", *(f"**{mean:.3f}**" for mean in means)]]
    for name in names:
        value = dict(zip(*stage.curve(name), strict=True))
        label = "/".join(name.removeprefix("eval_loss_").rsplit("_", 1))
        rows.append([label, *(_number(value.get(step), ".3f") for step in steps)])
    columns = [f"held-out loss of {stage.name}", *(f"step {step:,}" for step in steps)]
    return "Nats of a labelled token of held-out conversations:\n\n" + _table(columns, rows)


def _held_out_rows(stage: _Stage) -> str:
    """The losses of a reranker on held-out queries, and how often it is right, at each validation."""
    steps, _ = stage.curve("eval_loss")
    kinds = {
        "loss of pairs": ("eval_pointwise_loss", ".3f"),
        "loss of lists": ("eval_listwise_loss", ".3f"),
        "right candidate before the wrong one": ("eval_pair_accuracy", ".1%"),
        "right number of a list": ("eval_list_accuracy", ".1%"),
    }
    rows = []
    for label, (key, form) in kinds.items():
        value = dict(zip(*stage.curve(key), strict=True))
        rows.append([label, *(_number(value.get(step), form) for step in steps)])
    columns = [f"held-out queries of {stage.name}", *(f"step {step:,}" for step in steps)]
    counts = _read_json(stage.folder / "rows.json")
    said = (
        "Of {queries:,} queries, {trained:,} are trained on ({pointwise_only:,} of them without a list, having too few "
        "negatives), {skipped:,} have no negatives, {held_out:,} are held out or ask what those do.\n"
    )
    return f"Queries with judged candidates, in pairs and in lists:\n\n{_table(columns, rows)}\n" + (
        said.format(**counts) if counts else ""
    )


def _taught(done: Sequence[_Stage]) -> str:
    """The lists of ``teach``, of which some may be shorter than they should be."""
    rows = []
    for stage in done:
        for one in _read_json(stage.folder / "lists.json") or () if stage.name == "teach" else ():
            numbers = ("num_queries", "num_pairs", "num_short", "num_without_positive")
            rows.append([f"{one['dataset']}/{one['task']}", *(f"{one[name]:,}" for name in numbers)])
    if not rows:
        return ""
    columns = ["lists of the teacher", "queries", "pairs", "short lists", "without a positive"]
    return f"Candidates that a reranker scored; a short list has fewer than `teach.depth`:\n\n{_table(columns, rows)}"


def _mined(done: Sequence[_Stage]) -> str:
    rows = []
    for one in done:
        if one.name not in ("mine", "retrieve"):
            continue
        for file in sorted(one.folder.glob("*.parquet")):
            table = pq.read_table(file, columns=["qid", "score", "rank"])
            if not len(table):
                rows.append([one.name, _task(file), "0", "0", *[_MISSING] * 3])
                continue
            queries, ranks = len(pc.unique(table["qid"])), pc.min_max(table["rank"]).as_py()
            spread = f"{ranks['min']} to {ranks['max']}"
            score = pc.mean(table["score"]).as_py()
            cells = [f"{queries:,}", f"{len(table):,}", f"{len(table) / queries:.1f}", spread, f"{score:.3f}"]
            rows.append([one.name, _task(file), *cells])
    if not rows:
        return ""
    columns = ["stage", "task", "queries", "candidates", "per query", "ranks", "mean score"]
    return "## Mined\n\nKnown positives are left out before ranks are counted.\n\n" + _table(columns, rows, words=2)


def _judged(done: Sequence[_Stage], folder: Path) -> str:
    one = next((one for one in done if one.name == "judge"), None)
    if one is None:
        return ""
    said = _read_json(one.folder / "report.json").get("tasks", {})
    rows, total = [], [0, 0, 0, 0]
    for file in sorted(one.folder.glob("*.parquet")):
        table = pq.read_table(file, columns=["relevant", "judge"])
        yes, known = pc.sum(table["relevant"]).as_py() or 0, len(table) - table["relevant"].null_count
        failed = said.get(_task(file), {}).get("failed", 0)
        counts = [yes, known - yes, len(table) - known, failed]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        judges = ", ".join(sorted(name for name in pc.unique(table["judge"]).to_pylist() if name))
        rows.append([_task(file), f"{len(table) + failed:,}", *(f"{count:,}" for count in counts), judges])
    if len(rows) > 1:
        rows.append(["**all**", f"**{sum(total):,}**", *(f"**{count:,}**" for count in total), ""])
    examples = one.folder / "report.html"
    link = f"\nExample pairs: [{one.name}/{examples.name}]({one.name}/{examples.name})\n" if examples.is_file() else ""
    columns = ["task", "pairs", "relevant", "not relevant", "undecided", "failed", "judge"]
    return "## Judged\n\n" + _table(columns, rows) + link


def _recipe(done: Sequence[_Stage]) -> str:
    """The recipe of the stage that finished last, and which stages had other settings of their own."""
    if not done:
        return ""
    recipe = done[-1].manifest["recipe"]
    other = []
    for one in done:
        theirs = one.manifest["recipe"]
        keys = [key for key in (*_SHARED, one.name) if theirs.get(key) != recipe.get(key)]
        if keys:
            other.append(f"- `{one.name}` was made with another {', '.join(keys)}: see `{one.name}/manifest.json`.")
    text = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    return (
        f"## Recipe\n\nAs resolved for `{done[-1].name}`, every default filled in.\n\n"
        + ("\n".join(other) + "\n\n" if other else "")
        + f"<details><summary>recipe</summary>\n\n```yaml\n{text}```\n\n</details>\n"
    )


def _plot_losses(stages: Sequence[_Stage], colours: Mapping[str, str]) -> Figure | None:
    """A panel for each stage that has a loss: as logged, smoothed, and on held-out data."""
    trained = [one for one in stages if one.curve("loss")[0]]
    if not trained:
        return None
    columns = min(3, len(trained))
    rows = -(-len(trained) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.4, 2.6 * rows), layout="constrained")
    for place, one in enumerate(trained, 1):
        axes = _axes(figure, (rows, columns, place), one.name)
        steps, losses = one.curve("loss")
        colour = colours[one.name]
        axes.plot(steps, losses, color=colour, alpha=0.35, linewidth=1, marker="." if len(steps) < 10 else None)
        axes.plot(steps, _smooth(losses), color=colour, linewidth=1.8)
        held_steps, held = one.curve("eval_loss")
        if held:
            axes.plot(held_steps, held, color="black", marker="o", markersize=4, linewidth=0, label="held out")
            axes.legend(frameon=False, fontsize=8)
        axes.set_xlabel("step")
        if place % columns == 1 or columns == 1:
            axes.set_ylabel("loss")
    return figure


def _plot_means(stages: Sequence[_Stage], colours: Mapping[str, str]) -> Figure | None:
    """Mean P@1 of one stage beside the other, each as wide as the next however many steps it has."""
    scored = [one for one in stages if one.precisions]
    if not scored:
        return None
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = _axes(figure, (1, 1, 1), "")
    lengths = []
    for place, one in enumerate(scored):
        steps, means = one.curve(f"{_P1}mean")
        colour = colours[one.name]
        lengths.append(max(one.num_steps or 0, steps[-1]))
        axes.axvspan(place, place + 1, color=colour, alpha=0.07, linewidth=0)
        where = [place + 0.05 + 0.9 * step / lengths[-1] for step in steps]
        axes.plot(where, [100 * mean for mean in means], color=colour, marker="o")
        axes.annotate(
            f"{100 * means[-1]:.1f}",
            (where[-1], 100 * means[-1]),
            xytext=(4, 7),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=colour,
        )
    labels = [f"{one.name}\n{length:,} steps" for one, length in zip(scored, lengths, strict=True)]
    axes.set_xticks([place + 0.5 for place in range(len(scored))], labels)
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(0, len(scored))
    axes.margins(y=0.2)
    axes.set_ylabel("mean P@1, %")
    return figure


def _plot_tasks(stages: Sequence[_Stage], colours: Mapping[str, str]) -> Figure | None:
    """P@1 of each task, one dot for each stage; tasks in the order of their last value."""
    scored = [one for one in stages if one.precisions]
    if not scored:
        return None
    final = {name: value for one in scored for name, value in one.precisions.items()}
    names = sorted(final, key=final.__getitem__)
    figure = Figure(figsize=(9, 1.2 + 0.25 * len(names)), layout="constrained")
    axes = _axes(figure, (1, 1, 1), "")
    for one in scored:
        values = [100 * one.precisions.get(name, math.nan) for name in names]
        last = one is scored[-1]
        colour = colours[one.name]
        axes.plot(
            values,
            range(len(names)),
            color=colour,
            marker="o",
            markersize=7 if last else 5,
            markerfacecolor=colour if last else "white",
            linewidth=0,
            label=one.name,
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(-0.8, len(names) - 0.2)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("P@1, %")
    axes.legend(frameon=False, fontsize=8, ncols=len(scored), loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _axes(figure: Figure, place: tuple[int, int, int], title: str) -> Axes:
    axes = figure.add_subplot(*place)
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_GREY)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return axes


def _smooth(values: Sequence[float], share: float = 0.1) -> list[float]:
    """The mean of each value's neighbours, over a tenth of the curve in all."""
    reach = int(len(values) * share / 2)
    windows = (values[max(0, place - reach) : place + reach + 1] for place in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _unreadable(stage: _Stage) -> str:
    file = stage.folder / "unreadable.txt"
    return f"{len(file.read_text(encoding='utf-8').splitlines()):,}" if file.is_file() else _MISSING


def _task(file: Path) -> str:
    """``emoji.t2i.parquet`` -> ``emoji/t2i``."""
    return "/".join(file.stem.rsplit(".", 1))


def _number(value: float | None, form: str) -> str:
    return _MISSING if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    """``42 s``, ``3.5 min`` or ``2.1 h``."""
    if seconds is None:
        return _MISSING
    steps: tuple[tuple[float, Callable[[float], str]], ...] = (
        (90, lambda s: f"{s:.0f} s"),
        (5400, lambda s: f"{s / 60:.1f} min"),
        (math.inf, lambda s: f"{s / 3600:.1f} h"),
    )
    return next(say(seconds) for limit, say in steps if seconds < limit)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A Markdown table: the first columns of words, the others of numbers."""
    rule = [*["---"] * words, *["---:"] * (len(columns) - words)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (columns, rule, *rows))
