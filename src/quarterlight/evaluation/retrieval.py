"""Scores of an embedder on retrieval tasks, with what chance would reach and broken down by what the data says.

Search is exact over the whole pool of a task, as in M-BEIR: a query's own picture stays in the pool where the data has
put it there (composed retrieval lists it as a hard negative).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from quarterlight.data.retrieval import RetrievalTask, with_instructions
from quarterlight.metrics.ranking import METRICS, Ranks, chance_ranks, rank_embeddings
from quarterlight.models.readable import encode_readable
from quarterlight.records import Item, Query

GROUP_BY = ("lang", "text_kind", "change")
"""Fields of a query by which scores are broken down, unless told otherwise."""

_CHUNK = 2048  # items put to the embedder at once: enough to sort by length, few enough to report progress


class Encoder(Protocol):
    """What is evaluated. Rows are float32 with L2 norm 1; a picture that cannot be read raises InputError."""

    def encode_query(self, items: Sequence[Item], /) -> npt.NDArray[np.float32]: ...
    def encode_document(self, items: Sequence[Item], /) -> npt.NDArray[np.float32]: ...


class Problem(NamedTuple):
    """A query or candidate that could not be scored, and why."""

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Means over a set of queries.

    metrics, chance: name of the metric -> value in [0, 1], and what candidates in random order would get on the same
        queries; empty when no query could be scored.
    """

    num_queries: int
    metrics: Mapping[str, float]
    chance: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Group:
    """The scores of the queries that have one value in one field."""

    field: str
    value: str
    scores: Scores


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task, scored.

    num_queries, num_candidates: how many the task has; less those in ``problems``, so many are scored.
    problems: everything that was left out: unreadable pictures, and queries none of whose positives can be read.
    instructions: what the queries were embedded with, when not with the default of the model.
    groups: fields in the order asked for, values by falling number of queries.
    num_embedded, seconds: distinct items that were new to the embedder, and how long they took.
    """

    dataset: str
    task: str
    split: str
    num_queries: int
    num_candidates: int
    num_scored_candidates: int
    scores: Scores
    groups: tuple[Group, ...]
    problems: tuple[Problem, ...]
    instructions: tuple[str, ...]
    num_embedded: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return asdict(self) | {"problems": [problem._asdict() for problem in self.problems]}


class RetrievalEvaluator:
    """Scores tasks one after the other and embeds what they share only once.

    Keep one for the tasks of one dataset, which often search the same pictures; its memory grows with them.

    prepare: gives a task's items their instructions; by default those of the paper, by direction.
    group_by: fields of a query to break scores down by, where there are at least two values.
    on_progress: called with how many items of a task are embedded, and how many there are.
    """

    def __init__(
        self,
        embedder: Encoder,
        *,
        prepare: Callable[[RetrievalTask], RetrievalTask] = with_instructions,
        group_by: Sequence[str] = GROUP_BY,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.prepare = prepare
        self.group_by = tuple(group_by)
        self.on_progress = on_progress
        self._query_vectors = _Vectors(embedder.encode_query)
        self._candidate_vectors = _Vectors(embedder.encode_document)

    def evaluate(self, task: RetrievalTask) -> TaskResult:
        """Embeds what is new, ranks each query's positives among all candidates, and averages."""
        started = time.monotonic()
        task = self.prepare(task)
        query_items = [query.item for query in task.queries]
        candidate_items = [candidate.item for candidate in task.candidates]
        num_embedded = self._embed(query_items, candidate_items)
        seconds = time.monotonic() - started

        column, scored, positives, problems = self._rankable(task)
        values, chance = {}, {}
        if scored:
            ranks = rank_embeddings(
                self._query_vectors.of(query.item for query in scored),
                self._candidate_vectors.of(c.item for c in task.candidates if c.did in column),
                positives,
            )
            values, chance = _values(ranks), _values(chance_ranks(ranks.num_positives, len(column)))
        return TaskResult(
            dataset=task.dataset,
            task=task.task,
            split=task.split,
            num_queries=len(task.queries),
            num_candidates=len(task.candidates),
            num_scored_candidates=len(column),
            scores=_scores(values, chance, np.arange(len(scored))),
            groups=tuple(_groups(scored, self.group_by, values, chance)),
            problems=tuple(problems),
            instructions=tuple(sorted({item.instruction for item in query_items if item.instruction is not None})),
            num_embedded=num_embedded,
            seconds=seconds,
        )

    def _rankable(self, task: RetrievalTask) -> tuple[dict[str, int], list[Query], list[list[int]], list[Problem]]:
        """The column of each candidate that has a vector, the queries that can be scored against these with the columns
        of their positives, and what is left out."""
        problems: list[Problem] = []
        column: dict[str, int] = {}
        for candidate in task.candidates:
            if reason := self._candidate_vectors.problems.get(candidate.item):
                problems.append(Problem(candidate.did, reason))
            else:
                column[candidate.did] = len(column)
        scored: list[Query] = []
        positives: list[list[int]] = []
        for query in task.queries:
            found = [column[did] for did in query.positives if did in column]
            if reason := self._query_vectors.problems.get(query.item):
                problems.append(Problem(query.qid, reason))
            elif not found:
                problems.append(Problem(query.qid, "none of its positives can be read"))
            else:
                scored.append(query)
                positives.append(found)
        return column, scored, positives, problems

    def _embed(self, query_items: list[Item], candidate_items: list[Item]) -> int:
        sides = ((self._query_vectors, query_items), (self._candidate_vectors, candidate_items))
        missing = [(vectors, vectors.missing(items)) for vectors, items in sides]
        total, done = sum(len(items) for _, items in missing), 0
        self.on_progress(0, total)
        for vectors, items in missing:
            for start in range(0, len(items), _CHUNK):
                vectors.add(items[start : start + _CHUNK])
                done += len(items[start : start + _CHUNK])
                self.on_progress(done, total)
        return total


