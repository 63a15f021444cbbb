"""Scores of an embedder on retrieval tasks, with what chance would reach and broken down by what the data says; with a
reranker, also of the two together.

Search is exact over the whole pool of a task, as in M-BEIR, or over the candidates that a query brings, as in MMEB: a
query's own picture stays in the pool where the data has put it there (composed retrieval lists it as a hard negative).
A reranker orders the first candidates of the search anew; what stands behind them keeps its rank.

With a folder for embeddings these and what a reranker says of pairs outlive the run, and processes that a launcher
started share the work.

Q queries, K candidates that are reranked or kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from dataclasses import field as field_
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from quarterlight.data.retrieval import RetrievalTask, with_instructions
from quarterlight.errors import InputError
from quarterlight.evaluation.pair_scores import PairScores
from quarterlight.metrics.fusion import RERANK, places
from quarterlight.metrics.ranking import METRICS, Floats, Ties, chance_ranks, measure, metric_named
from quarterlight.metrics.search import Found, Wanted, put_first, search
from quarterlight.metrics.trec import trec_values
from quarterlight.models.readable import encode_readable
from quarterlight.prompts import Role
from quarterlight.records import Item, Problem, Query

if TYPE_CHECKING:
    from quarterlight.models.settings import RerankerSettings

GROUP_BY = ("lang", "text_kind", "change")
"""Fields of a query by which scores are broken down, unless told otherwise."""

_CHUNK = 2048  # items put to the embedder at once: enough to sort by length, few enough to report progress
_QUERIES = 128  # reranked at once, likewise; processes share them in whole blocks, so that none depends on their number
_NO_NUMBER = "the reranker gave a score that is not a number; its candidates stay in the order of the search"

_T = TypeVar("_T")


class Encoder(Protocol):
    """What is evaluated. Rows are float32 with L2 norm 1; a picture that cannot be read raises InputError."""

    def encode_query(self, items: Sequence[Item], /) -> npt.NDArray[np.float32]: ...
    def encode_document(self, items: Sequence[Item], /) -> npt.NDArray[np.float32]: ...


class Reranker(Protocol):
    """What puts the first candidates in order; :class:`quarterlight.models.reranker.Reranker` does."""

    @property
    def settings(self) -> RerankerSettings: ...
    @property
    def model_hash(self) -> str:
        """Hex, over everything that changes a score; asked for where scores are kept."""

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
class Official:
    """The number that a benchmark prints, and how else it could be read.

    metric, ties: what its evaluator computes, and how it breaks ties; see :data:`quarterlight.metrics.ranking.Ties`.
    value, expected: the mean over the scored queries in this reading, and with ties in all orders; ``None`` when no
        query could be scored.
    num_tied: queries of which a positive has the score of a candidate that is none, so that the order is arbitrary.
    trec_eval: the same mean by trec_eval's own code, which breaks ties by id; ``None`` where it has no such metric, or
        pytrec_eval is not installed.
    """

    metric: str
    ties: Ties
    value: float | None
    expected: float | None
    num_tied: int
    trec_eval: float | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The number of a benchmark as another evaluator would see its task, and after the reranker if there is one."""

    official: Official | None
    reranked: Official | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranking:
    """What was found for each query that could be scored: Q rows of each.

    qids: ids.  rank_Q, tied_Q, score_Q: 1 + how many candidates score higher than the best positive, how many have its
        score (itself included), and this score.
    num_positives_Q, num_candidates_Q: of these; what the query chooses from.
    metrics: name -> value [Q], the official one in the official reading under its own name.
    dids, score_QK: the ids of the first candidates, best first, and their scores.
    """

    qids: list[str]
    rank_Q: npt.NDArray[np.int64]
    tied_Q: npt.NDArray[np.int64]
    score_Q: npt.NDArray[np.float32]
    num_positives_Q: npt.NDArray[np.int64]
    num_candidates_Q: npt.NDArray[np.int64]
    metrics: Mapping[str, Floats]
    dids: list[list[str]]
    score_QK: npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task, scored.

    num_queries, num_candidates: how many the task has; less those in ``problems``, so many are scored.
    problems: everything that was left out: unreadable pictures, queries none of whose positives can be read, and rows
        that were left out when the files were read, of which there are ``num_left_out``.
    num_lost_queries: queries of the benchmark that were lost with these rows, and are not among ``num_queries``.
    revision: of the data, where it is known.
    instructions: what the queries were embedded with, when not with the default of the model.
    groups: fields in the order asked for, values by falling number of queries.
    num_embedded, seconds: distinct items that were new to the embedder, and how long they took.
    reranked: the scores of the same queries after the reranker; ``None`` without one.
    num_reranked: candidates of each query that it was given.
    fusion_weight: of its score beside the cosine in that order; ``None`` without one.
    num_pairs, rerank_seconds: distinct pairs that were new to it, and how long they took.
    official, official_reranked: the number of the benchmark, when a metric was named.  Queries of which the reranker
        gave a score that is no number stay in the order of the search, and are among the problems.
    readings: the number in other readings, by name.
    ranking, ranking_reranked: query by query; not part of :meth:`to_json`.
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
    fusion_weight: float | None = None
    num_pairs: int = 0
    rerank_seconds: float = 0.0
    official: Official | None = None
    official_reranked: Official | None = None
    revision: str | None = None
    num_left_out: int = 0
    num_lost_queries: int = 0
    readings: Mapping[str, Reading] = field_(default_factory=dict)
    ranking: Ranking | None = field_(default=None, repr=False, compare=False)
    ranking_reranked: Ranking | None = field_(default=None, repr=False, compare=False)

    @property
    def num_asked(self) -> int:
        """Queries of the benchmark, those that were lost included: what "N of M were scored" must be of."""
        return self.num_queries + self.num_lost_queries

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        plain = asdict(replace(self, ranking=None, ranking_reranked=None))
        del plain["ranking"], plain["ranking_reranked"]
        return plain | {"problems": [problem._asdict() for problem in self.problems]}


