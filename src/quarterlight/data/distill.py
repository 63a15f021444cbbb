"""Batches for distillation: queries, each with the candidates that a teacher has scored for it.

A batch is a pure function of mixture, lists, seed and step, as in contrastive training.

Legend of shapes: Q rows of a batch, C candidates of all rows, K those of one row at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from quarterlight.data.contrastive import Batch, Instructions, TaskMixture, instructed
from quarterlight.data.schedule import Rows
from quarterlight.errors import DatasetError, InputError
from quarterlight.records import Candidate

_Ints: TypeAlias = npt.NDArray[np.int64]
_Floats: TypeAlias = npt.NDArray[np.float32]

_ORDER, _INSTRUCTION = 11, 12  # set apart what is drawn from the same seed


@dataclass(frozen=True, kw_only=True)
class ScoredList:
    """What a teacher says of some candidates of a query: float32 [K] each."""

    dids: tuple[str, ...]
    recall: _Floats
    """cosines of the embedder that is distilled, in [-1, 1]"""
    rerank: _Floats
    """P(Yes) of the reranker, in [0, 1]"""


@dataclass(frozen=True, kw_only=True)
class DistillBatch(Batch):
    """Q queries and the C candidates of their lists one after the other.

    column: int64 [Q, K], which of the C candidates stand in the list of a query; 0 where it has fewer.
    listed: bool [Q, K], where it has one.  recall, rerank: float32 [Q, K], 0 where it has none.
    """

    column: _Ints
    listed: npt.NDArray[np.bool_]
    recall: _Floats
    rerank: _Floats


class DistillSampler:
    """The batches of a training run by step.

    mixture: tasks and how often each is drawn.
    lists: for each of its tasks, query id -> what is distilled; other queries are not trained on.
    batch_size: rows of a batch, over all devices together.  seed: decides order and instructions.
    instructions: as of :class:`quarterlight.data.contrastive.BatchSampler`.
    Raises DatasetError when there is no list with two candidates, or one names a candidate that the task lacks.
    """

    def __init__(
        self,
        mixture: TaskMixture,
        lists: Sequence[Mapping[str, ScoredList]],
        *,
        batch_size: int,
        seed: int = 0,
        instructions: Instructions = "first",
    ) -> None:
        if instructions not in get_args(Instructions):
            raise InputError(f"instructions is one of {', '.join(get_args(Instructions))}; got {instructions!r}.")
        if batch_size < 1 or seed < 0 or len(lists) != len(mixture.tasks):
            raise InputError(
                "A batch has at least 1 row, a seed is not negative, and every task has its lists; got "
                f"{batch_size}, {seed} and lists for {len(lists)} of {len(mixture.tasks)} tasks."
            )
        self.batch_size = batch_size
        self.seed = seed
        self.instructions = instructions
        self._tasks = mixture.tasks
        self._queries = [
            [query for query in task.queries if query.qid in found and len(found[query.qid].dids) > 1]
            for task, found in zip(mixture.tasks, lists, strict=True)
        ]
        if not any(self._queries):
            labels = ", ".join(task.label for task in mixture.tasks)
            raise DatasetError(f"No query of {labels} has a list of two candidates to learn from.")
        self._candidates = [{one.did: one for one in task.candidates} for task in mixture.tasks]
        self._lists = lists
        for task, queries, known, found in zip(mixture.tasks, self._queries, self._candidates, lists, strict=True):
            for query in queries:
                for did in found[query.qid].dids:
                    if did not in known:
                        raise DatasetError(f"{task.label}: {did!r}, scored for {query.qid!r}, is not in the pool.")
        self._rows = Rows([len(queries) for queries in self._queries], mixture.shares, seed=seed, order=_ORDER)

    @property
    def num_queries(self) -> int:
        """How many are trained on."""
        return sum(map(len, self._queries))

    @property
    def steps_per_epoch(self) -> int:
        """How many steps draw as many rows as there are queries."""
        return math.ceil(self.num_queries / self.batch_size)

    def batch(self, step: int) -> DistillBatch:
        """The batch of a step, counted from 0."""
        rows = self._rows.drawn(step * self.batch_size, self.batch_size)
        queries = [self._queries[task][place] for task, place in rows]
        found = [self._lists[task][query.qid] for (task, _), query in zip(rows, queries, strict=True)]
        most = max(len(one.dids) for one in found)
        column = np.zeros((len(rows), most), np.int64)
        listed = np.zeros((len(rows), most), np.bool_)
        recall, rerank = np.zeros((2, len(rows), most), np.float32)
        candidates: list[Candidate] = []
        for row, ((task, _), one) in enumerate(zip(rows, found, strict=True)):
            length = len(one.dids)
            column[row, :length] = len(candidates) + np.arange(length)
            listed[row, :length] = True
            recall[row, :length], rerank[row, :length] = one.recall, one.rerank
            candidates += [self._candidates[task][did] for did in one.dids]
        if self.instructions == "random":
            chance = np.random.default_rng((self.seed, _INSTRUCTION, step)).random(len(rows)).tolist()
            tasks = [self._tasks[task] for task, _ in rows]
            queries = [instructed(*row) for row in zip(queries, tasks, chance, strict=True)]
        return DistillBatch(
            queries=queries, candidates=candidates, column=column, listed=listed, recall=recall, rerank=rerank
        )
