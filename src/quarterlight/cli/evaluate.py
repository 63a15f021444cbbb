"""``quarterlight evaluate``: how well a model retrieves, task by task, next to chance and to what is published."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from quarterlight.cli import console
from quarterlight.cli.models import FusionOption, K, QuantizationOption, RerankerOption, check_rerank, open_pair
from quarterlight.data.retrieval import RetrievalDataset, find_datasets
from quarterlight.errors import DatasetError, InputError, did_you_mean
from quarterlight.evaluation.retrieval import GROUP_BY, RetrievalEvaluator, Scores, TaskResult, sample_queries
from quarterlight.files import replace_file
from quarterlight.manifest import environment
from quarterlight.metrics.fusion import RERANK

if TYPE_CHECKING:
    from quarterlight.evaluation.suites import Suite
    from quarterlight.models.embedder import Embedder
    from quarterlight.models.quantized import Quantization
    from quarterlight.models.reranker import Reranker

_COLUMNS = {"P@1": "precision@1", "R@5": "hit@5", "R@10": "hit@10", "NDCG@5": "ndcg@5", "MRR": "mrr"}
_GROUP_ROWS = 15  # rows that the table shows of one field; --json has all
_PROBLEM_LINES = 20


def evaluate(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Dataset folders, or folders of datasets; without --suite.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="A benchmark: mmeb, mmeb-v2-image, visdoc, crossmodal, mbeir-local, mbeir-global, zeroshot, mini."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the datasets.", show_default="for a suite, what the Hugging Face hub has"),
    ] = None,
    model: Annotated[str, typer.Option(help="Bundled model, checkpoint folder or hub id.")] = "nano",
    split: Annotated[
        str | None, typer.Option(help="Which split: val, test, test_unseen, ...", show_default="test")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks (of a suite: or groups), by commas.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many queries a task, a fixed random sample.")
    ] = None,
    by: Annotated[str, typer.Option(help="Fields of a query to group scores by, by commas.")] = ",".join(GROUP_BY),
    rerank: Annotated[
        int,
        typer.Option(
            min=0, metavar=K, help=f"Also score the order after a reranker saw the first so many ({RERANK} without K)."
        ),
    ] = 0,
    reranker: RerankerOption = None,
    fusion: FusionOption = None,
    quantization: QuantizationOption = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder of a suite's results.", show_default="evaluations/SUITE.MODEL.HASH"),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Folder of a suite's embeddings.", show_default="in the hub's cache of assets"
        ),
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out tasks of a suite whose data cannot be read.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Compare the results.json of two runs of a suite; do nothing else.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws of --compare.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, ...; default: the best.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Measure how well a model retrieves: on a benchmark, or on datasets in the layout of M-BEIR.

    \b
    quarterlight evaluate data/emoji --split test --tasks t2i,it2i
    quarterlight evaluate data --model runs/my_model --json > scores.json
    quarterlight evaluate data/emoji --rerank
    quarterlight evaluate --suite mmeb --model runs/my_model --rerank 5 --out runs/mmeb
    torchrun --nproc-per-node 8 -m quarterlight evaluate --suite visdoc --model runs/my_model --out runs/visdoc
    quarterlight evaluate --compare runs/a/results.json runs/b/results.json

    R@k of datasets is that of M-BEIR: the share of queries with any right candidate among the first k. A suite is
    scored as its official evaluator does; embeddings are kept, so that a stopped run goes on and the next is quick.
    """
    if compare is not None:
        _compare(compare, seed, json)
        return
    check_rerank(rerank, reranker, fusion)
    names = tasks.split(",") if tasks else None
    if suite is not None:
        for option, value in (("dataset folders", folders), ("--split", split), ("--by", by != ",".join(GROUP_BY))):
            if value:
                raise typer.BadParameter(f"--suite does not go with {option}: a suite says what it is made of.")
        run_suite_command(
            suite,
            names,
            data,
            model=model,
            reranker=reranker,
            rerank=rerank,
            fusion=fusion,
            limit=limit,
            out=out,
            cache=cache,
            skip_missing=skip_missing,
            device=device,
            quantization=quantization,
            json=json,
        )
        return
    for option, given in (("--out", out), ("--cache", cache), ("--skip-missing", skip_missing)):
        if given:
            raise typer.BadParameter(f"{option} does nothing without --suite.")
    folders = [*(folders or []), *([data] if data else [])]
    if not folders:
        raise typer.BadParameter("Name a dataset folder, or a benchmark with --suite.")
    _evaluate_folders(
        folders,
        model=model,
        split=split or "test",
        tasks=tasks,
        limit=limit,
        by=by,
        rerank=rerank,
        reranker=reranker,
        fusion=fusion,
        device=device,
        quantization=quantization,
        json=json,
    )


