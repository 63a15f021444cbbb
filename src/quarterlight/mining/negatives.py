"""Hard negatives: what a model finds for each query that is not known to be right (paper, section 3.3, stage 2).

Legend of shapes: Q queries, C candidates, D columns, K neighbours.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from quarterlight.data.pools import global_task
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError, RecipeError, check_least, check_share
from quarterlight.files import replace_file
from quarterlight.mining.neighbours import EXACT_LIMIT, ExactSearch, IndexedSearch, Search, build_index
from quarterlight.mining.parts import Parts, noted, notes_of, write_table
from quarterlight.prompts import Role
from quarterlight.records import Item
from quarterlight.training.distributed import processes
from quarterlight.training.embeddings import Contents, Embeddings, Encoder

PART = 32_768
"""Queries searched and written at once: so many are lost at most when a process is killed."""

SCHEMA = pa.schema(
    [
        pa.field("qid", pa.string(), nullable=False),
        pa.field("did", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
    ]
)
"""Columns of a file of mined candidates: the queries in the order of the task, the candidates of each best first.

score: cosine.  rank: from 1, among the distinct candidates that are not known to be right.
"""

_PLACE = pa.field("place", pa.int64())  # of the query in the task, while a file is in parts


@dataclass(frozen=True, kw_only=True)
class MineRecipe:
    """Which candidates of a query's ranked list become its negatives."""

    depth: int = 100
    """ranks that are looked at"""
    window: tuple[int, int] | None = (50, 100)
    """first and last rank that may be taken, at random (paper: 50 to 100); without it, the best are taken in order"""
    sample: int | None = 2
    """how many are taken (paper: 2); without it, all that may be"""
    pool: Literal["local", "global"] = "local"
    """candidates that are searched: those of the task, or those of all tasks that are mined together, of which others'
    are called ``dataset/task/id``"""
    max_score: float | None = None
    """cosine with the query from which on a candidate is taken for an answer that nobody has labelled"""
    margin: float | None = None
    """likewise from so large a share of the best positive's cosine, such as 0.95 (TopK-PercPos of arXiv:2407.15831)"""
    max_unreadable: float = 0.01
    """share of unreadable pictures above which mining stops; up to it they are left out"""

    def __post_init__(self) -> None:
        check_least(self, depth=1)
        check_share(self, "max_unreadable")
        if self.window is not None:
            if len(self.window) != 2 or not 1 <= self.window[0] <= self.window[1] <= self.depth:
                raise RecipeError(
                    f"window must be a first and a last rank from 1 to depth ({self.depth}), got {list(self.window)}."
                )
            object.__setattr__(self, "window", tuple(self.window))
        places = self.depth if self.window is None else self.window[1] - self.window[0] + 1
        if self.sample is not None and not 1 <= self.sample <= places:
            raise RecipeError(f"sample must be from 1 to the {places} ranks that it is taken from, got {self.sample}.")
        if self.max_score is not None and not -1 < self.max_score <= 1:
            raise RecipeError(f"max_score must be a cosine above -1 and up to 1, got {self.max_score}.")
        if self.margin is not None and not 0 < self.margin <= 1:
            raise RecipeError(f"margin must be above 0 and at most 1, got {self.margin}.")

    def choose(self, score_K: npt.NDArray[np.float32], highest: float, draw: np.random.Generator) -> list[int]:
        """Places, from 0, of the candidates that are taken from a ranked list, ascending.

        score_K: of all that are in the list, best first.  highest: score that a candidate must not reach.
        A window that begins near or behind the end of the list begins earlier, so that it holds ``sample``, or one.
        """
        length = min(len(score_K), self.depth)
        first, last = self.window or (1, self.depth)
        first = max(1, min(first, length - (self.sample or 1) + 1)) if self.window else 1
        places = [k for k in range(first - 1, min(last, length)) if score_K[k] < highest]
        if self.sample is None or len(places) <= self.sample:
            return places
        if self.window is None:
            return places[: self.sample]
        return sorted(draw.choice(places, size=self.sample, replace=False).tolist())


@dataclass(frozen=True, kw_only=True)
class TaskCounts:
    """What mining found for one task.

    num_queries, num_candidates: those that can be embedded, copies of a candidate counted once.
    num_mined: rows of the file.  num_short: queries whose list ends before the window begins, so that the last ones
    of it were taken.  num_without: queries that got none.  num_unreadable: queries and candidates left out.
    recall: share of the exact neighbours that the search found, 1 when it compared all.
    """

    dataset: str
    task: str
    num_queries: int
    num_candidates: int
    num_mined: int
    num_short: int
    num_without: int
    num_unreadable: int
    recall: float


