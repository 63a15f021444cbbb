"""Batches for contrastive training, drawn from a mixture of retrieval tasks.

A batch comes from one task, so that its in-batch negatives are of the kind the task must tell apart.  It is a pure
function of mixture, seed and step: a run that stops resumes at any step without drawing what went before.

Legend of shapes: Q rows of a batch, C its candidates (Q targets, then the labelled negatives).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError, InputError
from quarterlight.records import Candidate, Item, Query

# Steps along the golden ratio fill the unit interval evenly however many there are, so the shares of the tasks hold to
# within a few steps over any stretch of a run; independent draws would stray by the square root of its length.
_GOLDEN = (math.sqrt(5) - 1) / 2
_SCHEDULE_CHUNK = 4096


@dataclass(frozen=True, kw_only=True)
class ContrastiveBatch:
    """Rows of one task; row i's target is candidate i.

    queries: Q rows.  candidates: C >= Q, the targets of the rows in order, then their labelled hard negatives.
    known_positive: bool [Q, C], where a candidate is not the row's target but known to answer its query all the same:
        another positive, or a copy of one.  Such a pair must not count as a negative.  Its first Q columns, transposed,
        serve the loss from candidates to queries.
    """

    task: RetrievalTask
    queries: list[Query]
    candidates: list[Candidate]
    known_positive: npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One pass over a task: which query stands where, and which of its positives is the target."""

    query: npt.NDArray[np.int64]  # [batches, Q]
    target: npt.NDArray[np.int64]  # [batches, Q], indices of candidates


class _Source:
    """A task with candidates and queries told apart by what they show rather than by their ids."""

    def __init__(self, task: RetrievalTask) -> None:
        self.task = task
        column = {candidate.did: index for index, candidate in enumerate(task.candidates)}
        contents: dict[Hashable, int] = {}
        self.content = [contents.setdefault(_content(c.item), len(contents)) for c in task.candidates]
        self.positives = [[column[did] for did in query.positives] for query in task.queries]
        self.negatives = [[column[did] for did in query.negatives] for query in task.queries]
        # The same question may stand in several rows, each with another answer: all of them are right.
        answers: dict[Hashable, set[int]] = {}
        for query, positives in zip(task.queries, self.positives, strict=True):
            answers.setdefault(_content(query.item), set()).update(self.content[c] for c in positives)
        self.answers = [answers[_content(query.item)] for query in task.queries]

    def plan(self, batch_size: int, seed: Sequence[int]) -> _Plan:
        """Full batches in which no target occurs twice, unless it has more rows than there are batches.

        Rows of one target are dealt to the batches in turn.  What does not fill a batch waits for another pass.
        """
        generator = np.random.default_rng(seed)
        rows = len(self.positives)
        size = min(batch_size, rows)
        query = generator.permutation(rows)[: rows - rows % size]
        draws = generator.random(len(query)).tolist()
        choices = (self.positives[q] for q in query.tolist())
        target = np.array([known[int(draw * len(known))] for known, draw in zip(choices, draws, strict=True)])
        content = np.asarray(self.content)[target]
        order = np.argsort(generator.permutation(len(self.content))[content], kind="stable")
        batches = len(query) // size
        dealt = order.reshape(size, batches).T[generator.permutation(batches)]
        return _Plan(query=query[dealt], target=target[dealt])

    def batch(self, query: list[int], target: list[int], num_negatives: int, seed: Sequence[int]) -> ContrastiveBatch:
        """The rows of queries and targets given by index, with negatives drawn and known positives marked."""
        candidates = [*target, *self._draw_negatives(query, num_negatives, seed)]
        columns: dict[int, list[int]] = {}
        for column, candidate in enumerate(candidates):
            columns.setdefault(self.content[candidate], []).append(column)
        known_positive = np.zeros((len(query), len(candidates)), dtype=np.bool_)
        for row, q in enumerate(query):
            for content in self.answers[q] & columns.keys():
                known_positive[row, columns[content]] = True
            known_positive[row, row] = False
        return ContrastiveBatch(
            task=self.task,
            queries=[self.task.queries[q] for q in query],
            candidates=[self.task.candidates[c] for c in candidates],
            known_positive=known_positive,
        )

    def _draw_negatives(self, query: Sequence[int], count: int, seed: Sequence[int]) -> Iterator[int]:
        """Up to ``count`` labelled negatives of each row, without repetition; never one that is also a known answer."""
        generator = np.random.default_rng(seed)
        for q in query if count else ():
            usable = [c for c in self.negatives[q] if self.content[c] not in self.answers[q]]
            yield from generator.permutation(usable)[:count].tolist() if len(usable) > count else usable


