"""Rows for training a reranker: a query, one right candidate, and hard negatives for a pair and for a list.

Magic-MM-Embedding, section 3.4.  A row is a pure function of mixture, seed and number: every process of a run knows all
rows, and a run that stops resumes at any step without drawing what went before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from quarterlight.data.contrastive import MixtureTable, Ragged, TaskMixture
from quarterlight.data.schedule import Rows
from quarterlight.errors import DatasetError, InputError
from quarterlight.records import Candidate, Query

_Ints: TypeAlias = npt.NDArray[np.int64]

_HELD_OUT_SHARE = 0.1  # of the queries at most, or a small dataset would have none left to train on
_ORDER, _DRAW, _HELD_OUT, _HELD_OUT_DRAW = range(1, 5)  # set apart what is drawn from the same seed


@dataclass(frozen=True, kw_only=True)
class RerankRow:
    """One query with what it is compared to.

    positive: from the augmented positives, those of the dataset and those judged relevant.
    negative: a hard negative, the other half of the pair (paper, eq. 5).
    listed: M hard negatives and, at ``slot``, the positive (eq. 6); empty for a query with too few negatives.
    """

    query: Query
    positive: Candidate
    negative: Candidate
    listed: tuple[Candidate, ...] = ()
    slot: int | None = None


@dataclass(frozen=True, kw_only=True)
class RerankCounts:
    """What becomes of the queries of a mixture, each entry of it counted for itself."""

    queries: int
    """all of them"""
    trained: int
    """of them, those that rows are drawn from"""
    pointwise_only: int
    """of these, those with too few negatives for a list"""
    skipped: int
    """with too few negatives to be of use"""
    held_out: int
    """never trained on, since they, or others that ask the same, are for validation"""


class RerankSampler:
    """The rows of a training run by number.

    mixture: tasks and how often each is drawn; the negatives of their queries are hard ones.
    batch_size: rows of a batch, over all devices together.
    min_negatives, max_negatives: M is uniform between them, but not above what a query has; a query with fewer than
        ``min_negatives`` has no list, one with none is left out.
    seed: decides order, candidates and slots.
    held_out: queries that are kept for validation, though no more than a tenth of them; whatever asks the same is left
        out of training too.
    only_lists: leaves out queries with too few negatives for a list.
    Raises DatasetError when no query has negatives enough.

    What is a negative is told by what it shows, as in contrastive training: never a copy of an answer to the query, nor
    of an answer to the same question in another row.
    """

    def __init__(
        self,
        mixture: TaskMixture,
        *,
        batch_size: int,
        min_negatives: int = 2,
        max_negatives: int = 5,
        seed: int = 0,
        held_out: int = 0,
        only_lists: bool = False,
    ) -> None:
        if batch_size < 1 or seed < 0 or held_out < 0 or not 1 <= min_negatives <= max_negatives:
            raise InputError(
                "A batch has at least 1 row, a seed and a number of held-out queries are not negative, and a list has "
                f"1 <= min_negatives <= max_negatives; got {batch_size}, {seed}, {held_out}, {min_negatives} and "
                f"{max_negatives}."
            )
        self.batch_size = batch_size
        self.min_negatives = min_negatives
        self.max_negatives = max_negatives
        self.seed = seed
        self._table = table = MixtureTable(mixture.tasks)
        usable = table.negatives.length >= (min_negatives if only_lists else 1)
        if not usable.any():
            labels = ", ".join(task.label for task in mixture.tasks)
            raise DatasetError(
                f"No query of {labels} has hard negatives enough: mine or judge some, or keep labelled ones."
            )
        self._held_out = self._choose(usable, mixture.shares, held_out)
        trained = usable & ~np.isin(table.question, table.question[self._held_out])
        if not trained.any():  # all ask the same
            self._held_out, trained = self._held_out[:0], usable
        few = trained & (table.negatives.length < min_negatives)
        self.counts = RerankCounts(
            queries=len(usable),
            trained=int(trained.sum()),
            pointwise_only=int(few.sum()),
            skipped=int((~usable).sum()),
            held_out=int((usable & ~trained).sum()),
        )
        self._queries = [
            first + np.flatnonzero(trained[first:stop])
            for first, stop in zip(table.first[:-1], table.first[1:], strict=True)
        ]
        self._rows = Rows([len(queries) for queries in self._queries], mixture.shares, seed=seed, order=_ORDER)

    def rows(self, step: int) -> list[RerankRow]:
        """The rows of a step's batch, counted from 0."""
        first = step * self.batch_size
        drawn = self._rows.drawn(first, self.batch_size)
        return [
            self._row(int(self._queries[task][row]), _DRAW, number) for number, (task, row) in enumerate(drawn, first)
        ]

    @property
    def held_out(self) -> list[RerankRow]:
        """The rows for validation, always the same."""
        return [self._row(int(query), _HELD_OUT_DRAW, place) for place, query in enumerate(self._held_out)]

    def _choose(self, usable: npt.NDArray[np.bool_], shares: npt.NDArray[np.float64], wanted: int) -> _Ints:
        """Queries to hold out, each task in proportion to its share."""
        queries = np.flatnonzero(usable)
        count = min(wanted, int(_HELD_OUT_SHARE * len(queries)))
        task = self._table.task_of_query[queries]
        chance = (shares / np.maximum(1, np.bincount(task, minlength=len(shares))))[task]
        generator = np.random.default_rng((self.seed, _HELD_OUT))
        return generator.choice(queries, count, replace=False, p=chance / chance.sum())

    def _row(self, query: int, *drawn: int) -> RerankRow:
        generator = np.random.default_rng((self.seed, *drawn))
        table = self._table
        positives, negatives = self._of(table.augmented, query), self._of(table.negatives, query)
        positive = positives[int(generator.integers(len(positives)))]
        negative = negatives[int(generator.integers(len(negatives)))]
        count = min(int(generator.integers(self.min_negatives, self.max_negatives + 1)), len(negatives))
        row = RerankRow(query=table.queries[query], positive=positive, negative=negative)
        if count < self.min_negatives:
            return row
        listed = [negatives[n] for n in generator.choice(len(negatives), count, replace=False).tolist()]
        slot = int(generator.integers(count + 1))
        listed.insert(slot, positive)
        return RerankRow(query=row.query, positive=positive, negative=negative, listed=tuple(listed), slot=slot)

    def _of(self, column: Ragged, query: int) -> Sequence[Candidate]:
        found = column.values[column.start[query] : column.start[query + 1]].tolist()
        return [self._table.candidates[number] for number in found]