class RetrievalEvaluator:
    """Scores tasks one after the other and embeds what they share only once.

    Keep one for the tasks of one dataset, which often search the same pictures; its memory grows with them.  What a
    reranker says of pairs is kept for one task, unless there is a folder: there are far more pairs than items.

    prepare: gives a task's items their instructions; by default those of the paper, by direction.
    group_by: fields of a query to break scores down by, where there are at least two values.
    on_progress: called with how many items of a task are embedded, and how many there are.
    reranker: also score the order that it gives the first candidates.
    rerank: how many these are.
    fusion_weight: of its score beside the cosine, see :func:`quarterlight.metrics.fusion.fuse`; ``None`` takes the
        reranker's setting for the task.
    on_rerank: called with how many queries of a task are reranked, and how many there are.
    embeddings: folder where embeddings are kept, by model, role and content, and what the reranker says of pairs, and
        looked for first; runs may share it.  Needed under a launcher, whose processes must see the same folder.
    depth: how many of the first candidates of each query the result keeps.
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
        rerank: int = RERANK,
        fusion_weight: float | None = None,
        on_rerank: Callable[[int, int], None] = lambda done, total: None,
        embeddings: str | os.PathLike[str] | None = None,
        depth: int = 0,
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
        self.depth = depth
        self._shared = embeddings is not None
        self._query_vectors: _Vectors | _StoredVectors
        self._candidate_vectors: _Vectors | _StoredVectors
        self._pairs: PairScores | None = None
        if embeddings is None:
            self._query_vectors = _Vectors(embedder.encode_query)
            self._candidate_vectors = _Vectors(embedder.encode_document)
        else:
            folder = Path(embeddings)
            store = _Store(embedder, folder)
            self._query_vectors = _StoredVectors(store, "query")
            self._candidate_vectors = _StoredVectors(store, "document")
            if reranker is not None:
                self._pairs = PairScores(reranker.predict, folder=folder / reranker.model_hash / "pairs", key=store.key)

    def evaluate(
        self,
        task: RetrievalTask,
        *,
        metric: str | None = None,
        ties: Ties = "expected",
        also: Sequence[str] = (),
        readings: Mapping[str, Callable[[RetrievalTask], RetrievalTask | None]] = MappingProxyType({}),
    ) -> TaskResult:
        """Embeds what is new, ranks each query's positives among all candidates, and averages; so again if reranked.

        metric, ties: what the benchmark of the task prints, and how its evaluator breaks ties.  also: more metrics.
        readings: name -> what makes the task that another evaluator sees, of the same queries and some of the same
        candidates, or ``None`` where it sees no other; nothing is embedded, and no pair scored, again for these.
        Raises InputError for the name of a metric that is unknown, and for an id that occurs twice.
        """
        names = tuple(dict.fromkeys((*METRICS, *([metric] if metric else ()), *also)))
        for name in names:
            metric_named(name)
        task, num_embedded, seconds = self._embedded(task)
        pool = self._rankable(task)
        candidate_CD = self._vectors_of_candidates(task, pool)
        pair_scores = self._pair_scores()
        plain, reranked, reranking = self._judge(task, pool, candidate_CD, pair_scores, names, metric, ties)
        others: dict[str, Reading] = {}
        for name, read in readings.items():
            if (other := read(task)) is not None:
                part = self._rankable(other)
                columns = [pool.column[did] for did in part.column]
                before, after, _ = self._judge(other, part, candidate_CD[columns], pair_scores, names, metric, ties)
                others[name] = Reading(official=before.official, reranked=after.official if self.reranker else None)
        rows = np.arange(len(pool.queries))
        with_reranker = self.reranker is not None
        return TaskResult(
            dataset=task.dataset,
            task=task.task,
            split=task.split,
            num_queries=len(task.queries),
            num_candidates=len(task.candidates),
            num_scored_candidates=len(pool.column),
            scores=_scores(plain.values, plain.chance, rows),
            groups=tuple(
                _groups(
                    pool.queries, self.group_by, plain.values, plain.chance, reranked.values if with_reranker else None
                )
            ),
            problems=(
                *task.problems,
                *pool.problems,
                *(Problem(pool.queries[row].qid, _NO_NUMBER) for row in reranking.not_numbers),
            ),
            instructions=tuple(
                sorted({one.item.instruction for one in task.queries if one.item.instruction is not None})
            ),
            num_embedded=num_embedded,
            seconds=seconds,
            reranked=_scores(reranked.values, plain.chance, rows) if with_reranker else None,
            num_reranked=reranking.score_QK.shape[1],
            fusion_weight=self._weight(self.reranker, task) if self.reranker is not None else None,
            num_pairs=reranking.num_pairs,
            rerank_seconds=reranking.seconds,
            official=plain.official,
            official_reranked=reranked.official if with_reranker else None,
            revision=task.revision,
            num_left_out=len(task.problems),
            num_lost_queries=task.num_lost_queries,
            readings=others,
            ranking=plain.ranking,
            ranking_reranked=reranked.ranking if with_reranker else None,
        )

    def by_weight(self, task: RetrievalTask, weights: Sequence[float]) -> dict[float, Scores]:
        """What reranking the task comes to for each weight of the reranker's score; searched and reranked once.

        Raises RuntimeError without a reranker.
        """
        pair_scores = self._pair_scores()
        if pair_scores is None:
            raise RuntimeError("A weight of a reranker says nothing without a reranker.")
        task, _, _ = self._embedded(task)
        pool = self._rankable(task)
        rows = np.arange(len(pool.queries))
        if not pool.queries:
            return dict.fromkeys(weights, _scores({}, {}, rows))
        found = self._search(pool, self._vectors_of_candidates(task, pool), self.rerank)
        reranking = self._rerank(pair_scores, task, pool, found)
        scored = {weight: _Scored.of(reranking.fused(found, pool, weight), pool, METRICS) for weight in weights}
        return {weight: _scores(one.values, one.chance, rows) for weight, one in scored.items()}

    def _pair_scores(self) -> PairScores | None:
        """For the pairs of a task: those of the folder, or new ones; ``None`` without a reranker."""
        if self.reranker is None or self._pairs is not None:
            return self._pairs
        return PairScores(self.reranker.predict)

    def _embedded(self, task: RetrievalTask) -> tuple[RetrievalTask, int, float]:
        """The task with its instructions, how many of its items were new to the embedder, and how long they took."""
        started = time.monotonic()
        task = self.prepare(task)
        number = self._embed([one.item for one in task.queries], [one.item for one in task.candidates])
        return task, number, time.monotonic() - started

    def _vectors_of_candidates(self, task: RetrievalTask, pool: _Pool) -> npt.NDArray[np.float32]:
        """The vectors of the candidates that have one, in the order of their columns."""
        if not pool.column:
            return np.empty((len(pool.column), 0), np.float32)
        return self._candidate_vectors.of(one.item for one in task.candidates if one.did in pool.column)

    def _judge(
        self,
        task: RetrievalTask,
        pool: _Pool,
        candidate_CD: npt.NDArray[np.float32],
        pair_scores: PairScores | None,
        names: Sequence[str],
        metric: str | None,
        ties: Ties,
    ) -> tuple[_Scored, _Scored, _Reranking]:
        """The search in numbers, then with its first candidates reranked."""
        if not pool.queries:
            nothing = _Scored.nothing(metric, ties)
            return nothing, nothing, _Reranking()
        depth = max(self.depth, self.rerank if pair_scores is not None else 0, _depth_of(metric))
        found = self._search(pool, candidate_CD, depth)
        plain = _Scored.of(found, pool, names, metric, ties, self.depth)
        if self.reranker is None or pair_scores is None:
            return plain, plain, _Reranking()
        reranking = self._rerank(pair_scores, task, pool, found)
        again = reranking.fused(found, pool, self._weight(self.reranker, task))
        return plain, _Scored.of(again, pool, names, metric, ties, self.depth), reranking

    def _weight(self, reranker: Reranker, task: RetrievalTask) -> float:
        """Of the reranker's score: the one for everything, if there is one, else the reranker's for the task."""
        if self.fusion_weight is not None:
            return self.fusion_weight
        return reranker.settings.weight_of(task.task, task.dataset)

    def _search(self, pool: _Pool, candidate_CD: npt.NDArray[np.float32], depth: int) -> Found:
        """The search for all queries, of which this process does its share."""
        query_QD = self._query_vectors.of(query.item for query in pool.queries)
        rows = self._share(len(pool.queries))
        own = slice(rows.start, rows.stop)
        found = search(query_QD[own], candidate_CD, pool.wanted[own], k=depth, start=rows.start)
        return Found.joined(self._gather([found]))

    def _share(self, num_queries: int) -> range:
        """The queries that are this process's: whole blocks, one after the other."""
        if not self._shared:
            return range(num_queries)
        from quarterlight.training.distributed import share  # needs what the extra train or eval installs

        blocks = share(range(0, num_queries, _QUERIES))
        return range(blocks[0], min(blocks[-1] + _QUERIES, num_queries)) if blocks else range(0)

    def _gather(self, values: list[_T]) -> list[_T]:
        """What all processes have, in their order."""
        if not self._shared:
            return values
        from quarterlight.training.distributed import gather_objects

        return gather_objects(values)

    def _rerank(self, pair_scores: PairScores, task: RetrievalTask, pool: _Pool, found: Found) -> _Reranking:
        """What the reranker says of the first candidates of each query, of which this process asks for its share."""
        started = time.monotonic()
        items = [candidate.item for candidate in task.candidates if candidate.did in pool.column]
        column_QK = found.column_QK[:, : self.rerank]
        own = self._share(len(pool.queries))
        score_BK = np.zeros((len(own), column_QK.shape[1]), np.float32)
        num_pairs = 0
        pair_scores.find()
        self.on_rerank(0, len(own))
        for start in range(own.start, own.stop, _QUERIES):
            rows = slice(start, min(start + _QUERIES, own.stop))
            has_BK = column_QK[rows] >= 0  # a query with a few candidates of its own has no more
            pairs = [
                (query.item, items[column])
                for query, column_K, has_K in zip(pool.queries[rows], column_QK[rows], has_BK, strict=True)
                for column in column_K[has_K]
            ]
            score_N, num_new = pair_scores.of(pairs)
            score_BK[rows.start - own.start : rows.stop - own.start][has_BK] = score_N
            num_pairs += num_new
            self.on_rerank(rows.stop - own.start, len(own))
        parts = self._gather([(score_BK, num_pairs)])
        score_QK = np.concatenate([part[0] for part in parts])
        not_numbers = np.flatnonzero(~np.isfinite(score_QK).all(axis=1))
        score_QK[not_numbers] = 0
        return _Reranking(score_QK, sum(part[1] for part in parts), time.monotonic() - started, not_numbers.tolist())

    def _rankable(self, task: RetrievalTask) -> _Pool:
        """The candidates that have a vector, the queries that can be scored against these, and what is left out."""
        problems: list[Problem] = []
        column: dict[str, int] = {}
        _all_different(task, "query", [query.qid for query in task.queries])
        _all_different(task, "candidate", [candidate.did for candidate in task.candidates])
        for candidate in task.candidates:
            if reason := self._candidate_vectors.problem(candidate.item):
                problems.append(Problem(candidate.did, reason))
            else:
                column[candidate.did] = len(column)
        queries: list[Query] = []
        wanted: list[Wanted] = []
        for query in task.queries:
            hidden = set(query.excluded)
            own = set(query.candidates)
            positives = [did for did in query.positives if did in column and did not in hidden]
            found = [did for did in positives if not own or did in own]
            if reason := self._query_vectors.problem(query.item):
                problems.append(Problem(query.qid, reason))
            elif not found:
                why = "can be read" if not positives else "is among its own candidates"
                problems.append(Problem(query.qid, f"none of its positives {why}"))
            else:
                queries.append(query)
                pool = [column[did] for did in dict.fromkeys(query.candidates) if did in column]
                wanted.append(
                    Wanted(
                        positives=[column[did] for did in found],
                        grades=[float(query.grades.get(did, 1)) for did in found] if query.grades else None,
                        excluded=[column[did] for did in dict.fromkeys(query.excluded) if did in column],
                        pool=np.array(pool, np.int64) if pool else None,
                    )
                )
        return _Pool(column, queries, wanted, problems)

    def _embed(self, query_items: list[Item], candidate_items: list[Item]) -> int:
        sides = ((self._query_vectors, query_items), (self._candidate_vectors, candidate_items))
        total, done = sum(len(vectors.missing(items)) for vectors, items in sides), 0
        self.on_progress(0, total)

        def advance(number: int) -> None:
            nonlocal done
            done += number
            self.on_progress(done, total)

        for vectors, items in sides:
            vectors.add(items, advance)
        return total