def mine(
    embedder: Encoder,
    tasks: Sequence[RetrievalTask],
    folder: Path,
    recipe: MineRecipe,
    *,
    seed: int,
    cache: Path,
    only: Mapping[str, Collection[str]] | None = None,
    show_progress: bool = False,
) -> list[TaskCounts]:
    """Writes ``<dataset>.<task>.parquet`` (:data:`SCHEMA`) for every task into ``folder``; finished ones stay.

    Known answers of a query are not in its list: its positives, what was judged relevant, the answers of the same
    question in other rows, and every copy of one of these.  What is embedded and found goes to ``cache`` as it comes,
    and a stopped run goes on from there.  Under a launcher the processes share the work and must see the same folders.
    What cannot be read is listed in ``unreadable.txt``.
    only: label of a task -> ids of the queries that are searched; without it, all are.
    Raises DatasetError when more pictures than ``recipe.max_unreadable`` cannot be read.
    """
    process = processes()
    files = [mined_file(folder, task) for task in tasks]
    for file, task in zip(files, tasks, strict=True):
        if files.count(file) > 1:
            raise DatasetError(f"Two tasks would be written to {file.name}: mine {task.label} into another folder.")
    contents = Contents()
    shown = [one.item for task in tasks for side in (task.queries, task.candidates) for one in side]
    contents.read(shown, show_progress=show_progress and process.is_main_process)
    _check_readable(contents.problems, contents, recipe)
    # One pool at a time, made again when it is searched: each of a global search is as large as all tasks together.
    missing: list[tuple[RetrievalTask, Path, str]] = []
    wanted: dict[Role, dict[bytes, Item]] = {role: {} for role in get_args(Role)}
    for task, file in zip(tasks, files, strict=True):
        pool = _pool(task, tasks, contents, recipe, only)
        mark = pool.fingerprint(embedder.model_hash, recipe, seed)
        if notes_of(file).get("mark") != mark:
            missing.append((task, file, mark))
            for role, items in pool.items.items():
                wanted[role] |= items
        del pool
    process.wait_for_everyone()  # or one process would see what another has finished meanwhile

    embeddings = Embeddings(embedder, cache)
    for role, items in wanted.items():
        embeddings.add(role, items, show_progress=show_progress)
        bad = [embeddings.problems[role][key] for key in items if key in embeddings.problems[role]]
        _check_readable([*contents.problems, *bad], contents, recipe)
    wanted.clear()
    for task, file, mark in missing:
        searched = _pool(task, tasks, contents, recipe, only)
        _Miner(searched, embeddings, recipe, seed, mark).write(file, show_progress=show_progress)
        del searched
    process.wait_for_everyone()
    notes = [notes_of(file) for file in files]
    if process.is_main_process:
        _list_unreadable(folder / "unreadable.txt", [line for note in notes for line in note["unreadable"]])
    return [TaskCounts(**note["counts"]) for note in notes]


def mined_file(folder: Path, task: RetrievalTask) -> Path:
    """Where the candidates of a task are."""
    return folder / f"{task.dataset}.{task.task}.parquet"


def read_mined(folder: Path, task: RetrievalTask) -> dict[str, list[str]]:
    """The ids of the mined candidates by query id, best first; a query without any is not in it.

    Raises DatasetError when the task has not been mined, or not into this folder.
    """
    file = mined_file(folder, task)
    try:
        table = pq.read_table(file, columns=["qid", "did"])
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{file}, the mined candidates of {task.label}, cannot be read ({error}).") from error
    found: dict[str, list[str]] = {}
    for qid, did in zip(table["qid"].to_pylist(), table["did"].to_pylist(), strict=True):
        found.setdefault(qid, []).append(did)
    return found


