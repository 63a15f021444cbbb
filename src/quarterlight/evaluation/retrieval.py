"""Scores of an embedder on retrieval tasks, with what chance would reach and broken down by what the data says; with a
reranker, also of the two together.

Search is exact over the whole pool of a task, as in M-BEIR: a query's own picture stays in the pool where the data has
put it there (composed retrieval lists it as a hard negative).  A reranker orders the first candidates of the search
anew; what stands behind them keeps its rank.

Q queries, K candidates that are reranked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from quarterlight.data.retrieval import RetrievalTask, with_instructions
from quarterlight.errors import InputError
from quarterlight.metrics.fusion import places
from quarterlight.metrics.ranking import METRICS, First, Ranks, chance_ranks, first_k, rank_embeddings
from quarterlight.models.readable import encode_readable
from quarterlight.records import Item, Problem, Query

if TYPE_CHECKING:
    from quarterlight.models.settings import RerankerSettings

GROUP_BY = ("lang", "text_kind", "change")
"""Fields of a query by which scores are broken down, unless told otherwise."""

_CHUNK = 2048  # items put to the embedder at once: enough to sort by length, few enough to report progress
_QUERIES = 128  # reranked at once, likewise


class Encoder(Protocol):
    """What is evaluated. Rows are float32 with L2 norm 1; a picture that cannot be read raises InputError."""

    def encode_query(self, items: Sequence[Item], /) -> npt.NDArray[np.float32]: ...
    def encode_document(self, items: Sequence[Item], /) -> npt.NDArray[np.float32]: ...


class Reranker(Protocol):
    """What puts the first candidates in order; :class:`quarterlight.models.reranker.Reranker` does."""

    @property
    def settings(self) -> RerankerSettings: ...

    def predict(self, pairs: Sequence[tuple[Item, Item]], /) -> npt.NDArray[np.float32]:
        """P(Yes) of pairs of a query and a candidate, float32 [N] in [0, 1]."""


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
    """The scores of the queries that have one value in one field; ``reranked`` as in :class:`TaskResult`."""

    field: str
    value: str
    scores: Scores
    reranked: Scores | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task, scored.

    num_queries, num_candidates: how many the task has; less those in ``problems``, so many are scored.
    problems: everything that was left out: unreadable pictures, and queries none of whose positives can be read.
    instructions: what the queries were embedded with, when not with the default of the model.
    groups: fields in the order asked for, values by falling number of queries.
    num_embedded, seconds: distinct items that were new to the embedder, and how long they took.
    reranked: the scores of the same queries after the reranker; ``None`` without one.
    num_reranked: candidates of each query that it was given.
    num_pairs, rerank_seconds: distinct pairs that it scored, and how long that took.
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
    reranked: Scores | None = None
    num_reranked: int = 0
    num_pairs: int = 0
    rerank_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return asdict(self) | {"problems": [problem._asdict() for problem in self.problems]}


class RetrievalEvaluator:
    """Scores tasks one after the other and embeds what they share only once.

    Keep one for the tasks of one dataset, which often search the same pictures; its memory grows with them.

    prepare: gives a task's items their instructions; by default those of the paper, by direction.
    group_by: fields of a query to break scores down by, where there are at least two values.
    on_progress: called with how many items of a task are embedded, and how many there are.
    reranker: also score the order that it gives the first candidates.
    rerank: how many these are; 5 in Magic-MM-Embedding (table 7).
    fusion_weight: of its score beside the cosine, see :func:`quarterlight.metrics.fusion.fuse`; ``None`` takes the
        reranker's setting for the task.
    on_rerank: called with how many queries of a task are reranked, and how many there are.
    Raises InputError when there are none to rerank, or the weight is outside [0, 1].
    """

    def __init__(
        self,
        embedder: Encoder,
        *,
        prepare: Callable[[RetrievalTask], RetrievalTask] = with_instructions,
        group_by: Sequence[str] = GROUP_BY,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        reranker: Reranker | None = None,
        rerank: int = 5,
        fusion_weight: float | None = None,
        on_rerank: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        if rerank < 1:
            raise InputError(f"rerank must be at least 1, got {rerank}: leave the reranker out to rank without one.")
        if fusion_weight is not None and not 0 <= fusion_weight <= 1:
            raise InputError(f"fusion_weight must be from 0 to 1, got {fusion_weight}.")
        self.prepare = prepare
        self.group_by = tuple(group_by)
        self.on_progress = on_progress
        self.reranker = reranker
        self.rerank = rerank
        self.fusion_weight = fusion_weight
        self.on_rerank = on_rerank
        self._query_vectors = _Vectors(embedder.encode_query)
        self._candidate_vectors = _Vectors(embedder.encode_document)

    def evaluate(self, task: RetrievalTask) -> TaskResult:
        """Embeds what is new, ranks each query's positives among all candidates, and averages; so again if reranked."""
        started = time.monotonic()
        task = self.prepare(task)
        query_items = [query.item for query in task.queries]
        candidate_items = [candidate.item for candidate in task.candidates]
        num_embedded = self._embed(query_items, candidate_items)
        seconds = time.monotonic() - started

        column, scored, positives, problems = self._rankable(task)
        values: _Values = {}
        chance: _Values = {}
        reranked: _Values | None = None if self.reranker is None else {}
        if scored:
            query_QD = self._query_vectors.of(query.item for query in scored)
            readable = [candidate.item for candidate in task.candidates if candidate.did in column]
            candidate_CD = self._candidate_vectors.of(readable)
            ranks = rank_embeddings(query_QD, candidate_CD, positives)
            values, chance = _values(ranks), _values(chance_ranks(ranks.num_positives, len(column)))
        reranking = _Reranking()
        if scored and self.reranker is not None:
            items = [query.item for query in scored]
            weight = self.fusion_weight
            if weight is None:
                weight = self.reranker.settings.weight_of(task.task, task.dataset)
            first = first_k(query_QD, candidate_CD, self.rerank)
            reranking = self._rerank(self.reranker, weight, items, readable, *first)
            reranked = _values(rank_embeddings(query_QD, candidate_CD, positives, first=reranking.first))
        rows = np.arange(len(scored))
        return TaskResult(
            dataset=task.dataset,
            task=task.task,
            split=task.split,
            num_queries=len(task.queries),
            num_candidates=len(task.candidates),
            num_scored_candidates=len(column),
            scores=_scores(values, chance, rows),
            groups=tuple(_groups(scored, self.group_by, values, chance, reranked)),
            problems=tuple(problems),
            instructions=tuple(sorted({item.instruction for item in query_items if item.instruction is not None})),
            num_embedded=num_embedded,
            seconds=seconds,
            reranked=None if reranked is None else _scores(reranked, chance, rows),
            num_reranked=reranking.num_reranked,
            num_pairs=reranking.num_pairs,
            rerank_seconds=reranking.seconds,
        )

    def _rerank(
        self,
        reranker: Reranker,
        weight: float,
        queries: Sequence[Item],
        candidates: Sequence[Item],
        column_QK: npt.NDArray[np.int64],
        recall_QK: npt.NDArray[np.float32],
    ) -> _Reranking:
        """The places that the reranker gives the first candidates of each query."""
        started = time.monotonic()
        place_QK = np.zeros_like(column_QK)
        num_pairs = 0
        self.on_rerank(0, len(queries))
        for start in range(0, len(queries), _QUERIES):
            rows = range(start, min(start + _QUERIES, len(queries)))
            pairs = [(queries[row], candidates[column]) for row in rows for column in column_QK[row]]
            # each distinct pair once, so that what is the same has the same score to the last bit
            distinct = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
            score_N = reranker.predict(list(distinct))
            score_BK = score_N[[distinct[pair] for pair in pairs]].reshape(len(rows), -1)
            for row, score_K in zip(rows, score_BK, strict=True):
                place_QK[row] = places(recall_QK[row], score_K, weight)
            num_pairs += len(distinct)
            self.on_rerank(rows.stop, len(queries))
        return _Reranking(First(column_QK, place_QK), column_QK.shape[1], num_pairs, time.monotonic() - started)

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


