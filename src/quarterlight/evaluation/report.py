"""The report of a suite: its averages in the layout of the paper, published rows beside ours, every task, what was left
out, and what made these numbers.

Scores are percent, as the papers print them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from quarterlight.evaluation.benchmark import BY_PICTURE, num_asked
from quarterlight.evaluation.page import Block, Heading, Paragraph, Plot, Points, Table, svg, to_html, to_markdown
from quarterlight.evaluation.reference import Reference, per_dataset, references
from quarterlight.evaluation.suites import Suite
from quarterlight.files import replace_file

_MISSING = "–"
_COLOURS = {"ours": "#0072B2", "reranked": "#D55E00", "published": "#999999", "chance": "#222222"}
_PROBLEMS = 10  # of a task that the page names; the record has more

_TIES = {
    "expected": "the mean over all orders of what is tied",
    "first": "the candidate that the data lists first wins, as in the official argmax: a tie with a positive that the "
    "data lists first counts as right (optimistic)",
    "strict": "a tie is wrong: only what scores strictly higher counts",
}


def write_report(folder: Path, suite: Suite, record: Mapping[str, Any]) -> Path:
    """Writes ``report.md``, ``report.html`` and ``plots/*.svg`` from a record; returns the first.

    record: what ``results.json`` holds: that of :class:`quarterlight.evaluation.benchmark.SuiteRecord`, with ``model``,
        ``reranker``, ``settings`` and ``environment`` as far as they are known.
    """
    blocks = report_blocks(suite, record)
    for block in blocks:
        if isinstance(block, Plot):
            replace_file(folder / "plots" / f"{block.name}.svg", block.svg)
    replace_file(folder / "report.html", to_html(_title(suite, record), blocks))
    replace_file(folder / "report.md", to_markdown(blocks))
    return folder / "report.md"


def report_blocks(suite: Suite, record: Mapping[str, Any]) -> list[Block]:
    """The report as blocks of a page."""
    blocks: list[Block] = [Heading(_title(suite, record), 1), Paragraph(_made_by(record))]
    if record["settings"].get("limit"):
        limit = record["settings"]["limit"]
        blocks.append(
            Paragraph(
                f"At most {limit:,} queries of each task were asked: these numbers are not those of the benchmark."
            )
        )
    blocks += [Heading("Averages"), averages_table(suite, record)]
    blocks += [Paragraph(_counted(record)), *_averages_plot(suite, record)]
    blocks += [Heading("Tasks"), tasks_table(record), *_notes(record), *_tasks_plot(record)]
    blocks += _published_tasks(suite, record)
    blocks += _left_out(record)
    blocks += _made_with(record)
    return blocks


def averages_table(suite: Suite, record: Mapping[str, Any]) -> Table:
    """Our averages below the published ones, which have our lead over them in brackets."""
    ours, reranked = _scores(record, "score"), _scores(record, "reranked")
    best = reranked or ours
    rows = references(suite.reference_table) if suite.reference_table else []
    columns = _columns(suite, rows)
    table = [
        [row.label, row.block, *(_beside(row.scores.get(name), best.get(name)) for name in columns)] for row in rows
    ]
    own = [[_name(record), "ours", *(percent(ours.get(name)) for name in columns)]]
    if reranked:
        own.append([f"{_name(record)}, reranked", "ours", *(percent(reranked.get(name)) for name in columns)])
    return Table(
        columns=["model", "", *columns],
        rows=table + own,
        left=2,
        ours=frozenset(range(len(table), len(table) + len(own))),
    )


def tasks_table(record: Mapping[str, Any]) -> Table:
    """A row for each task that was run or should have been."""
    with_reranker = any(one["reranked"] is not None for one in record["tasks"])
    rows = []
    for one in record["tasks"]:
        other = [percent(one["expected"]), percent(one["trec_eval"])]
        rows.append(
            [
                one["name"],
                one["group"] + (f", {one['in_distribution']}" if one["in_distribution"] else ""),
                one["metric"],
                _of(one["num_scored"], num_asked(one)),
                _of(one["num_scored_candidates"], one["num_candidates"]),
                percent(one["score"]),
                *([percent(one["reranked"])] if with_reranker else []),
                *other,
                percent(one["chance"].get(one["metric"])),
                f"{one['num_tied']:,}",
            ]
        )
    after = ["reranked"] if with_reranker else []
    for one in record["not_run"]:
        rows.append([one["name"], "not run", *[_MISSING] * (8 + len(after))])
    return Table(
        columns=[
            "task",
            "group",
            "metric",
            "queries scored",
            "candidates",
            "score",
            *after,
            "expected",
            "trec_eval",
            "chance",
            "tied queries",
        ],
        rows=rows,
        left=3,
    )


def percent(value: float | None) -> str:
    """A score in [0, 1] as percent with one decimal; a dash for none."""
    return _MISSING if value is None else f"{100 * value:.1f}"


def _title(suite: Suite, record: Mapping[str, Any]) -> str:
    return f"{suite.title}: {_name(record)}"


def _name(record: Mapping[str, Any]) -> str:
    return str(record["model"].get("name", "a model"))


def _made_by(record: Mapping[str, Any]) -> str:
    model, environment = record["model"], record.get("environment", {})
    reranker, settings = record.get("reranker"), record["settings"]
    said = [f"Model {_name(record)}, weights and settings {model.get('hash', _MISSING)}"]
    if reranker:
        said.append(
            f"reranker {reranker.get('name')}, {reranker.get('hash', _MISSING)}, of the first {settings.get('rerank')} "
            f"candidates, {_weights(record)} beside the cosine"
        )
    versions, commit = environment.get("versions", {}), environment.get("commit")
    source = f"commit {commit}{', changed since' if environment.get('dirty') else ''}" if commit else "no commit"
    said.append(f"quarterlight {versions.get('quarterlight', _MISSING)} ({source})")
    said.append(f"torch {versions.get('torch', _MISSING)}, transformers {versions.get('transformers', _MISSING)}")
    return "; ".join([*said, str(environment.get("time", "no date"))]) + ". Scores are percent."


def _weights(record: Mapping[str, Any]) -> str:
    """What the score of the reranker counted, in words; older records have one weight among their settings."""
    used = sorted({one["fusion_weight"] for one in record["tasks"] if one.get("fusion_weight") is not None})
    if len(used) > 1:
        return f"weights from {used[0]:g} to {used[-1]:g}, by task,"
    return f"weight {used[0]:g}" if used else f"weight {record['settings'].get('fusion_weight')}"


def _scores(record: Mapping[str, Any], what: str) -> dict[str, float]:
    """Tasks and averages by name, as far as there is a score."""
    return {one["name"]: one[what] for one in (*record["tasks"], *record["averages"]) if one.get(what) is not None}


def _columns(suite: Suite, rows: Sequence[Reference]) -> list[str]:
    """What the published table has, in the order of the suite; without one, the averages."""
    averages = [one.name for one in suite.averages]
    if not rows:
        return averages
    published = {name for row in rows for name in row.scores}
    tasks = [task.name for task in suite.tasks if task.name in published]
    return tasks + [name for name in averages if name in published or not tasks]


def _beside(theirs: float | None, ours: float | None) -> str:
    if theirs is None:
        return _MISSING
    return f"{theirs:.1f}" if ours is None else f"{theirs:.1f} ({100 * ours - theirs:+.1f})"


def _of(scored: int, total: int) -> str:
    return f"{scored:,} of {total:,}"


def _counted(record: Mapping[str, Any]) -> str:
    """How much of the benchmark the averages are over."""
    scored, total = sum(one["num_scored"] for one in record["tasks"]), sum(map(num_asked, record["tasks"]))
    lines = [f"{_of(scored, total)} queries were scored, in {len(record['tasks'])} tasks."]
    left_out = sum(one["num_left_out"] for one in record["tasks"])
    if left_out:
        lines.append(f"{left_out:,} rows of the files could not be used.")
    missing = [one for one in record["averages"] if one["num_missing"]]
    if missing:
        names = ", ".join(f"{one['name']} ({one['num_missing']} of {one['num_tasks']} missing)" for one in missing)
        lines.append(f"No average is given over a part of its tasks: {names}.")
    return " ".join(lines)


def _notes(record: Mapping[str, Any]) -> list[Block]:
    """Which reading of the official rule was used, and the others."""
    items = [
        f"Ties, of {', '.join(one['name'] for one in record['tasks'] if one['ties'] == ties)}: {rule}."
        for ties, rule in _TIES.items()
        if any(one["ties"] == ties for one in record["tasks"])
    ]
    items.append(
        "The column “expected” has ties in all orders instead; “trec_eval” is the same metric by trec_eval's own code, "
        "which breaks ties by id; “tied queries” counts those of which a positive ties with something that is none."
    )
    for one in record["tasks"]:
        for reading, value in one["readings"].items():
            if reading == BY_PICTURE:
                items.append(
                    f"{one['name']}: the official parser takes candidates that share a picture for one, whatever their "
                    f"text; so read the score is {percent(value['score'])}. The table has the score without this fault."
                )
    return [Points(items)]


def _published_tasks(suite: Suite, record: Mapping[str, Any]) -> list[Block]:
    """Scores of other models task by task, where they are published."""
    releases = dict.fromkeys(row.source for row in per_dataset(suite.name))
    ours = _scores(record, "score")
    blocks: list[Block] = []
    for release in releases:
        rows = [row for row in per_dataset(suite.name) if row.source == release]
        tasks = [
            task.name for task in suite.tasks if task.name in ours and any(task.name in row.scores for row in rows)
        ]
        if tasks:
            blocks.append(Heading(f"{release}, task by task", 3))
            cells = [
                [name, percent(ours[name]), *(_beside(row.scores.get(name), ours[name]) for row in rows)]
                for name in tasks
            ]
            blocks.append(Table(columns=["task", _name(record), *(row.label for row in rows)], rows=cells))
    return [Heading("Published scores by task"), *blocks] if blocks else []


def _left_out(record: Mapping[str, Any]) -> list[Block]:
    items = [f"{one['name']} was not run: {one['reason']}" for one in record["not_run"]]
    for one in record["tasks"]:
        items += [f"{one['name']}, {problem['id']}: {problem['reason']}" for problem in one["problems"][:_PROBLEMS]]
        if one["num_problems"] > _PROBLEMS:
            items.append(f"{one['name']}: and {one['num_problems'] - _PROBLEMS:,} more")
    if not items:
        return [Heading("What was left out"), Paragraph("Nothing.")]
    return [Heading("What was left out"), Points(items)]


def _made_with(record: Mapping[str, Any]) -> list[Block]:
    """What a number depends on, task by task."""
    with_weights = any(one.get("fusion_weight") is not None for one in record["tasks"])
    rows = [
        [
            one["name"],
            one["hub_id"] or _MISSING,
            _revision(one),
            one["split"],
            ", ".join(map(str, one["max_tiles"])) or _MISSING,
            "; ".join(one["instructions"]["query"]) or "the model's own",
            "; ".join(one["instructions"]["document"]) or "the model's own",
            *([_MISSING if one.get("fusion_weight") is None else f"{one['fusion_weight']:g}"] if with_weights else []),
        ]
        for one in record["tasks"]
    ]
    columns = ["task", "data", "revision", "split", "tiles", "query instruction", "candidate instruction"]
    columns += ["weight of the reranker"] if with_weights else []
    return [Heading("Data, tiles and instructions"), Table(columns=columns, rows=rows, left=len(columns))]


def _revision(one: Mapping[str, Any]) -> str:
    """The commit of a task's data, and of its pictures; what the suite pins to none may change under its name."""
    said = one["revision"] or f"unknown; rows {one['rows_sha256'][:12]}"
    if pictures := one.get("pictures_revision"):
        said += f"; pictures {pictures}"
    return said if one.get("pinned_revision") or not one["hub_id"] else f"{said} (unpinned)"


def _averages_plot(suite: Suite, record: Mapping[str, Any]) -> list[Block]:
    """Our averages as bars, the published ones as marks."""
    ours, reranked = _scores(record, "score"), _scores(record, "reranked")
    names = [one["name"] for one in record["averages"] if one["name"] in ours]
    if not names:
        return []
    figure = Figure(figsize=(max(5.0, 1.2 * len(names)), 3.2))
    axes = figure.subplots()
    for offset, scores, label in ((-0.2, ours, "ours"), (0.2, reranked, "reranked")):
        if scores:
            heights = [100 * scores.get(name, 0.0) for name in names]
            places = [place + (offset if reranked else 0) for place in range(len(names))]
            axes.bar(places, heights, width=0.36 if reranked else 0.6, color=_COLOURS[label], label=label)
    for number, row in enumerate(references(suite.reference_table) if suite.reference_table else []):
        marks = [(place, row.scores[name]) for place, name in enumerate(names) if name in row.scores]
        axes.plot(
            [place for place, _ in marks],
            [score for _, score in marks],
            "_",
            color=_COLOURS["published"],
            markersize=16,
            label=None if number else "published",
        )
    _finish(axes, names)
    return [Plot("averages", "Averages of the suite; a grey mark is a published row", svg(figure))]


def _tasks_plot(record: Mapping[str, Any]) -> list[Block]:
    """The score of every task, and what chance would reach."""
    tasks = [one for one in record["tasks"] if one["score"] is not None]
    if not tasks:
        return []
    figure = Figure(figsize=(max(5.0, 0.36 * len(tasks) + 1), 3.2))
    axes = figure.subplots()
    places = range(len(tasks))
    axes.bar(places, [100 * one["score"] for one in tasks], color=_COLOURS["ours"], label="ours")
    if any(one["reranked"] is not None for one in tasks):
        after = [100 * (one["reranked"] or 0.0) for one in tasks]
        axes.plot(places, after, "D", color=_COLOURS["reranked"], markersize=4, label="reranked")
    chance = [100 * one["chance"].get(one["metric"], 0.0) for one in tasks]
    axes.plot(places, chance, "_", color=_COLOURS["chance"], markersize=8, label="chance")
    _finish(axes, [one["name"] for one in tasks])
    return [Plot("tasks", "Score of each task, and what candidates in random order would get", svg(figure))]


def _finish(axes: Any, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 6 else 0, fontsize=8)
    axes.set_ylim(0, 100)
    axes.set_ylabel("percent")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