def sample_queries(task: RetrievalTask, limit: int) -> RetrievalTask:
    """The task with at most ``limit`` of its queries, always the same random sample, and all candidates.

    Only what can be asked is drawn from, so that a sample has lost no queries.
    """
    if limit >= len(task.queries):
        return task
    rows = np.random.default_rng(0).choice(len(task.queries), size=limit, replace=False)
    return replace(task, queries=[task.queries[row] for row in sorted(rows.tolist())], num_lost_queries=0)


class _Reranking(NamedTuple):
    """What a reranker said of the first K candidates of each query; without one, nothing.

    not_numbers: the queries of which it gave a score that is no number; all of theirs are 0.
    """

    score_QK: npt.NDArray[np.float32] = np.zeros((0, 0), np.float32)
    num_pairs: int = 0
    seconds: float = 0.0
    not_numbers: Sequence[int] = ()

    def fused(self, found: Found, pool: _Pool, weight: float) -> Found:
        """What was found, with these candidates in the order of both scores."""
        num_reranked = self.score_QK.shape[1]
        place_QK = np.zeros(self.score_QK.shape, np.int64)
        has_QK = found.column_QK[:, :num_reranked] >= 0
        for row, has_K in enumerate(has_QK):
            recall_K = found.score_QK[row, :num_reranked][has_K]
            place_QK[row, has_K] = places(recall_K, self.score_QK[row, has_K], weight)
        return put_first(found, pool.wanted, place_QK)