def sample_queries(task: RetrievalTask, limit: int) -> RetrievalTask:
    """The task with at most ``limit`` of its queries, always the same random sample, and all candidates."""
    if limit >= len(task.queries):
        return task
    rows = np.random.default_rng(0).choice(len(task.queries), size=limit, replace=False)
    return replace(task, queries=[task.queries[row] for row in sorted(rows.tolist())])


class _Vectors:
    """The vectors of the items of one side, and why some have none."""

    def __init__(self, encode: Callable[[Sequence[Item]], npt.NDArray[np.float32]]) -> None:
        self.problems: dict[Item, str] = {}
        self._encode = encode
        self._row: dict[Item, int] = {}
        self._chunks: list[npt.NDArray[np.float32]] = []

    def missing(self, items: Iterable[Item]) -> list[Item]:
        """The distinct items that have neither a vector nor a problem yet."""
        return [item for item in dict.fromkeys(items) if item not in self._row and item not in self.problems]

    def add(self, items: Sequence[Item]) -> None:
        """Embeds items that are missing."""
        vector_ND, problems = encode_readable(self._encode, items)
        for number, item in enumerate(items):
            if number in problems:
                self.problems[item] = problems[number]
            else:
                self._row[item] = len(self._row)
        if len(vector_ND):
            self._chunks.append(vector_ND)

    def of(self, items: Iterable[Item]) -> npt.NDArray[np.float32]:
        """One row for each item, all of which have been added without a problem."""
        if len(self._chunks) > 1:
            self._chunks = [np.concatenate(self._chunks)]
        return self._chunks[0][[self._row[item] for item in items]]


def _values(ranks: Ranks) -> dict[str, npt.NDArray[np.floating]]:
    return {name: metric(ranks) for name, metric in METRICS.items()}


def _scores(
    values: Mapping[str, npt.NDArray[np.floating]],
    chance: Mapping[str, npt.NDArray[np.floating]],
    rows: npt.NDArray[np.integer],
) -> Scores:
    return Scores(
        num_queries=len(rows),
        metrics={name: float(value[rows].mean()) for name, value in values.items()},
        chance={name: float(value[rows].mean()) for name, value in chance.items()},
    )


def _groups(
    queries: Sequence[Query],
    fields: Sequence[str],
    values: Mapping[str, npt.NDArray[np.floating]],
    chance: Mapping[str, npt.NDArray[np.floating]],
) -> Iterable[Group]:
    for field in fields:
        rows: dict[str, list[int]] = {}
        for row, query in enumerate(queries):
            if (value := query.fields.get(field)) is not None:
                rows.setdefault(str(value), []).append(row)
        if len(rows) > 1:
            for value in sorted(rows, key=lambda value: (-len(rows[value]), value)):
                yield Group(field=field, value=value, scores=_scores(values, chance, np.array(rows[value])))
