"""Teacher scores: what the embedder finds first for some of the queries, scored by a reranker too (U-MARVEL, stage 3).

Legend of shapes: K candidates of a list.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from quarterlight.data.distill import ScoredList
from quarterlight.data.pools import global_task
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError, RecipeError
from quarterlight.mining.negatives import MineRecipe, mine, mined_file
from quarterlight.mining.parts import Parts, noted, notes_of, write_table
from quarterlight.records import Item
from quarterlight.training.distributed import processes
from quarterlight.training.embeddings import Contents, Embeddings, Encoder

PART = 64
"""Queries scored and written at once: so many are lost at most when a process is killed."""

SEARCH_FACTOR = 4
"""Times a list's length that is searched for it where what scores too high is left out."""

SCHEMA = pa.schema(
    [
        pa.field("qid", pa.string(), nullable=False),
        pa.field("did", pa.string(), nullable=False),
        pa.field("recall_score", pa.float32(), nullable=False),
        pa.field("rerank_score", pa.float32(), nullable=False),
    ]
)
"""Columns of a file of teacher scores: the queries in the order of the task, the candidates of each by falling cosine.

recall_score: cosine.  rerank_score: P(Yes).
"""

_Lists = dict[str, list[tuple[str, float]]]  # query id -> candidates and their cosines, best first


class Reranker(Protocol):
    """What scores pairs; :class:`quarterlight.models.reranker.Reranker` does."""

    @property
    def model_hash(self) -> str: ...

    def predict(self, pairs: Sequence[tuple[Item, Item]], /) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True, kw_only=True)
class TeachRecipe:
    """Which candidates of which queries a teacher scores."""

    depth: int = 50
    """candidates of a query's list (U-MARVEL: 50)"""
    share: float = 0.1
    """of the queries of each task, drawn at random, at least one (U-MARVEL: 0.1)"""
    pool: Literal["local", "global", "mixed"] = "local"
    """candidates that are searched: those of the task, those of all tasks, or half of the list from each"""
    include_positive: bool = True
    """a list without any of the query's positives has the best of them in place of its last candidate"""
    max_score: float | None = None
    """cosine with the query from which on what is no known answer is left out, and the next takes its place"""
    search_depth: int | None = None
    """ranks among which these are looked for; without it, four times ``depth`` under ``max_score``, else ``depth``"""
    reranker: str | None = None
    """folder or hub id of the teacher; without it, the reranker of the run"""
    max_unreadable: float = 0.01
    """share of unreadable pictures above which it stops; up to it they are left out"""

    def __post_init__(self) -> None:
        if self.depth < 2:
            raise RecipeError(f"depth must be at least 2, or there is nothing to tell apart; got {self.depth}.")
        if not 0 < self.share <= 1:
            raise RecipeError(f"share must be above 0 and at most 1, got {self.share}.")
        if self.search_depth is not None and self.search_depth < self.depth:
            raise RecipeError(
                f"search_depth must be at least depth ({self.depth}), of which the list is made; got "
                f"{self.search_depth}."
            )
        if self.search_depth is not None and self.max_score is None:
            raise RecipeError(
                f"search_depth ({self.search_depth}) is of no use without max_score, which alone leaves ranks out."
            )
        for kind in self.kinds:
            self.search(kind)

    @property
    def kinds(self) -> tuple[Literal["local", "global"], ...]:
        """The pools that are searched."""
        return ("local", "global") if self.pool == "mixed" else (self.pool,)

    @property
    def ranks(self) -> int:
        """Ranks that are looked at."""
        return self.search_depth or self.depth * (1 if self.max_score is None else SEARCH_FACTOR)

    def search(self, kind: Literal["local", "global"]) -> MineRecipe:
        """What is looked for in one of them. Raises RecipeError for a value that cannot be."""
        return MineRecipe(
            depth=self.ranks,
            window=None,
            sample=self.depth,
            pool=kind,
            max_score=self.max_score,
            max_unreadable=self.max_unreadable,
        )


@dataclass(frozen=True, kw_only=True)
class TaughtCounts:
    """What was scored for one task.

    num_queries: those that were drawn.  num_pairs: rows of the file.
    num_short: queries with a list of fewer than ``depth`` candidates, those without any included.
    num_without_positive: queries whose list has no positive.
    """

    dataset: str
    task: str
    num_queries: int
    num_pairs: int
    num_short: int
    num_without_positive: int


