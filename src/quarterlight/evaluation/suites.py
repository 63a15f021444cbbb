"""Benchmarks of several tasks: what is in each, how its official evaluator scores it, and what it averages.

A suite is data: ``resources/suites.csv`` and ``resources/averages.csv`` beside this module name the tasks, and the
registry of datasets (:mod:`quarterlight.data.registry`) says where each lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from quarterlight.data.registry import DatasetEntry

Ties: TypeAlias = Literal["first", "strict", "expected"]
"""What candidates of one score are worth to the official evaluator: the first in the order of the list wins, the
positive loses, or the mean over all their orders counts."""


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """One line of a suite's table: a dataset, and how its scores are computed.

    A metric is one of ``precision@1``, ``hit@k``, ``recall@k``, ``ndcg@k``, ``ndcg_linear@k``, ``map@k``, ``mrr@k`` and
    ``accuracy`` (a query with two candidates, right when its positive has the strictly greater score).
    """

    name: str
    """unique in its suite: ``ImageNet-1K``, ``Flickr30K t2i``, ``M-BEIR/CIRR task7``"""
    loader: str
    """what reads its files: a key of ``quarterlight.data.benchmarks.LOADERS``"""
    metric: str
    """that the suite averages"""
    also: tuple[str, ...] = ()
    """metrics that its papers print beside"""
    ties: Ties
    group: str
    """meta-task or collection, as the papers' tables head their columns"""
    in_distribution: str
    """IND or OOD; empty where the suite makes no difference"""
    entry: DatasetEntry | None
    """in the registry; ``None`` for this project's own datasets"""
    direction: str
    """as our task names spell it: ``t2i``, ``it2t``, ``t2vd``, ``t2v``"""
    query_instruction: str | None = None
    """of items that have none of their own; ``None`` takes the paper's for the direction"""
    document_instruction: str | None = None
    """likewise; ``None`` keeps to the model's default for the modality"""
    hub_id: str | None = None
    """repository on the Hugging Face hub; ``None`` for what must be fetched by hand"""
    revision: str | None = None
    """commit that is pinned; ``None`` where no source names one"""
    files: tuple[str, ...] = ()
    """patterns of the files of the repository that the task needs"""
    options: Mapping[str, str] = field(default_factory=dict)
    """for the loader: config, file, split and the like"""


@dataclass(frozen=True, kw_only=True)
class Average:
    """An unweighted mean.

    of: names of tasks, and of averages that the suite lists before this one.
    """

    name: str
    of: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A benchmark.

    averages: in the order of the papers' columns.
    reference_table: of published scores to print beside ours, see :mod:`quarterlight.evaluation.reference`; its columns
        are names of tasks and averages.  ``None`` where nothing is published.
    """

    name: str
    title: str
    tasks: tuple[SuiteTask, ...]
    averages: tuple[Average, ...]
    reference_table: str | None

    def average(self, scores: Mapping[str, float]) -> dict[str, float | None]:
        """The averages of tasks' scores by name, in order; ``None`` where the score of any member is missing."""
        known: dict[str, float | None] = {}
        for one in self.averages:
            members = [known[name] if name in known else scores.get(name) for name in one.of]
            values = [value for value in members if value is not None]
            known[one.name] = sum(values) / len(values) if values and len(values) == len(members) else None
        return known
