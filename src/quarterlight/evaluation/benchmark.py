"""A suite of benchmarks, run: every task scored as its official evaluator does, and what that was made with.

What comes out is plain JSON (:class:`SuiteRecord`), from which tables, reports and comparisons are made, and three
files a task: per query, the run, and the judgements.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from quarterlight.data.retrieval import RetrievalTask, with_instructions
from quarterlight.errors import DatasetError, InputError, did_you_mean
from quarterlight.evaluation.retrieval import Ranking, Reading, RetrievalEvaluator, TaskResult, sample_queries
from quarterlight.evaluation.suites import Suite, SuiteTask
from quarterlight.files import replace_file, replacing
from quarterlight.records import Query

RESULTS = "results.json"

BY_PICTURE = "by_picture"
"""Name of a second reading of MMEB-V2, of whose parsers one takes candidates for the same that share a picture."""

DEPTH = 100
"""Candidates of each query that a run keeps."""

KEPT = 200_000
"""Queries and candidates, of all tasks together, that are not read a second time; some 0.2 GB."""

_PROBLEMS = 200  # of a task that the record names one by one; all are counted


@dataclass(frozen=True, kw_only=True)
class SuiteRecord:
    """What a run of a suite found, ready for JSON.

    tasks: a record for each that was run; see :func:`task_record`.
    averages: name, score, reranked (``None`` where a task is missing), num_tasks, and num_missing of these.
    not_run: name and reason.
    cost: how many items were embedded and pairs reranked for each task, and how long that took; alone in depending on
        what had been kept from runs before.
    """

    suite: str
    title: str
    tasks: Sequence[Mapping[str, Any]]
    averages: Sequence[Mapping[str, Any]]
    not_run: Sequence[Mapping[str, str]]
    cost: Sequence[Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return {name: getattr(self, name) for name in ("suite", "title", "tasks", "averages", "not_run", "cost")}


def wanted(suite: Suite, names: Sequence[str] | None) -> list[SuiteTask]:
    """The tasks of these names, or of groups of these names, in the order of the suite; all without any.

    Raises InputError for a name that the suite has not.
    """
    if names is None:
        return list(suite.tasks)
    known = {task.name for task in suite.tasks} | {task.group for task in suite.tasks}
    for name in names:
        if name not in known:
            raise InputError(f"The suite {suite.name} has no task or group {name!r}. {did_you_mean(name, known)}")
    return [task for task in suite.tasks if task.name in names or task.group in names]


def check(
    tasks: Sequence[SuiteTask],
    open_task: Callable[[SuiteTask], RetrievalTask],
    *,
    skip_missing: bool = False,
    keep: int = KEPT,
) -> tuple[dict[str, str], dict[str, RetrievalTask]]:
    """Opens every task once, before anything is embedded: name -> reason of those that cannot be, and the others by
    name, as many of the first as have ``keep`` queries and candidates together.

    Raises DatasetError, with all reasons, when there is one, unless ``skip_missing``, and when no task is left.
    """
    reasons: dict[str, str] = {}
    opened: dict[str, RetrievalTask] = {}
    for task in tasks:
        try:
            found = open_task(task)
            keep -= len(found.queries) + len(found.candidates)
            if keep >= 0:
                opened[task.name] = found
        except DatasetError as error:
            reasons[task.name] = " ".join(str(error).split())
    if reasons and (not skip_missing or len(reasons) == len(tasks)):
        first = next(iter(reasons.values())).rstrip(".")
        others = f"; and so {len(reasons) - 1} more: {', '.join(list(reasons)[1:])}" if len(reasons) > 1 else ""
        raise DatasetError(f"{len(reasons)} of {len(tasks)} tasks cannot be read. {first}{others}.")
    return reasons, opened


def run_suite(
    evaluator: RetrievalEvaluator,
    suite: Suite,
    tasks: Sequence[SuiteTask],
    open_task: Callable[[SuiteTask], RetrievalTask],
    *,
    not_run: Mapping[str, str] | None = None,
    limit: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    on_task: Callable[[SuiteTask], None] = lambda task: None,
    on_result: Callable[[SuiteTask, TaskResult], None] = lambda task, result: None,
) -> SuiteRecord:
    """Scores the tasks in order.

    not_run: tasks to leave out, and why.  limit: at most so many queries a task, a fixed random sample.
    folder: gets the files of each task (see :func:`write_task`); none are written without it.
    on_task, on_result: called before a task and after it.
    """
    records: list[Mapping[str, Any]] = []
    cost: list[Mapping[str, Any]] = []
    left_out = [
        {"name": task.name, "reason": (not_run or {})[task.name]} for task in tasks if task.name in (not_run or {})
    ]
    for one in tasks:
        if one.name in (not_run or {}):
            continue
        on_task(one)
        task = with_instructions(open_task(one), query=one.query_instruction, document=one.document_instruction)
        if limit:
            task = sample_queries(task, limit)
        readings = {name: READINGS[name] for name in one.readings}
        result = evaluator.evaluate(task, metric=one.metric, ties=one.ties, also=one.also, readings=readings)
        records.append(task_record(one, task, result))
        cost.append(
            {
                "name": one.name,
                "num_embedded": result.num_embedded,
                "seconds": result.seconds,
                "num_pairs": result.num_pairs,
                "rerank_seconds": result.rerank_seconds,
            }
        )
        if folder is not None:
            write_task(Path(folder), one.name, task, result)
        on_result(one, result)
    return SuiteRecord(
        suite=suite.name,
        title=suite.title,
        tasks=records,
        averages=averages(suite, records),
        not_run=left_out,
        cost=cost,
    )


def task_record(declared: SuiteTask, task: RetrievalTask, result: TaskResult) -> dict[str, Any]:
    """What a report says of a task.

    score, reranked: of the suite's metric, in [0, 1], in its official reading; ``expected``, ``trec_eval`` and
    ``readings`` are others.  num_scored of num_queries queries and num_scored_candidates of num_candidates were scored;
    num_left_out rows of the files are in neither, and num_lost_queries more queries were lost with these.
    fusion_weight: what the score of the reranker counted beside the cosine; ``None`` without one.
    """
    official, after = result.official, result.official_reranked
    assert official is not None
    documents = {one.item.instruction for one in task.candidates if one.item.instruction is not None}
    items = [*(one.item for one in task.queries), *(one.item for one in task.candidates)]
    tiles = {item.max_tiles for item in items if item.max_tiles is not None}
    return {
        "name": declared.name,
        "group": declared.group,
        "in_distribution": declared.in_distribution,
        "direction": declared.direction,
        "split": task.split,
        "hub_id": declared.hub_id,
        "pinned_revision": declared.revision,
        "pictures_revision": task.pictures_revision,
        "revision": result.revision,
        "rows_sha256": fingerprint(task),
        "instructions": {"query": list(result.instructions), "document": sorted(documents)},
        "max_tiles": sorted(tiles),
        "metric": declared.metric,
        "ties": declared.ties,
        "score": official.value,
        "expected": official.expected,
        "trec_eval": official.trec_eval,
        "num_tied": official.num_tied,
        "readings": {name: _reading(one) for name, one in result.readings.items()},
        "reranked": None if after is None else after.value,
        "reranked_expected": None if after is None else after.expected,
        "fusion_weight": result.fusion_weight,
        "num_queries": result.num_queries,
        "num_scored": result.scores.num_queries,
        "num_candidates": result.num_candidates,
        "num_scored_candidates": result.num_scored_candidates,
        "num_left_out": result.num_left_out,
        "num_lost_queries": result.num_lost_queries,
        "metrics": dict(result.scores.metrics),
        "metrics_reranked": None if result.reranked is None else dict(result.reranked.metrics),
        "chance": dict(result.scores.chance),
        "num_problems": len(result.problems),
        "problems": [problem._asdict() for problem in result.problems[:_PROBLEMS]],
    }


def num_asked(record: Mapping[str, Any]) -> int:
    """The queries that the benchmark of a task has, by its record: those that could be read, and those that were lost.

    >>> num_asked({"num_queries": 5, "num_lost_queries": 5})
    10
    """
    return int(record["num_queries"]) + int(record.get("num_lost_queries", 0))  # which older records do not have


def averages(suite: Suite, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The averages of a suite over tasks' records; without a value where a task is missing or could not be scored."""
    plain = {one["name"]: one["score"] for one in records if one["score"] is not None}
    after = {one["name"]: one["reranked"] for one in records if one.get("reranked") is not None}
    values, reranked = suite.average(plain), suite.average(after)
    rows = []
    for one in suite.averages:
        tasks = tasks_of(suite, one.name)
        rows.append(
            {
                "name": one.name,
                "score": values[one.name],
                "reranked": reranked[one.name],
                "num_tasks": len(tasks),
                "num_missing": len(tasks - plain.keys()),
            }
        )
    return rows