class _Pool(NamedTuple):
    """What of a task can be ranked: the column of each candidate by id, queries and their positives; and what not."""

    column: dict[str, int]
    queries: list[Query]
    wanted: list[Wanted]
    problems: list[Problem]


class _Scored(NamedTuple):
    """A search in numbers: by query, by chance, in the benchmark's reading."""

    values: _Values
    chance: _Values
    official: Official | None
    ranking: Ranking | None

    @classmethod
    def nothing(cls, metric: str | None, ties: Ties) -> _Scored:
        """Of a task of which no query can be scored."""
        official = metric and Official(metric=metric, ties=ties, value=None, expected=None, num_tied=0)
        return cls({}, {}, official or None, None)

    @classmethod
    def of(
        cls,
        found: Found,
        pool: _Pool,
        names: Iterable[str],
        metric: str | None = None,
        ties: Ties = "expected",
        depth: int = 0,
    ) -> _Scored:
        ranks = found.ranks
        values = {name: measure(name, ranks) for name in names}
        sizes = [
            len(pool.column if one.pool is None else one.pool)
            - len(one.excluded if one.pool is None else np.intersect1d(one.excluded, one.pool))
            for one in pool.wanted
        ]
        alike = chance_ranks(ranks.num_positives, sizes)
        chance = {name: measure(name, alike) for name in names}
        higher_Q, tied_Q, _ = ranks.best()
        of_query = dict(values)
        official = None
        dids = list(pool.column)
        if metric is not None:
            of_query[metric] = measure(metric, ranks, ties=ties)
            rivals_Q = ranks.sum_of((ranks.tied > ranks.tied_positives).astype(float))
            official = Official(
                metric=metric,
                ties=ties,
                value=float(of_query[metric].mean()),
                expected=float(values[metric].mean()),
                num_tied=int(np.count_nonzero(rivals_Q)),
                trec_eval=_trec_eval(metric, found, pool, dids),
            )
        ranking = Ranking(
            qids=[query.qid for query in pool.queries],
            rank_Q=1 + higher_Q,
            tied_Q=tied_Q,
            score_Q=found.best_Q,
            num_positives_Q=ranks.num_positives,
            num_candidates_Q=np.array(sizes, np.int64),
            metrics=of_query,
            dids=[[dids[column] for column in row if column >= 0] for row in found.column_QK[:, :depth].tolist()],
            score_QK=found.score_QK[:, :depth],
        )
        return cls(values, chance, official, ranking)