class _Pool:
    """A task with queries and candidates told apart by what they show.

    only: ids of the queries that are searched; the others still say what answers a question.
    queries: each with the key of its embedding, ``None`` when it cannot be read.
    candidates: content -> id and key of the first candidate that shows it.
    items: role -> key -> what is to be embedded.
    positives: query id -> contents.  answers: key of a question -> contents that are known to answer it in any row.
    problems: id -> why it cannot be read.
    """

    def __init__(self, task: RetrievalTask, contents: Contents, only: Collection[str] | None = None) -> None:
        self.task = task
        asked = [(query, contents.key(query.item)) for query in task.queries]
        self.queries = [one for one in asked if only is None or one[0].qid in only]
        self.candidates: dict[bytes, tuple[str, bytes]] = {}
        self.items: dict[Role, dict[bytes, Item]] = {"query": {}, "document": {}}
        self.positives: dict[str, list[bytes]] = {}
        self.answers: dict[bytes, set[bytes]] = {}
        self.problems: dict[str, str] = {}
        content_of: dict[str, bytes] = {}
        for one in task.candidates:
            content, key = contents.of(one.item), contents.key(one.item)
            if content is None or key is None:
                self.problems[one.did] = str(contents.problem(one.item))
                continue
            content_of[one.did] = content
            if content not in self.candidates:
                self.candidates[content] = one.did, key
                self.items["document"][key] = one.item
        for query, question in self.queries:
            if question is None:
                self.problems[query.qid] = str(contents.problem(query.item))
            else:
                self.items["query"][question] = query.item
        for query, question in asked:
            if question is None:
                continue
            self.positives[query.qid] = [content_of[did] for did in query.positives if did in content_of]
            relevant = [content_of[did] for did in query.also_relevant if did in content_of]
            self.answers.setdefault(question, set()).update(self.positives[query.qid], relevant)

    def fingerprint(self, model_hash: str, recipe: MineRecipe, seed: int) -> str:
        """SHA-256, in hex, of all that decides what is mined."""
        settings = [model_hash, asdict(recipe), seed, PART, EXACT_LIMIT, self.task.dataset, self.task.task]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for content, (did, key) in self.candidates.items():
            digest.update(b"%b%b%d %b" % (content, key, len(did), did.encode()))
        for query, question in self.queries:
            digest.update(b"%d %b%b" % (len(query.qid), query.qid.encode(), question or b""))
            for answer in sorted(self.answers[question]) if question else ():
                digest.update(answer)
            digest.update(b"".join(sorted(self.positives.get(query.qid, ()))))
        return digest.hexdigest()


def _pool(
    task: RetrievalTask,
    tasks: Sequence[RetrievalTask],
    contents: Contents,
    recipe: MineRecipe,
    only: Mapping[str, Collection[str]] | None,
) -> _Pool:
    searched = global_task(task, tasks) if recipe.pool == "global" else task
    return _Pool(searched, contents, None if only is None else only[task.label])


class _Query(NamedTuple):
    """A query of a task: its place in it, the columns of its known answers, the keys of its own positives."""

    place: int
    qid: str
    key: bytes
    answers: npt.NDArray[np.int64]
    positives: list[bytes]


