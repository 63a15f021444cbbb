"""``quarterlight evaluate``: how well a model retrieves, task by task, next to chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from quarterlight.cli import console
from quarterlight.cli.models import FusionOption, RerankerOption, check_rerank, open_pair
from quarterlight.data.retrieval import RetrievalDataset, find_datasets
from quarterlight.errors import DatasetError, InputError, did_you_mean
from quarterlight.evaluation.retrieval import GROUP_BY, RetrievalEvaluator, Scores, TaskResult, sample_queries
from quarterlight.manifest import environment

if TYPE_CHECKING:
    from quarterlight.models.embedder import Embedder
    from quarterlight.models.reranker import Reranker

_COLUMNS = {"P@1": "precision@1", "R@5": "hit@5", "R@10": "hit@10", "NDCG@5": "ndcg@5", "MRR": "mrr"}
_GROUP_ROWS = 15  # rows that the table shows of one field; --json has all
_PROBLEM_LINES = 20


def evaluate(
    folders: Annotated[list[Path], typer.Argument(help="Dataset folders, or folders of datasets.")],
    model: Annotated[str, typer.Option(help="Bundled model, checkpoint folder or hub id.")] = "nano",
    split: Annotated[str, typer.Option(help="Which split: val, test, test_unseen, ...")] = "test",
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, by commas: t2i,i2t.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many queries a task, a fixed random sample.")
    ] = None,
    by: Annotated[str, typer.Option(help="Fields of a query to group scores by, by commas.")] = ",".join(GROUP_BY),
    rerank: Annotated[
        int, typer.Option(min=0, help="Also score the order after a reranker saw the first so many; 0: no reranker.")
    ] = 0,
    reranker: RerankerOption = None,
    fusion: FusionOption = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, ...; default: the best.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Measure how well a model retrieves on datasets in the layout of M-BEIR.

    \b
    quarterlight evaluate data/emoji --split test --tasks t2i,it2i
    quarterlight evaluate data --model runs/my_model --json > scores.json
    quarterlight evaluate data/emoji --rerank 5

    R@k is that of M-BEIR: the share of queries with any right candidate among the first k.
    """
    check_rerank(rerank, reranker, fusion)
    datasets = [dataset for folder in folders for dataset in find_datasets(folder)]
    wanted = wanted_tasks(datasets, split, tasks.split(",") if tasks else None)
    fields = [field for field in by.split(",") if field]
    embedder, judge = _open_pair(model, reranker, device) if rerank else (_open(model, device), None)
    results: list[TaskResult] = []
    inputs: dict[str, dict[str, str]] = {}
    seen: set[str] = set()
    for dataset, names in wanted:
        with console.progress("items", quiet=json) as bar:
            evaluator = RetrievalEvaluator(
                embedder, group_by=fields, reranker=judge, rerank=rerank or 1, fusion_weight=fusion
            )
            for name in names:
                task = dataset.load(name, split)
                inputs.setdefault(str(dataset.folder), {})[name] = dataset.fingerprint(name, split)
                seen |= {field for query in task.queries for field in query.fields}
                evaluator.on_progress = _advance(bar, task.label)
                if judge is not None:
                    evaluator.on_rerank = _advance(bar, f"{task.label}, reranking")
                results.append(evaluator.evaluate(sample_queries(task, limit) if limit else task))
        if not json:
            _print(dataset, [result for result in results if result.dataset == dataset.name])
    if json:
        manifest: dict[str, Any] = {
            "model": {
                "name": embedder.name,
                "hash": embedder.model_hash,
                "dimension": embedder.dimension,
                "settings": embedder.settings.to_dict(),
            },
            "settings": {"split": split, "tasks": tasks, "limit": limit, "by": fields, "rerank": rerank},
            "inputs_sha256": inputs,
            **environment(),
        }
        if judge is not None:
            weight = judge.settings.fusion_weight if fusion is None else fusion
            manifest["settings"]["fusion_weight"] = weight
            manifest["reranker"] = {
                "name": judge.name,
                "hash": judge.model_hash,
                "settings": judge.settings.to_dict(),
            }
        console.print_json({"manifest": manifest, "results": [result.to_json() for result in results]})
    if by != ",".join(GROUP_BY):
        for field in fields:
            if field not in seen:
                raise InputError(f"No query has a field {field!r} to group by. {did_you_mean(field, seen)}")