def _all_different(task: RetrievalTask, what: str, ids: Sequence[str]) -> None:
    """Raises InputError for an id that occurs twice: what is looked up by it would be one of the two."""
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(one for one in ids if one in seen or seen.add(one))  # type: ignore[func-returns-value]
        raise InputError(f"{task.label}: the {what} id {twice!r} occurs a second time; ids must be unique.")


def _depth_of(metric: str | None) -> int:
    """How many of the first candidates trec_eval must see to compute a metric."""
    return int(metric.partition("@")[2] or 0) if metric else 0


def _trec_eval(metric: str, found: Found, pool: _Pool, dids: Sequence[str]) -> float | None:
    """The mean by trec_eval's code, over the same queries and positives."""
    k = _depth_of(metric)
    if not k:
        return None
    rows = zip(pool.queries, found.column_QK[:, :k].tolist(), found.score_QK[:, :k].tolist(), strict=True)
    run = {
        query.qid: {dids[column]: score for column, score in zip(columns, scores, strict=True) if column >= 0}
        for query, columns, scores in rows
    }
    qrels = {
        query.qid: {dids[column]: query.grades.get(dids[column], 1) for column in one.positives}
        for query, one in zip(pool.queries, pool.wanted, strict=True)
    }
    try:
        values = trec_values([metric], run, qrels).get(metric)
    except ModuleNotFoundError:
        return None
    return None if values is None else sum(values.values()) / len(pool.queries)