@dataclass(frozen=True, kw_only=True)
class TaskMixture:
    """Tasks and how often each is drawn.

    weights: one positive number a task, in proportion to its share of the batches; ``None`` gives every query the same
        chance.
    """

    tasks: Sequence[RetrievalTask]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InputError("A mixture needs at least one task.")
        for task in self.tasks:
            if not task.queries:
                raise DatasetError(f"{task.label} has no queries to train on.")
        if self.weights is not None and (
            len(self.weights) != len(self.tasks) or not all(0 < w < math.inf for w in self.weights)
        ):
            raise InputError(f"{len(self.tasks)} tasks need as many positive weights, got {self.weights}.")

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """The share of the batches of each task, [tasks], summing to 1."""
        weights = np.array(self.weights or [len(task.queries) for task in self.tasks], dtype=np.float64)
        return weights / weights.sum()


class BatchSampler:
    """The batches of a training run by step.

    batch_size: rows of a batch; a task with fewer queries gives batches of all its queries.
    num_negatives: labelled hard negatives a row, at most; rows with fewer give what they have.
    seed: decides order, targets and negatives.
    """

    def __init__(self, mixture: TaskMixture, *, batch_size: int, num_negatives: int = 0, seed: int = 0) -> None:
        if batch_size < 1 or num_negatives < 0 or seed < 0:
            raise InputError(
                "A batch has at least 1 row and 0 negatives a row, and its seed is not negative; "
                f"got {batch_size}, {num_negatives} and {seed}."
            )
        self.mixture = mixture
        self.batch_size = batch_size
        self.num_negatives = num_negatives
        self.seed = seed
        self._sources = [_Source(task) for task in mixture.tasks]
        self._plans: dict[int, tuple[int, _Plan]] = {}  # by task: the pass and its plan
        self._task_of_step = np.zeros(0, np.int64)
        self._turn_of_step = np.zeros(0, np.int64)  # how many steps of the same task went before

    @cached_property
    def steps_per_epoch(self) -> int:
        """How many steps draw as many rows as there are queries."""
        queries = np.array([len(task.queries) for task in self.mixture.tasks])
        return math.ceil(queries.sum() / (self.mixture.shares * np.minimum(queries, self.batch_size)).sum())

    def batch(self, step: int) -> ContrastiveBatch:
        """The batch of a step, counted from 0."""
        while step >= len(self._task_of_step):
            self._extend_schedule()
        number, turn = int(self._task_of_step[step]), int(self._turn_of_step[step])
        source = self._sources[number]
        batches = len(source.positives) // min(self.batch_size, len(source.positives))
        epoch, index = divmod(turn, batches)
        if self._plans.get(number, (-1, None))[0] != epoch:
            self._plans[number] = epoch, source.plan(self.batch_size, (self.seed, number, epoch))
        plan = self._plans[number][1]
        query, target = plan.query[index].tolist(), plan.target[index].tolist()
        return source.batch(query, target, self.num_negatives, (self.seed, number, epoch, index))

    def batches(self, start: int, stop: int) -> Iterator[ContrastiveBatch]:
        """The batches of the steps from ``start`` up to, not including, ``stop``."""
        return (self.batch(step) for step in range(start, stop))

    def _extend_schedule(self) -> None:
        done = len(self._task_of_step)
        offset = np.random.default_rng(self.seed).random()
        place = (offset + _GOLDEN * np.arange(done, done + _SCHEDULE_CHUNK)) % 1.0
        bounds = np.cumsum(self.mixture.shares)[:-1]
        self._task_of_step = np.concatenate([self._task_of_step, np.searchsorted(bounds, place, side="right")])
        self._turn_of_step = np.empty_like(self._task_of_step)
        for number in range(len(self._sources)):
            mine = self._task_of_step == number
            self._turn_of_step[mine] = np.arange(np.count_nonzero(mine))


def _content(item: Item) -> Hashable:
    """What an item shows: the same for copies under different ids."""
    return item.text, item.images
