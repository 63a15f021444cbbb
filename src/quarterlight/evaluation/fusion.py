"""The weight of a reranker beside the cosine, chosen for each task on its validation split (U-MARVEL+)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import InputError, did_you_mean
from quarterlight.evaluation.retrieval import Encoder, Reranker, RetrievalEvaluator
from quarterlight.metrics.ranking import METRICS

SPLIT = "val"
"""The one split that a weight may be chosen on: on test, it would be an answer that was looked up."""

WEIGHTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Weights that are tried unless others are given, in [0, 1]; few points, since each is a chance to fit noise."""

METRIC = "mrr"
"""Of each query in [0, 1], by which they are compared unless another is named: all K places count in it."""


@dataclass(frozen=True, kw_only=True)
class TunedWeight:
    """The weight that is best for one task, or for all tasks of one name.

    dataset: ``None`` where it is for those of all datasets that were tuned.
    scores: weight -> mean of the metric over the queries that could be scored; at 0 the reranker has no say.
    num_queries: how many these are.
    """

    dataset: str | None
    task: str
    weight: float
    scores: Mapping[float, float]
    num_queries: int

    @property
    def label(self) -> str:
        """``dataset/task``, or ``task`` for all datasets: what a reranker's ``fusion_weights`` call it."""
        return self.task if self.dataset is None else f"{self.dataset}/{self.task}"


def check_split(split: str) -> None:
    """Raises InputError for another split than :data:`SPLIT`."""
    if split != SPLIT:
        raise InputError(
            f"The weight of a reranker is chosen on the split {SPLIT!r} alone, got {split!r}: what was chosen on the "
            "queries that are measured says nothing about others."
        )


def tune_fusion(
    embedder: Encoder,
    reranker: Reranker,
    tasks: Sequence[RetrievalTask],
    *,
    rerank: int,
    weights: Sequence[float] = WEIGHTS,
    metric: str = METRIC,
    on_rerank: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> list[TunedWeight]:
    """For each task the weight of the reranker that ranks best; of equal ones the smallest.

    Every task is searched and reranked once, whatever the number of weights.
    tasks: of the split :data:`SPLIT`.  rerank: candidates of each query that are reranked.
    metric: a name of :data:`quarterlight.metrics.ranking.METRICS`.
    on_rerank: called with a task's label, how many of its queries are reranked, and how many there are.
    Raises InputError for tasks of another split, weights outside [0, 1], an unknown metric or a task without queries
    that can be scored.
    """
    for task in tasks:
        check_split(task.split)
    if not weights or not all(0 <= weight <= 1 for weight in weights):
        raise InputError(f"Weights to try are one or more numbers from 0 to 1, got {list(weights)}.")
    if metric not in METRICS:
        raise InputError(f"There is no metric {metric!r}. {did_you_mean(metric, METRICS)}")
    evaluator = RetrievalEvaluator(embedder, reranker=reranker, rerank=rerank)
    tuned = []
    for task in tasks:
        evaluator.on_rerank = lambda done, total, label=task.label: on_rerank(label, done, total)  # type: ignore[misc]
        found = evaluator.by_weight(task, sorted(set(weights)))
        num_queries = next(iter(found.values())).num_queries
        if not num_queries:
            raise InputError(f"{task.label} has no query that can be scored, so that no weight is better.")
        scores = {weight: one.metrics[metric] for weight, one in found.items()}
        tuned.append(_tuned(task.dataset, task.task, scores, num_queries))
    return tuned


def by_direction(tuned: Sequence[TunedWeight]) -> list[TunedWeight]:
    """For each direction the weight that is best over all datasets that were tuned for it; of equal ones the smallest.

    It is for what is none of these: searches, and benchmarks, whose tasks are called otherwise.  Nothing is measured
    again: the score of a weight is the mean of the datasets' scores, in which each counts the same.
    tuned: of one call of :func:`tune_fusion`, so that all tried the same weights.
    """
    tasks: dict[str, list[TunedWeight]] = {}
    for one in tuned:
        tasks.setdefault(one.task, []).append(one)
    return [
        _tuned(
            None,
            name,
            {weight: fmean(one.scores[weight] for one in several) for weight in several[0].scores},
            sum(one.num_queries for one in several),
        )
        for name, several in tasks.items()
    ]


def _tuned(dataset: str | None, task: str, scores: Mapping[float, float], num_queries: int) -> TunedWeight:
    best = max(scores, key=lambda weight: (scores[weight], -weight))
    return TunedWeight(dataset=dataset, task=task, weight=best, scores=scores, num_queries=num_queries)