def _evaluate_folders(
    folders: Sequence[Path],
    *,
    model: str,
    split: str,
    tasks: str | None,
    limit: int | None,
    by: str,
    rerank: int,
    reranker: str | None,
    fusion: float | None,
    device: str | None,
    quantization: Quantization | None,
    json: bool,
) -> None:
    datasets = [dataset for folder in folders for dataset in find_datasets(folder)]
    wanted = wanted_tasks(datasets, split, tasks.split(",") if tasks else None)
    fields = [field for field in by.split(",") if field]
    judge: Reranker | None = None
    if rerank:
        embedder, judge = _open_pair(model, reranker, device, quantization)
    else:
        embedder = _open(model, device, quantization)
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
            "model": _described(embedder) | {"dimension": embedder.dimension},
            "settings": {"split": split, "tasks": tasks, "limit": limit, "by": fields, "rerank": rerank},
            "inputs_sha256": inputs,
            **environment(),
        }
        if judge is not None:
            manifest["settings"]["fusion_weight"] = fusion  # as given; each result says what it was made with
            manifest["reranker"] = _described(judge)
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


def run_suite_command(
    name: str,
    tasks: Sequence[str] | None,
    data: Path | None,
    *,
    model: str,
    reranker: str | None = None,
    rerank: int = 0,
    fusion: float | None = None,
    limit: int | None = None,
    out: Path | None = None,
    cache: Path | None = None,
    skip_missing: bool = False,
    device: str | None = None,
    quantization: Quantization | None = None,
    json: bool = False,
) -> Path:
    """Runs a suite, writes its results and prints its averages; returns the folder.

    Tasks are read before the model is loaded, so that what is missing stops the run at once.  Under a launcher every
    process must call this; the first one writes and prints.
    """
    from huggingface_hub import cached_assets_path

    from quarterlight.evaluation.benchmark import DEPTH, RESULTS, check, run_suite, wanted
    from quarterlight.evaluation.report import write_report
    from quarterlight.evaluation.suites import SuiteTask, load_suite, open_task
    from quarterlight.training.distributed import processes

    suite = load_suite(name)
    chosen = wanted(suite, tasks)
    process = processes()  # before the model, since it chooses the GPU of this process
    main = process.is_main_process
    not_run, opened = check(chosen, lambda task: open_task(task, data), skip_missing=skip_missing)
    if main:
        for task, reason in not_run.items():
            console.err.print(f"{task} is left out: {reason}", style="yellow", markup=False)
    judge: Reranker | None = None
    if rerank:
        embedder, judge = _open_pair(model, reranker, device, quantization)
    else:
        embedder = _open(model, device, quantization)
    # checkpoints of different runs are often called the same: final
    out = out or Path("evaluations") / f"{name}.{Path(model).name}.{embedder.model_hash[:8]}"
    if main:
        (out / RESULTS).unlink(missing_ok=True)  # which would be of other files than those that lie beside it from now
    with console.progress("items", quiet=json or not main) as bar:
        evaluator = RetrievalEvaluator(
            embedder,
            group_by=(),
            reranker=judge,
            rerank=rerank or 1,
            fusion_weight=fusion,
            embeddings=(cache or Path(cached_assets_path("quarterlight", namespace="embeddings")))
            / _rounding(embedder),
            depth=DEPTH,
        )

        def begin(task: SuiteTask) -> None:
            evaluator.on_progress = _advance(bar, task.name)
            if judge is not None:
                evaluator.on_rerank = _advance(bar, f"{task.name}, reranking")

        record: dict[str, Any] = run_suite(
            evaluator,
            suite,
            chosen,
            lambda task: opened.pop(task.name, None) or open_task(task, data),
            not_run=not_run,
            limit=limit,
            folder=out if main else None,
            on_task=begin,
        ).to_json()
    record |= {
        "model": _described(embedder) | {"dimension": embedder.dimension},
        "reranker": None if judge is None else _described(judge),
        # the weight as given; each task says what it was made with
        "settings": {"tasks": tasks, "limit": limit, "rerank": rerank, "fusion_weight": fusion},
        "environment": environment() | {"processes": process.num_processes},
    }
    if main:
        replace_file(out / RESULTS, dumps(record, indent=1, allow_nan=False, default=str) + "\n")
        page = write_report(out, suite, record)
        if json:
            console.print_json(record)
        else:
            _print_suite(suite, record, page)
    process.wait_for_everyone()
    return out


