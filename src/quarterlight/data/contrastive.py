"""Batches for contrastive training, drawn from a mixture of retrieval tasks.

A batch, or each run of rows in it, comes from one task, so that its in-batch negatives are of the kind the task must
tell apart.  It is a pure function of mixture, seed and step: every process of a run makes the same batch, and a run
that stops resumes at any step without drawing what went before.

Legend of shapes: Q rows of a batch, C its candidates (Q targets, then the hard negatives), U distinct contents in it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from quarterlight.data.retrieval import RetrievalTask
from quarterlight.data.schedule import Schedule
from quarterlight.errors import DatasetError, InputError
from quarterlight.records import Candidate, Item, Query

Fill: TypeAlias = Literal["none", "repeat"]
"""What becomes of a row with too few hard negatives: it has fewer, or some of them twice."""

Instructions: TypeAlias = Literal["first", "random"]
"""Which of several instructions a query has: the one it came with, or any, drawn anew whenever it is in a batch."""

_Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step embeds: queries, and candidates of theirs, in which one may be several times."""

    queries: list[Query]
    candidates: list[Candidate]

    @property
    def ids(self) -> tuple[list[str], list[str]]:
        """The ids of the queries and of the candidates, in order."""
        return [query.qid for query in self.queries], [candidate.did for candidate in self.candidates]


@dataclass(frozen=True, kw_only=True)
class ContrastiveBatch(Batch):
    """Rows of one task, or runs of rows of one task each; row i's target is candidate i.

    tasks: the task of each row.  queries: Q rows.
    candidates: C >= Q, the targets of the rows in order, then the hard negatives of the first row, the second, ...
    owner: int64 [C], for whose row a candidate is there.
    known_positive: bool [Q, C], where a candidate is not the row's target but known to answer its query all the same:
        another positive, one judged relevant, or a copy of one, whichever task it came with.  Such a pair must not
        count as a negative.  Its first Q columns, transposed, serve the loss from candidates to queries.
    """

    tasks: list[RetrievalTask]
    owner: npt.NDArray[np.int64]
    known_positive: npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One pass over a task: which query stands where, and which of its positives is the target."""

    query: _Ints  # [runs, rows of a run]
    target: _Ints  # likewise, numbers of candidates


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: row n is ``values[start[n] : start[n + 1]]``."""

    values: _Ints
    start: _Ints

    @classmethod
    def of(cls, owner: _Ints, values: _Ints, rows: int) -> Ragged:
        """From pairs of a row and a value, sorted by row."""
        return cls(values, np.searchsorted(owner, np.arange(rows + 1)))

    @cached_property
    def length(self) -> _Ints:
        return np.diff(self.start)

    def rows(self, numbers: _Ints) -> tuple[_Ints, _Ints]:
        """The values of some rows one after the other, and for each its place among ``numbers``."""
        length = self.length[numbers]
        owner = np.repeat(np.arange(len(numbers)), length)
        skipped = self.start[numbers] - (np.cumsum(length) - length)
        return owner, self.values[np.arange(len(owner)) + skipped[owner]]