class _Vectors:
    """The vectors of the items of one side, and why some have none."""

    def __init__(self, encode: Callable[[Sequence[Item]], npt.NDArray[np.float32]]) -> None:
        self._problems: dict[Item, str] = {}
        self._encode = encode
        self._row: dict[Item, int] = {}
        self._chunks: list[npt.NDArray[np.float32]] = []

    def problem(self, item: Item) -> str | None:
        """Why an item that has been added has no vector."""
        return self._problems.get(item)

    def missing(self, items: Iterable[Item]) -> list[Item]:
        """The distinct items that have neither a vector nor a problem yet."""
        return [item for item in dict.fromkeys(items) if item not in self._row and item not in self._problems]

    def add(self, items: Sequence[Item], on_progress: Callable[[int], None]) -> None:
        """Embeds the items that are missing; calls with how many more are done."""
        missing = self.missing(items)
        for start in range(0, len(missing), _CHUNK):
            chunk = missing[start : start + _CHUNK]
            vector_ND, problems = encode_readable(self._encode, chunk)
            for number, item in enumerate(chunk):
                if number in problems:
                    self._problems[item] = problems[number]
                else:
                    self._row[item] = len(self._row)
            if len(vector_ND):
                self._chunks.append(vector_ND)
            on_progress(len(chunk))

    def of(self, items: Iterable[Item]) -> npt.NDArray[np.float32]:
        """One row for each item, all of which have been added without a problem."""
        if len(self._chunks) > 1:
            self._chunks = [np.concatenate(self._chunks)]
        rows = [self._row[item] for item in items]
        if rows == list(range(len(self._chunks[0]))):
            return self._chunks[0]  # the usual case of a large pool, which need not be there twice
        return self._chunks[0][rows]