class _Reranking(NamedTuple):
    """What a reranker said of a task; without one, nothing."""

    first: First | None = None
    num_reranked: int = 0
    num_pairs: int = 0
    seconds: float = 0.0


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


_Values: TypeAlias = "Mapping[str, npt.NDArray[np.floating[Any]]]"  # metric -> its value for each query


def _values(ranks: Ranks) -> _Values:
    return {name: metric(ranks) for name, metric in METRICS.items()}


def _scores(values: _Values, chance: _Values, rows: npt.NDArray[np.integer[Any]]) -> Scores:
    return Scores(
        num_queries=len(rows),
        metrics={name: float(value[rows].mean()) for name, value in values.items()},
        chance={name: float(value[rows].mean()) for name, value in chance.items()},
    )


def _groups(
    queries: Sequence[Query], fields: Sequence[str], values: _Values, chance: _Values, reranked: _Values | None
) -> Iterable[Group]:
    for field in fields:
        found: dict[str, list[int]] = {}
        for row, query in enumerate(queries):
            if (value := query.fields.get(field)) is not None:
                found.setdefault(str(value), []).append(row)
        if len(found) > 1:
            for value in sorted(found, key=lambda value: (-len(found[value]), value)):
                rows = np.array(found[value])
                yield Group(
                    field=field,
                    value=value,
                    scores=_scores(values, chance, rows),
                    reranked=None if reranked is None else _scores(reranked, chance, rows),
                )