def tasks_of(suite: Suite, name: str) -> set[str]:
    """The tasks that an average is over, those of the averages in it included; of a task, itself."""
    members = {one.name: one.of for one in suite.averages}
    if name not in members:
        return {name}
    return set().union(*(tasks_of(suite, one) for one in members[name]))


def one_per_picture(task: RetrievalTask) -> RetrievalTask | None:
    """The task as the evaluator of MMEB-V2 sees it: of candidates that show the same picture only the first is there,
    and the others are taken for it.  ``None`` where no two do, and for candidates without pictures.
    """
    first: dict[Any, str] = {}
    of: dict[str, str] = {}
    for candidate in task.candidates:
        images = candidate.item.images
        of[candidate.did] = first.setdefault(images, candidate.did) if images else candidate.did
    if len(set(of.values())) == len(of):
        return None

    def merged(dids: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(of[did] for did in dids))

    def query(one: Query) -> Query:
        return replace(
            one,
            positives=merged(one.positives),
            negatives=merged(one.negatives),
            also_relevant=merged(one.also_relevant),
            candidates=merged(one.candidates),
            excluded=merged(one.excluded),
            grades={of[did]: grade for did, grade in sorted(one.grades.items(), key=lambda pair: pair[1])},
        )

    kept = set(of.values())
    return replace(
        task,
        queries=[query(one) for one in task.queries],
        candidates=[candidate for candidate in task.candidates if candidate.did in kept],
    )