class _Store:
    """Embeddings on disk, found by what items show."""

    def __init__(self, embedder: Encoder, folder: Path) -> None:
        from quarterlight.training.embeddings import Contents, Embeddings  # needs what the extra eval installs

        self.contents = Contents()
        self.embeddings = Embeddings(embedder, folder)  # type: ignore[arg-type]

    def key(self, item: Item) -> bytes:
        """Of an item that has a vector."""
        key = self.contents.key(item)
        assert key is not None
        return key


class _StoredVectors:
    """As :class:`_Vectors`, on disk."""

    def __init__(self, store: _Store, role: Role) -> None:
        self._store = store
        self._role: Role = role
        self._key: dict[Item, bytes | None] = {}

    def problem(self, item: Item) -> str | None:
        key = self._key[item]
        if key is None:
            return self._store.contents.problem(item)
        return self._store.embeddings.problems[self._role].get(key)

    def missing(self, items: Iterable[Item]) -> list[Item]:
        by_key = self._by_key(items)
        return [by_key[key] for key in self._store.embeddings.missing(self._role, by_key)]

    def add(self, items: Sequence[Item], on_progress: Callable[[int], None]) -> None:
        # all of them: what is missing, another process may already see otherwise, and they must share the same list
        self._store.embeddings.add(self._role, self._by_key(items), on_progress=on_progress)

    def _by_key(self, items: Iterable[Item]) -> dict[bytes, Item]:
        """The items that can be read, each content once."""
        contents, distinct = self._store.contents, list(dict.fromkeys(items))
        contents.read([item for item in distinct if item not in self._key])
        for item in distinct:
            if item not in self._key:
                self._key[item] = contents.key(item)
        return {key: item for item in distinct if (key := self._key[item]) is not None}

    def of(self, items: Iterable[Item]) -> npt.NDArray[np.float32]:
        keys = [key for item in items if (key := self._key[item]) is not None]
        return self._store.embeddings.rows(self._role, keys)[:]


_Values: TypeAlias = "Mapping[str, npt.NDArray[np.floating[Any]]]"  # metric -> its value for each query


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
