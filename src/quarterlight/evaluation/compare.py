"""Two runs of a suite against each other: the difference of every task, and how sure it is.

Paired bootstrap (Koehn, EMNLP 2004): queries are drawn again with replacement, the same for both runs, and the mean
difference of each draw is noted; the interval holds the middle 95% of these.  A mean depends only on how often each
value is drawn, so counts of values are drawn in place of queries.

N queries, R draws, V distinct values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from quarterlight.errors import InputError
from quarterlight.evaluation.benchmark import file_name, read_record, tasks_of
from quarterlight.evaluation.suites import Suite, load_suite

DRAWS = 10_000

_NUMBERS = 1 << 24  # counts that are drawn at once

_ASKED = {
    "revision": "revision",
    "pictures_revision": "pictures",
    "rows_sha256": "rows",
    "max_tiles": "tiles",
    "instructions": "instructions",
}
"""What of a task's record says what was asked -> what to call it."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """B less A, of a task or an average; all in [-1, 1].

    a, b: means over the ``num_queries`` queries that both have scored.  num_only: queries that one of them alone has.
    low, high: 95% interval of the difference.
    reranked: whether this is of the order after the reranker.
    unlike: in what the runs were not asked the same, so that the difference is not of the models alone: ``revision``,
        ``pictures`` (the revision of their archive), ``rows`` (texts, positives and candidates), ``tiles``,
        ``instructions``; of an average, in any of its tasks.
    """

    name: str
    metric: str
    a: float
    b: float
    low: float
    high: float
    num_queries: int
    num_only: int
    reranked: bool = False
    unlike: tuple[str, ...] = ()

    @property
    def difference(self) -> float:
        """B less A."""
        return self.b - self.a

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return not self.low <= 0 <= self.high


def bootstrap(difference_N: npt.NDArray[np.floating[Any]], *, seed: int, draws: int = DRAWS) -> npt.NDArray[np.float64]:
    """The mean of N differences in each draw of N of them with replacement, float64 [R].

    >>> bool(abs(bootstrap(np.array([0.0, 1.0] * 500), seed=0).mean() - 0.5) < 0.01)
    True
    """
    value_V, count_V = np.unique(np.asarray(difference_N, np.float64), return_counts=True)
    generator = np.random.default_rng(seed)
    rows = max(1, _NUMBERS // len(value_V))
    parts = [
        generator.multinomial(len(difference_N), count_V / len(difference_N), size=min(rows, draws - start)) @ value_V
        for start in range(0, draws, rows)
    ]
    return np.concatenate(parts) / len(difference_N)


def compare(a: Path, b: Path, *, seed: int = 0, draws: int = DRAWS) -> list[Difference]:
    """The tasks that both runs have, then the averages over these alone; then, where both have reranked, so again.

    a, b: ``results.json`` of two runs, beside their per-query files.
    Raises InputError for runs of different suites, metrics or ties, or without a task in common, and for missing files.
    """
    first, second = read_record(a), read_record(b)
    if first["suite"] != second["suite"]:
        raise InputError(
            f"{a} is a run of the suite {first['suite']}, {b} one of {second['suite']}: nothing to compare."
        )
    tasks = {one["name"]: one for one in first["tasks"]}
    others = {one["name"]: one for one in second["tasks"]}
    common = [name for name in tasks if name in others]
    if not common:
        raise InputError(f"{a} and {b} have no task in common.")
    for name in common:
        for what in ("metric", "ties"):
            if tasks[name][what] != others[name][what]:
                raise InputError(
                    f"{name} has the {what} {tasks[name][what]} in {a} and {others[name][what]} in {b}: their scores "
                    "do not mean the same."
                )
    suite = load_suite(first["suite"])
    unlike = {name: _unlike(tasks[name], others[name]) for name in common}
    metrics = {name: tasks[name]["metric"] for name in common}
    both = [name for name in common if None not in (tasks[name].get("reranked"), others[name].get("reranked"))]
    found = _differences(a, b, suite, metrics, unlike, seed, draws, reranked=False)
    return found + _differences(a, b, suite, {name: metrics[name] for name in both}, unlike, seed, draws, reranked=True)


def _unlike(one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[str, ...]:
    """In what two records of a task were not asked the same, as far as both say it."""
    return tuple(
        name
        for key, name in _ASKED.items()
        if one.get(key) is not None and two.get(key) is not None and one[key] != two[key]
    )


def _differences(
    a: Path,
    b: Path,
    suite: Suite,
    metrics: Mapping[str, str],
    unlike: Mapping[str, tuple[str, ...]],
    seed: int,
    draws: int,
    *,
    reranked: bool,
) -> list[Difference]:
    """One order: the tasks of ``metrics``, then the averages over them."""
    found: list[Difference] = []
    drawn: dict[str, npt.NDArray[np.float64]] = {}
    for number, (name, metric) in enumerate(metrics.items()):
        column = f"{metric}_reranked" if reranked else metric
        one, two = (_values(file, name, column) for file in (a, b))
        qids = [qid for qid in one if qid in two]
        if not qids:
            raise InputError(f"{name}: {a} and {b} have scored no query in common.")
        a_N, b_N = (np.array([values[qid] for qid in qids]) for values in (one, two))
        drawn[name] = bootstrap(b_N - a_N, seed=(seed * 1_000_003 + number), draws=draws)
        num_only = len(one) + len(two) - 2 * len(qids)
        difference = _difference(name, metric, a_N.mean(), b_N.mean(), drawn[name], len(qids), num_only)
        found.append(replace(difference, reranked=reranked, unlike=unlike[name]))
    return found + [replace(one, reranked=reranked) for one in _averages(suite, found, drawn)]


def _averages(suite: Suite, found: list[Difference], drawn: Mapping[str, npt.NDArray[np.float64]]) -> list[Difference]:
    """The averages of which every task was compared; draws of different tasks are independent."""
    a, b = (suite.average({one.name: getattr(one, side) for one in found}) for side in "ab")
    means = suite.average(drawn)  # type: ignore[arg-type]  # an average of arrays, draw by draw
    rows = []
    for average in suite.averages:
        mean_a, mean_b, mean_R = a[average.name], b[average.name], means[average.name]
        if mean_a is not None and mean_b is not None and mean_R is not None:
            tasks = tasks_of(suite, average.name)
            members = [one for one in found if one.name in tasks]
            number, unlike = sum(one.num_queries for one in members), {what for one in members for what in one.unlike}
            row = _difference(average.name, "average", mean_a, mean_b, np.asarray(mean_R), number, 0)
            rows.append(replace(row, unlike=tuple(name for name in _ASKED.values() if name in unlike)))
    return rows


def _difference(
    name: str, metric: str, a: float, b: float, drawn_R: npt.NDArray[np.float64], num_queries: int, num_only: int
) -> Difference:
    low, high = np.quantile(drawn_R, (0.025, 0.975))
    return Difference(
        name=name,
        metric=metric,
        a=float(a),
        b=float(b),
        low=float(low),
        high=float(high),
        num_queries=num_queries,
        num_only=num_only,
    )


def _values(file: Path, task: str, column: str) -> dict[str, float]:
    """The values of the queries that were scored, by id."""
    folder = file if file.is_dir() else file.parent
    table = folder / "queries" / f"{file_name(task)}.parquet"
    try:
        rows = pq.read_table(table, columns=["qid", "scored", column]).to_pydict()
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise InputError(
            f"{table} cannot be read, or has no column {column} ({error}); a comparison needs it."
        ) from error
    return {qid: value for qid, scored, value in zip(rows["qid"], rows["scored"], rows[column], strict=True) if scored}