def teach(
    embedder: Encoder,
    reranker: Reranker,
    tasks: Sequence[RetrievalTask],
    folder: Path,
    recipe: TeachRecipe,
    *,
    seed: int,
    cache: Path,
    show_progress: bool = False,
) -> list[TaughtCounts]:
    """Writes ``<dataset>.<task>.parquet`` (:data:`SCHEMA`) for every task into ``folder``; finished ones stay.

    What is embedded, found and scored goes to ``cache`` as it comes, and a stopped run goes on from there.  Under a
    launcher the processes share the work and must see the same folders.
    Raises DatasetError when more pictures than ``recipe.max_unreadable`` cannot be read.
    """
    process = processes()
    chosen = {task.label: _sample(task, recipe.share, seed) for task in tasks}
    found: list[list[_Lists]] = []
    for kind in recipe.kinds:
        place = cache / "found" / kind
        mine(
            embedder,
            tasks,
            place,
            recipe.search(kind),
            seed=seed,
            cache=cache / "embeddings",
            only=chosen,
            show_progress=show_progress,
        )
        found.append([_read_found(mined_file(place, task)) for task in tasks])
    embeddings = Embeddings(embedder, cache / "embeddings")
    lists = []
    for number, task in enumerate(tasks):
        positives = _positives(task, chosen[task.label], embeddings)
        qids = [query.qid for query in task.queries if query.qid in chosen[task.label]]
        lists.append(
            {qid: _listed([one[number].get(qid, []) for one in found], positives[qid], recipe) for qid in qids}
        )
    total = sum(len(one) for some in lists for one in some.values())
    show = show_progress and process.is_main_process
    with tqdm(total=total, desc="teach", unit="pair", disable=not show) as bar:
        for task, some in zip(tasks, lists, strict=True):
            pool = global_task(task, tasks) if "global" in recipe.kinds else task
            _Scorer(pool, some, reranker, cache / "scored", asdict(recipe)).write(mined_file(folder, task), bar.update)
    process.wait_for_everyone()
    return [_counts(task, some, recipe.depth) for task, some in zip(tasks, lists, strict=True)]


def _counts(task: RetrievalTask, lists: _Lists, depth: int) -> TaughtCounts:
    right = {query.qid: {*query.positives} for query in task.queries if query.qid in lists}
    return TaughtCounts(
        dataset=task.dataset,
        task=task.task,
        num_queries=len(lists),
        num_pairs=sum(map(len, lists.values())),
        num_short=sum(len(one) < depth for one in lists.values()),
        num_without_positive=sum(right[qid].isdisjoint(did for did, _ in one) for qid, one in lists.items()),
    )


def read_taught(folder: Path, task: RetrievalTask) -> dict[str, ScoredList]:
    """The lists of a task by query id; a query without one is not in it.

    Raises DatasetError when the task's teacher scores are missing or damaged.
    """
    file = mined_file(folder, task)
    try:
        table = pq.read_table(file, columns=SCHEMA.names)
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{file}, the teacher scores of {task.label}, cannot be read ({error}).") from error
    qids, dids = table["qid"].to_pylist(), table["did"].to_pylist()
    recall, rerank = (table[name].to_numpy() for name in SCHEMA.names[2:])
    rows: dict[str, list[int]] = {}
    for row, qid in enumerate(qids):
        rows.setdefault(qid, []).append(row)
    return {
        qid: ScoredList(dids=tuple(dids[row] for row in some), recall=recall[some], rerank=rerank[some])
        for qid, some in rows.items()
    }


def _sample(task: RetrievalTask, share: float, seed: int) -> set[str]:
    """The ids of the queries that are drawn: the same whatever other tasks there are."""
    name = json.dumps([seed, task.dataset, task.task, "teach"]).encode()
    draw = np.random.default_rng(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()))
    count = min(len(task.queries), max(1, int(share * len(task.queries))))
    return {task.queries[row].qid for row in draw.choice(len(task.queries), count, replace=False).tolist()}


def _read_found(file: Path) -> _Lists:
    table = pq.read_table(file, columns=["qid", "did", "score"])
    found: _Lists = {}
    for row in table.to_pylist():
        found.setdefault(row["qid"], []).append((row["did"], row["score"]))
    return found