class _Miner:
    """Searches one task, part by part."""

    def __init__(self, pool: _Pool, embeddings: Embeddings, recipe: MineRecipe, seed: int, mark: str) -> None:
        self.pool = pool
        self.embeddings = embeddings
        self.recipe = recipe
        self.seed = seed
        self.mark = mark
        self.process = processes()
        self.folder = embeddings.folder / "found" / mark
        bad = embeddings.problems["document"]
        readable = [(c, did, key) for c, (did, key) in pool.candidates.items() if key not in bad]
        self.column = {content: column for column, (content, _, _) in enumerate(readable)}
        self.dids = [did for _, did, _ in readable]
        self.candidate_CD = embeddings.rows("document", [key for _, _, key in readable])
        key_of = {content: key for content, _, key in readable}
        queries = [
            _Query(
                place=place,
                qid=query.qid,
                key=key,
                answers=np.array([self.column[c] for c in pool.answers[key] if c in self.column], np.int64),
                positives=[key_of[c] for c in pool.positives[query.qid] if c in key_of],
            )
            for place, (query, key) in enumerate(pool.queries)
            if key is not None and key not in embeddings.problems["query"]
        ]
        # A search returns as many for all queries as the one with most known answers needs: like ones go together.
        self.queries = sorted(queries, key=lambda one: len(one.answers))

    def write(self, file: Path, *, show_progress: bool) -> None:
        """Searches what no earlier run has searched, then joins all parts into the file."""
        if self.process.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.process.wait_for_everyone()
        search = self._open_search()
        parts = Parts(self.queries, PART, self.folder)
        show = show_progress and self.process.is_main_process
        total = sum(map(len, parts.own.values()))
        with tqdm(total=total, desc=f"search {self.pool.task.label}", unit="query", disable=not show) as bar:
            parts.write(lambda part: self._mine(part, search), lambda part: bar.update(len(part)))
        self.process.wait_for_everyone()
        if self.process.is_main_process:
            self._join(file, parts.read(), search.recall)
        self.process.wait_for_everyone()

    def _open_search(self) -> Search:
        if len(self.dids) <= EXACT_LIMIT or torch.cuda.is_available():
            return ExactSearch(self.candidate_CD)
        file = self.folder / "index.faiss"
        if self.process.is_main_process and not file.is_file():
            query_QD = self.embeddings.rows("query", [one.key for one in self.queries])
            build_index(self.candidate_CD, query_QD, self.recipe.depth, file)
        self.process.wait_for_everyone()
        return IndexedSearch(file)

    def _mine(self, queries: Sequence[_Query], search: Search) -> pa.Table:
        """The rows of some of the queries, in order of rank for each."""
        query_QD = self.embeddings.rows("query", [one.key for one in queries])[:]
        found = search.search(query_QD, self.recipe.depth + max(len(one.answers) for one in queries))
        highest_Q = self._highest(queries, query_QD)
        rows: dict[str, list[Any]] = {name: [] for name in (*SCHEMA.names, _PLACE.name)}
        num_short = 0
        for one, highest, score_K, column_K in zip(queries, highest_Q.tolist(), *found, strict=True):
            listed_K = (column_K >= 0) & (column_K[:, None] != one.answers).all(axis=1)
            score_K, column_K = score_K[listed_K], column_K[listed_K]
            taken = self.recipe.choose(score_K, highest, self._draw(one.qid))
            rows["qid"] += [one.qid] * len(taken)
            rows["did"] += [self.dids[column] for column in column_K[taken].tolist()]
            rows["score"] += score_K[taken].tolist()
            rows["rank"] += [place + 1 for place in taken]
            rows[_PLACE.name] += [one.place] * len(taken)
            num_short += self.recipe.window is not None and len(score_K) < self.recipe.window[0]
        return noted(pa.table(rows, schema=SCHEMA.append(_PLACE)), {"short": num_short})

    def _highest(self, queries: Sequence[_Query], query_QD: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """The score that a candidate of each query must not reach."""
        highest_Q = np.full(len(queries), np.inf if self.recipe.max_score is None else self.recipe.max_score)
        if self.recipe.margin is None:
            return highest_Q
        pairs = [(row, key) for row, one in enumerate(queries) for key in one.positives]
        row_P = np.array([row for row, _ in pairs], np.int64)
        positive_PD = self.embeddings.rows("document", [key for _, key in pairs])
        best_Q = np.full(len(queries), -np.inf)
        for start in range(0, len(pairs), PART):
            part_P = row_P[start : start + PART]
            score_P = np.einsum("pd,pd->p", query_QD[part_P], positive_PD[start : start + PART])
            np.maximum.at(best_Q, part_P, score_P)
        has_positive_Q = np.isfinite(best_Q)
        highest_Q[has_positive_Q] = np.minimum(highest_Q, self.recipe.margin * best_Q)[has_positive_Q]
        return highest_Q

    def _draw(self, qid: str) -> np.random.Generator:
        """Chance that depends on nothing but the query, so that no other query changes what is taken."""
        task = self.pool.task
        name = json.dumps([self.seed, task.dataset, task.task, qid]).encode()
        return np.random.default_rng(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()))

    def _join(self, file: Path, parts: Sequence[pa.Table], recall: float) -> None:
        """Writes the file: the queries in the order of the task."""
        table = pa.concat_tables(
            [SCHEMA.append(_PLACE).empty_table(), *(one.replace_schema_metadata() for one in parts)]
        )
        table = table.sort_by([(_PLACE.name, "ascending"), ("rank", "ascending")])
        task, problems = self.pool.task, self._problems()
        counts = TaskCounts(
            dataset=task.dataset,
            task=task.task,
            num_queries=len(self.queries),
            num_candidates=len(self.dids),
            num_mined=len(table),
            num_short=sum(notes_of(one)["short"] for one in parts),
            num_without=len(self.pool.queries) - len(pc.unique(table[_PLACE.name])),
            num_unreadable=len(problems),
            recall=recall,
        )
        notes = {
            "mark": self.mark,
            "recipe": asdict(self.recipe),
            "seed": self.seed,
            "counts": asdict(counts),
            "unreadable": [f"{task.label}, {name}: {reason}" for name, reason in problems.items()],
        }
        write_table(file, noted(table.drop_columns(_PLACE.name), notes))
        shutil.rmtree(self.folder)

    def _problems(self) -> dict[str, str]:
        """Id of a query or candidate that is left out -> why."""
        bad = self.embeddings.problems
        queries = {query.qid: bad["query"][key] for query, key in self.pool.queries if key in bad["query"]}
        documents = {did: bad["document"][key] for did, key in self.pool.candidates.values() if key in bad["document"]}
        return self.pool.problems | queries | documents


def _check_readable(problems: Sequence[str], contents: Contents, recipe: MineRecipe) -> None:
    if len(problems) > recipe.max_unreadable * contents.num_pictures:
        raise DatasetError(
            f"{len(problems):,} of {contents.num_pictures:,} pictures cannot be read, more than max_unreadable "
            f"({recipe.max_unreadable:.2%}) allows. The first: {problems[0]}"
        )


def _list_unreadable(file: Path, lines: Sequence[str]) -> None:
    if not lines:
        file.unlink(missing_ok=True)
        return
    replace_file(file, "".join(f"{line}\n" for line in lines))