READINGS: Mapping[str, Callable[[RetrievalTask], RetrievalTask | None]] = MappingProxyType(
    {BY_PICTURE: one_per_picture}
)
"""Name of a second reading, as the table of suites gives it -> the task so read, if it is another one."""


def fingerprint(task: RetrievalTask) -> str:
    """SHA-256, in hex, of the ids, texts, positives, own candidates and grades of a task; pictures are not in it.

    It tells whether two runs were asked the same where no revision is known.
    """
    digest = hashlib.sha256()
    for query in task.queries:
        row = (
            query.qid,
            query.item.text,
            query.positives,
            query.candidates,
            query.excluded,
            sorted(query.grades.items()),
        )
        digest.update(json.dumps(row).encode())
    for candidate in task.candidates:
        digest.update(json.dumps((candidate.did, candidate.item.text)).encode())
    return digest.hexdigest()


def file_name(task: str) -> str:
    """The name of a task's files: ``M-BEIR/CIRR task7`` has a blank and a slash.

    >>> file_name("M-BEIR/CIRR task7")
    'M-BEIR.CIRR_task7'
    """
    return re.sub(r"[^\w.+-]", "_", task.replace("/", "."))


def write_task(folder: Path, name: str, task: RetrievalTask, result: TaskResult) -> None:
    """Writes ``queries/<task>.parquet`` (a row for every query, also those not scored), ``qrels/<task>.trec``,
    ``runs/<task>.trec`` and, with a reranker, ``runs/<task>.reranked.trec``.
    """
    stem = file_name(name)
    if result.ranking is not None:
        _write_parquet(folder / "queries" / f"{stem}.parquet", task, result)
        _write_run(folder / "runs" / f"{stem}.trec", result.ranking)
    if result.ranking_reranked is not None:
        _write_run(folder / "runs" / f"{stem}.reranked.trec", result.ranking_reranked)
    lines = (
        f"{_word(query.qid)} 0 {_word(did)} {query.grades.get(did, 1)}\n"
        for query in task.queries
        for did in query.positives
    )
    replace_file(folder / "qrels" / f"{stem}.trec", "".join(lines))


def read_record(file: Path) -> dict[str, Any]:
    """The ``results.json`` of a run, or that of the folder.  Raises InputError for a file that is none."""
    file = file / RESULTS if file.is_dir() else file
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not {"suite", "tasks", "averages"} <= record.keys():
            raise ValueError("it has no suite, tasks and averages")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is not the {RESULTS} of `quarterlight evaluate --suite` ({error}).") from error
    return record


def _reading(one: Reading) -> dict[str, Any]:
    return {
        "score": None if one.official is None else one.official.value,
        "reranked": None if one.reranked is None else one.reranked.value,
    }


def _write_parquet(file: Path, task: RetrievalTask, result: TaskResult) -> None:
    ranking = result.ranking
    assert ranking is not None
    row_of = {qid: row for row, qid in enumerate(ranking.qids)}
    rows = [row_of.get(query.qid) for query in task.queries]
    take = pa.array(rows, pa.int64())
    columns: dict[str, Any] = {
        "rank": ranking.rank_Q,
        "tied": ranking.tied_Q,
        "score": ranking.score_Q,
        "num_positives": ranking.num_positives_Q,
        "num_candidates": ranking.num_candidates_Q,
        **ranking.metrics,
    }
    if result.ranking_reranked is not None:
        columns["rank_reranked"] = result.ranking_reranked.rank_Q
        columns |= {f"{name}_reranked": values for name, values in result.ranking_reranked.metrics.items()}
    table = pa.table(
        {
            "qid": [query.qid for query in task.queries],
            "scored": [row is not None for row in rows],
            **{name: pa.array(values).take(take) for name, values in columns.items()},
        }
    )
    with replacing(file) as draft:
        pq.write_table(table, draft)


def _write_run(file: Path, ranking: Ranking) -> None:
    lines = []
    for qid, dids, score_K in zip(ranking.qids, ranking.dids, ranking.score_QK.tolist(), strict=True):
        lines += [
            f"{_word(qid)} Q0 {_word(did)} {rank} {score:.6f} quarterlight\n"
            for rank, (did, score) in enumerate(zip(dids, score_K, strict=False), 1)
        ]
    replace_file(file, "".join(lines))


def _word(name: str) -> str:
    """An id in a file whose columns are divided by blanks; different ids stay different.

    >>> _word("a b"), _word("a_b"), _word("100%")
    ('a%20b', 'a_b', '100%25')
    """
    return re.sub(r"[\s%]", lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), name)