def _positives(task: RetrievalTask, chosen: set[str], embeddings: Embeddings) -> _Lists:
    """The positives of the chosen queries that can be read, with their cosines, best first."""
    item = {one.did: one.item for one in task.candidates}
    queries = [query for query in task.queries if query.qid in chosen]
    contents = Contents()
    contents.read([query.item for query in queries] + [item[did] for query in queries for did in query.positives])
    sides: tuple[dict[bytes, Item], dict[bytes, Item]] = {}, {}
    pairs = []
    for query in queries:
        question = contents.key(query.item)
        for did in query.positives:
            answer = contents.key(item[did])
            if question is not None and answer is not None:
                sides[0][question], sides[1][answer] = query.item, item[did]
                pairs.append((query.qid, did, question, answer))
    embeddings.add("query", sides[0])  # nearly all of them are there
    embeddings.add("document", sides[1])
    bad = embeddings.problems
    pairs = [one for one in pairs if one[2] not in bad["query"] and one[3] not in bad["document"]]
    query_PD = embeddings.rows("query", [one[2] for one in pairs])[:]
    answer_PD = embeddings.rows("document", [one[3] for one in pairs])[:]
    found: _Lists = {qid: [] for qid in chosen}
    for (qid, did, _, _), score in zip(pairs, np.einsum("pd,pd->p", query_PD, answer_PD).tolist(), strict=True):
        found[qid].append((did, score))
    return {qid: _best_first(some) for qid, some in found.items()}


def _listed(
    found: Sequence[list[tuple[str, float]]], positives: list[tuple[str, float]], recipe: TeachRecipe
) -> list[tuple[str, float]]:
    """The list of a query, best first.

    found: what is no known answer, best first, by pool.
    """
    depth = recipe.depth
    if len(found) == 1:
        others = found[0]
    else:  # half from the task's own pool, then what the other has beyond that, then what is left
        own, everywhere = (dict(one) for one in found)
        half = dict(found[0][: depth // 2])
        rest = {did: score for did, score in everywhere.items() if did not in half}
        others = [*half.items(), *list(rest.items())[: depth - len(half)]]
        others += [(did, score) for did, score in own.items() if did not in dict(others)][: depth - len(others)]
    taken = _best_first([*positives, *others])[:depth]
    right = {did for did, _ in positives}
    if recipe.include_positive and positives and not any(did in right for did, _ in taken):
        taken = [*taken[: depth - 1], positives[0]]
    return taken


def _best_first(some: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    return sorted(some, key=lambda one: -one[1])


class _Scorer:
    """Scores the lists of one task, part by part."""

    def __init__(
        self, task: RetrievalTask, lists: Mapping[str, Any], reranker: Reranker, cache: Path, settings: dict[str, Any]
    ) -> None:
        self.task = task
        self.lists = lists
        self.reranker = reranker
        content = json.dumps([reranker.model_hash, settings, task.dataset, task.task, list(lists.items())])
        self.mark = hashlib.sha256(content.encode()).hexdigest()
        self.folder = cache / self.mark
        self.query = {query.qid: query.item for query in task.queries}
        self.candidate = {one.did: one.item for one in task.candidates}
        self.process = processes()

    def write(self, file: Path, done: Any) -> None:
        """Scores what no earlier run has scored, then joins all parts into the file. done: called with a number."""
        if notes_of(file).get("mark") == self.mark:
            done(sum(map(len, self.lists.values())))
            self.process.wait_for_everyone()
            return
        parts = Parts(list(self.lists), PART, self.folder)
        parts.write(self._score, lambda part: done(sum(len(self.lists[qid]) for qid in part)))
        self.process.wait_for_everyone()
        if self.process.is_main_process:
            table = pa.concat_tables([SCHEMA.empty_table(), *parts.read()])
            write_table(file, noted(table, {"mark": self.mark}))
        self.process.wait_for_everyone()

    def _score(self, qids: Sequence[str]) -> pa.Table:
        rows = list(self._rows(qids))
        pairs = [(self.query[qid], self.candidate[did]) for qid, did, _ in rows]
        rerank = self.reranker.predict(pairs) if pairs else np.empty(0, np.float32)
        columns = [[row[place] for row in rows] for place in range(3)]
        return pa.table(dict(zip(SCHEMA.names, [*columns, rerank], strict=True)), schema=SCHEMA)

    def _rows(self, qids: Sequence[str]) -> Iterator[tuple[str, str, float]]:
        return ((qid, did, score) for qid in qids for did, score in self.lists[qid])