def _print_suite(suite: Suite, record: Mapping[str, Any], page: Path) -> None:
    """The tasks and our averages; what is published stands in the report."""
    from quarterlight.evaluation.benchmark import num_asked
    from quarterlight.evaluation.report import percent

    after = ["reranked"] if record["reranker"] else []
    numbers = ("queries", "pool", "score", *after, "chance")
    title = f"{suite.title}, percent"
    if (limit := record["settings"]["limit"]) is not None:
        title += f"\nat most {limit:,} queries of each task: not the benchmark's numbers"
    table = console.table("task", "metric", *numbers, title=title, right=numbers)
    for one in record["tasks"]:
        scores = [percent(one["score"]), *([percent(one["reranked"])] if after else [])]
        queries = _of(one["num_scored"], num_asked(one))
        pool = _of(one["num_scored_candidates"], one["num_candidates"])
        chance = percent(one["chance"].get(one["metric"]))
        table.add_row(escape(one["name"]), one["metric"], queries, pool, *scores, chance)
    for one in record["averages"]:
        if one["num_missing"] == one["num_tasks"]:  # of tasks that nobody asked for
            continue
        scores = [percent(one["score"]), *([percent(one["reranked"])] if after else [])]
        counted = _of(one["num_tasks"] - one["num_missing"], one["num_tasks"])
        table.add_row(escape(one["name"]), f"mean of {counted} tasks", "", "", *scores, style="bold")
    console.out.print(table)
    left_out = sum(one["num_problems"] for one in record["tasks"])
    if left_out:
        console.err.print(f"{left_out:,} queries, candidates and rows were left out or are not whole: see the report.")
    console.err.print(f"Report: {page} (and .html), numbers: {page.parent / 'results.json'}", soft_wrap=True)


def _compare(files: tuple[Path, Path], seed: int, json: bool) -> None:
    from quarterlight.evaluation.compare import DRAWS, compare

    found = compare(*files, seed=seed)
    if json:
        rows = [asdict(one) | {"difference": one.difference} for one in found]
        console.print_json({"a": str(files[0]), "b": str(files[1]), "seed": seed, "draws": DRAWS, "differences": rows})
        return
    numbers = ("queries", "A", "B", "B - A", "95% interval")
    notes = [f"{one.name}: {', '.join(one.unlike)}" for one in found if one.unlike and not one.reranked]
    title = f"A: {files[0]}\nB: {files[1]}\npercent, paired bootstrap of {DRAWS:,} draws, seed {seed}; *: without zero"
    table = console.table("task", "metric", *numbers, "", title=title, right=numbers)
    for one in found:
        interval = f"{100 * one.low:+.1f} to {100 * one.high:+.1f}"
        queries = f"{one.num_queries:,}" + (f" ({one.num_only:,} in one alone)" if one.num_only else "")
        cells = (queries, f"{100 * one.a:.1f}", f"{100 * one.b:.1f}", f"{100 * one.difference:+.1f}", interval)
        metric = f"{one.metric}, reranked" if one.reranked else one.metric
        marks = ("*" if one.is_clear else "") + ("!" if one.unlike else "")
        table.add_row(escape(one.name), metric, *cells, marks)
    console.out.print(table)
    if notes:
        console.err.print(
            f"!: A and B were not asked the same, so that not only the models differ ({'; '.join(notes)}).",
            style="yellow",
            markup=False,
        )


def _described(model: Embedder | Reranker) -> dict[str, Any]:
    from quarterlight.models.quantized import quantization_of

    network = model.model
    return {
        "name": model.name,
        "hash": model.model_hash,
        "settings": model.settings.to_dict(),
        "dtype": str(network.dtype).removeprefix("torch."),
        "quantization": quantization_of(network),
        "device": network.device.type,
    }


def _rounding(model: Embedder) -> str:
    """The folder for what one dtype on one kind of device makes: the hash of a model does not tell these apart."""
    described = _described(model)
    return f"{described['dtype']}.{described['device']}"


def _open(model: str, device: str | None, quantization: Quantization | None) -> Embedder:
    from quarterlight.models.embedder import Embedder  # seconds of import: only once the datasets are known to be there

    return Embedder(model, device=device, quantization=quantization)


def _open_pair(
    model: str, reranker: str | None, device: str | None, quantization: Quantization | None
) -> tuple[Embedder, Reranker]:
    return open_pair(model, reranker, device=device, quantization=quantization)


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
        queries = _of(result.scores.num_queries, result.num_asked)
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