def wanted_tasks(
    datasets: Sequence[RetrievalDataset], split: str, tasks: Sequence[str] | None
) -> list[tuple[RetrievalDataset, list[str]]]:
    """The datasets that have something to evaluate, and what; a split or task that none of them has is an error."""
    if not any(dataset.tasks(split) for dataset in datasets):
        known = {name for dataset in datasets for name in dataset.splits}
        raise DatasetError(f"No dataset has a split {split!r}. {did_you_mean(split, known)}")
    known = {name for dataset in datasets for name in dataset.tasks(split)}
    for name in tasks or ():
        if name not in known:
            raise DatasetError(f"No dataset has a task {name!r} with a split {split!r}. {did_you_mean(name, known)}")
    wanted = []
    for dataset in datasets:
        if names := [name for name in dataset.tasks(split) if tasks is None or name in tasks]:
            wanted.append((dataset, names))
        else:
            console.err.print(f"{dataset.name} has no such task with a split {split!r}: left out.", style="yellow")
    return wanted


def _open(model: str, device: str | None) -> Embedder:
    from quarterlight.models.embedder import Embedder  # seconds of import: only once the datasets are known to be there

    return Embedder(model, device=device)


def _open_pair(model: str, reranker: str | None, device: str | None) -> tuple[Embedder, Reranker]:
    return open_pair(model, reranker, device=device)


def _advance(bar: Any, label: str) -> Callable[[int, int], None]:
    line = bar.add_task(label, total=None)
    return lambda done, total: bar.update(line, completed=done, total=total)


def _print(dataset: RetrievalDataset, results: Sequence[TaskResult]) -> None:
    title = f"{dataset.name}, {results[0].split} (chance: what P@1 would be in random order)"
    names: Sequence[str] = tuple(_COLUMNS)
    if any(result.reranked is not None for result in results):
        num_reranked = max(result.num_reranked for result in results)
        title += f"\n+R: with the first {num_reranked} reranked"
        names = [column for name in _COLUMNS for column in (name, "+R")]
    numbers = ("queries", "pool", *names, "chance")
    table = console.table("task", *numbers, title=title, right=numbers)
    for result in results:
        pool = _of(result.num_scored_candidates, result.num_candidates)
        queries = _of(result.scores.num_queries, result.num_queries)
        table.add_row(result.task, queries, pool, *_cells(result.scores, result.reranked), style="bold")
        for field in dict.fromkeys(group.field for group in result.groups):
            groups = [group for group in result.groups if group.field == field]
            table.add_row(f"  by {field}", style="dim")
            for group in groups[:_GROUP_ROWS]:
                name = escape(f"    {group.value}")
                table.add_row(name, f"{group.scores.num_queries:,}", "", *_cells(group.scores, group.reranked))
            if len(groups) > _GROUP_ROWS:
                table.add_row(f"    and {len(groups) - _GROUP_ROWS} more", style="dim")
    console.out.print(table)
    console.out.print()
    problems = [(result, problem) for result in results for problem in result.problems]
    for result, problem in problems[:_PROBLEM_LINES]:
        console.err.print(f"{result.task}, {problem.id}: {problem.reason}", style="yellow", markup=False)
    if problems:
        shown = f", of which the first {_PROBLEM_LINES} are above" if len(problems) > _PROBLEM_LINES else ""
        console.err.print(f"{dataset.name}: {len(problems):,} queries and candidates could not be scored{shown}.")


def _of(scored: int, total: int) -> str:
    return f"{total:,}" if scored == total else f"{scored:,}/{total:,}"


def _cells(scores: Scores, reranked: Scores | None) -> list[str]:
    """The metrics, each followed by that after reranking if there was any, and the chance of P@1."""
    shown = [scores] if reranked is None else [scores, reranked]
    if not scores.metrics:
        return ["-"] * (len(_COLUMNS) * len(shown) + 1)
    cells = [f"{one.metrics[name]:.3f}" for name in _COLUMNS.values() for one in shown]
    return [*cells, f"{scores.chance['precision@1']:.3f}"]