class MixtureTable:
    """All queries and candidates of a mixture, numbered through, and told apart by what they show, not by their ids.

    positives: candidates, by query.  augmented: these and those judged relevant to the query, likewise.
    negatives: candidates that are no known answer, each content once, by query.
    answers: contents, sorted, by question.  The same question may stand in several rows and tasks, each with another
    answer: all of them are right.  It counts as the same only under the same instruction.
    """

    def __init__(self, tasks: Sequence[RetrievalTask]) -> None:
        self.tasks = tasks
        self.queries = [query for task in tasks for query in task.queries]
        self.candidates = [candidate for task in tasks for candidate in task.candidates]
        self.first = np.cumsum([0] + [len(task.queries) for task in tasks])  # query of each task
        self.task_of_query = np.repeat(np.arange(len(tasks)), np.diff(self.first))
        counter = itertools.count()
        number = [{candidate.did: next(counter) for candidate in task.candidates} for task in tasks]
        known: dict[Hashable, int] = {}
        self.content = _numbers(known.setdefault(_content(c.item), len(known)) for c in self.candidates)
        self.num_contents = len(known)
        asked: dict[Hashable, int] = {}
        self.question = _numbers(
            asked.setdefault((*_content(q.item), q.item.instruction), len(asked)) for q in self.queries
        )
        owner, positive = self._pairs("positives", number)
        self.positives = Ragged.of(owner, positive, len(self.queries))
        if not self.positives.length.all():
            missing = int(np.argmin(self.positives.length))
            label = tasks[self.task_of_query[missing]].label
            raise DatasetError(f"{label}: the query {self.queries[missing].qid!r} has no positive candidate.")
        relevant_owner, relevant = self._pairs("also_relevant", number)
        order = np.argsort(np.append(owner, relevant_owner), kind="stable")
        self.augmented = Ragged.of(
            np.append(owner, relevant_owner)[order], np.append(positive, relevant)[order], len(self.queries)
        )
        answer = np.sort(self._key(self.question[np.append(owner, relevant_owner)], np.append(positive, relevant)))
        answer = answer[np.diff(answer, prepend=-1) > 0]
        self.answers = Ragged.of(answer // self.num_contents, answer % self.num_contents, len(asked))
        owner, negative = self._pairs("negatives", number)
        asked_for = self._key(self.question[owner], negative)
        usable = answer[np.minimum(np.searchsorted(answer, asked_for), len(answer) - 1)] != asked_for
        owner, negative = owner[usable], negative[usable]
        once = np.sort(np.unique(self._key(owner, negative), return_index=True)[1])
        self.negatives = Ragged.of(owner[once], negative[once], len(self.queries))

    def _key(self, row: _Ints, candidate: _Ints) -> _Ints:
        """One number for a row and the content of a candidate."""
        return row * self.num_contents + self.content[candidate]

    def _pairs(self, column: str, numbers: Sequence[dict[str, int]]) -> tuple[_Ints, _Ints]:
        """Query and candidate of every id that the queries name in a column, in order; numbers of the ids by task."""
        lengths = _numbers(len(getattr(query, column)) for query in self.queries)
        parts = []
        for task, number in zip(self.tasks, numbers, strict=True):
            try:
                parts.append(_numbers(number[did] for query in task.queries for did in getattr(query, column)))
            except KeyError as error:
                raise DatasetError(
                    f"{task.label}: {error}, among the {column} of a query, is not in the pool of the task."
                ) from None
        return np.repeat(np.arange(len(self.queries)), lengths), np.concatenate(parts)

    def plan(self, task: int, size: int, seed: Sequence[int]) -> _Plan:
        """Full runs of one task in which no target occurs twice, unless it has more rows than there are runs.

        Rows of one target are dealt to the runs in turn.  What does not fill a run waits for another pass.
        """
        generator = np.random.default_rng(seed)
        first, rows = int(self.first[task]), len(self.tasks[task].queries)
        query = first + generator.permutation(rows)[: rows - rows % size]
        choice = (generator.random(len(query)) * self.positives.length[query]).astype(np.int64)
        target = self.positives.values[self.positives.start[query] + choice]
        distinct, content = np.unique(self.content[target], return_inverse=True)
        order = np.argsort(generator.permutation(len(distinct))[content], kind="stable")
        runs = len(query) // size
        dealt = order.reshape(size, runs).T[generator.permutation(runs)]
        return _Plan(query=query[dealt], target=target[dealt])

    def draw_negatives(self, query: _Ints, count: int, fill: Fill, seed: Sequence[int]) -> tuple[_Ints, _Ints]:
        """``count`` hard negatives of each row, without repetition where there are as many, and the row of each."""
        draw = np.random.default_rng(seed).random((len(query), count))
        available = self.negatives.length[query]
        chosen = np.zeros((len(query), count), np.int64)
        for column in range(count):
            # Floyd's sampling: however many there are to choose from, each set is as likely, in ``count`` steps
            last = available - count + column
            picked = (draw[:, column] * (last + 1)).astype(np.int64)
            picked = np.where((chosen[:, :column] == picked[:, None]).any(axis=1), last, picked)
            again = (draw[:, column] * available).astype(np.int64)
            few = np.where(column < available, column, again)
            chosen[:, column] = np.where(available > count, picked, few)
        keep = (np.arange(count) if fill == "none" else np.zeros(count, np.int64)) < available[:, None]
        return self.negatives.values[(self.negatives.start[query][:, None] + chosen)[keep]], np.nonzero(keep)[0]

    def known_positive(self, query: _Ints, candidate: _Ints) -> npt.NDArray[np.bool_]:
        """bool [Q, C]: which candidates answer which queries, the targets on the diagonal left out."""
        content, column = np.unique(self.content[candidate], return_inverse=True)
        place = np.full(self.num_contents, -1, np.int32)
        place[content] = np.arange(len(content))
        row, answer = self.answers.rows(self.question[query])
        place_of_answer = place[answer]
        there = place_of_answer >= 0
        known_UQ = np.zeros((len(content), len(query)), np.bool_)
        known_UQ[place_of_answer[there], row[there]] = True
        known_CQ = known_UQ[column]  # whole rows: ten times as fast as picking the columns of [Q, U]
        np.fill_diagonal(known_CQ, False)
        return known_CQ.T


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

    batch_size: rows of a batch, over all devices together.
    num_negatives: hard negatives a row, at most.
    seed: decides order, targets and negatives.
    sub_batch_size: the batch is made of runs of so many rows, each of one task (the interleaved sub-batches of VLM2Vec,
        arXiv:2410.05160); ``None`` makes it one run.  A task with fewer queries gives runs of all its queries.
    fill: a row with fewer hard negatives than ``num_negatives`` has what there is (``none``), or fills up by drawing
        from them again (``repeat``).  A row without any stays without.
    instructions: ``random`` gives a query any of its task's, with the same chance (U-MARVEL), unless it has another of
        its own.  Which one depends on seed, step and row alone.
    """

    def __init__(
        self,
        mixture: TaskMixture,
        *,
        batch_size: int,
        num_negatives: int = 0,
        seed: int = 0,
        sub_batch_size: int | None = None,
        fill: Fill = "none",
        instructions: Instructions = "first",
    ) -> None:
        if batch_size < 1 or num_negatives < 0 or seed < 0:
            raise InputError(
                "A batch has at least 1 row and 0 negatives a row, and its seed is not negative; "
                f"got {batch_size}, {num_negatives} and {seed}."
            )
        self.run_size = batch_size if sub_batch_size is None else sub_batch_size
        if self.run_size < 1 or batch_size % self.run_size:
            raise InputError(
                f"A batch of {batch_size} rows is made of whole sub-batches, got a sub_batch_size of {sub_batch_size}."
            )
        if fill not in get_args(Fill):
            raise InputError(f"fill is one of {', '.join(get_args(Fill))}; got {fill!r}.")
        if instructions not in get_args(Instructions):
            raise InputError(f"instructions is one of {', '.join(get_args(Instructions))}; got {instructions!r}.")
        self.mixture = mixture
        self.batch_size = batch_size
        self.num_negatives = num_negatives
        self.seed = seed
        self.fill = fill
        self.instructions = instructions
        self._table = MixtureTable(mixture.tasks)
        self._sizes = np.minimum([len(task.queries) for task in mixture.tasks], self.run_size)
        self._plans: dict[int, tuple[int, _Plan]] = {}  # by task: the pass and its plan
        self._schedule = Schedule(mixture.shares, seed)

    @property
    def runs(self) -> int:
        """Runs of a batch."""
        return self.batch_size // self.run_size

    @property
    def steps_per_epoch(self) -> int:
        """How many steps draw as many rows as there are queries."""
        return math.ceil(len(self._table.queries) / (self.runs * (self.mixture.shares * self._sizes).sum()))

    def batch(self, step: int) -> ContrastiveBatch:
        """The batch of a step, counted from 0."""
        table = self._table
        rows = [self._run(task, turn) for task, turn in self._schedule.turns(step * self.runs, self.runs)]
        query, target = (np.concatenate(part) for part in zip(*rows, strict=True))
        # the last number sets it apart from the seed of any plan: trailing zeros make no difference to numpy
        negatives, row = table.draw_negatives(query, self.num_negatives, self.fill, (self.seed, step, 0, 1))
        candidate = np.append(target, negatives)
        tasks = [table.tasks[number] for number in table.task_of_query[query].tolist()]
        queries = [table.queries[number] for number in query.tolist()]
        if self.instructions == "random":
            chance = np.random.default_rng((self.seed, step, 0, 2)).random(len(query)).tolist()
            queries = [instructed(*row) for row in zip(queries, tasks, chance, strict=True)]
        return ContrastiveBatch(
            tasks=tasks,
            queries=queries,
            candidates=[table.candidates[number] for number in candidate.tolist()],
            owner=np.append(np.arange(len(query)), row),
            known_positive=table.known_positive(query, candidate),
        )

    def batches(self, start: int, stop: int) -> Iterator[ContrastiveBatch]:
        """The batches of the steps from ``start`` up to, not including, ``stop``."""
        return (self.batch(step) for step in range(start, stop))

    def _run(self, task: int, turn: int) -> tuple[_Ints, _Ints]:
        """Queries and targets of the run that is drawn from a task after ``turn`` others."""
        size = int(self._sizes[task])
        epoch, index = divmod(turn, len(self.mixture.tasks[task].queries) // size)
        made, plan = self._plans.get(task, (-1, None))
        if plan is None or made != epoch:
            plan = self._table.plan(task, size, (self.seed, task, epoch))
            self._plans[task] = epoch, plan
        return plan.query[index], plan.target[index]


def instructed(query: Query, task: RetrievalTask, chance: float) -> Query:
    """The query with one of the instructions of its task, by a number in [0, 1)."""
    if not task.instructions or query.item.instruction not in (None, *task.instructions):
        return query
    instruction = task.instructions[int(chance * len(task.instructions))]
    return replace(query, item=replace(query.item, instruction=instruction))


def _numbers(values: Iterator[int]) -> _Ints:
    return np.fromiter(values, np.int64)


def _content(item: Item) -> tuple[Hashable, ...]:
    """What an item shows: the same for copies under different ids."""
    return item.text, item.images
