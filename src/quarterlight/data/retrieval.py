"""Retrieval datasets on disk, in the layout of M-BEIR: one folder, one file of queries and one pool per task and split.

    <dataset>/
      queries/<task>.<split>.jsonl[.gz]     qid, query_txt, query_img_path, pos_cand_list, neg_cand_list, anything else
      pools/<task>.<split>.jsonl[.gz]       did, txt, img_path
      images.zip                            the pictures; or a folder images/; or any folders beside queries/
      instructions.json                     if queries have instructions of their own: {"<task>": ["Find ...", ...]}

A row with several pictures, such as the pages of a document, has a list of their paths, in reading order.

A query may have any of its task's instructions in training, in all splits; a model is evaluated with the first.  A task
that the file does not name, or a folder without it, takes the usual one of its direction.

Task names say the direction: ``t2i`` text to image, ``it2t`` image and text to text, ``t2vd`` text to visual document.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from quarterlight.data.pictures import PictureFolder
from quarterlight.errors import DatasetError, did_you_mean
from quarterlight.files import replace_file
from quarterlight.prompts import QUERY_INSTRUCTIONS, query_instruction
from quarterlight.records import Candidate, ImageSource, Item, Problem, Query

TASKS = ("t2i", "t2vd", "t2t", "t2it", "i2t", "i2i", "it2t", "it2i", "it2it")
"""The known directions, in the order in which they are listed. A dataset may name others; they come last."""

SPLITS = ("train", "val", "test", "test_unseen")
"""The usual splits, in the order in which they are listed."""

INSTRUCTIONS_FILE = "instructions.json"

PAGE_TASK = "t2vd"
PAGE_MAX_TILES = 4
PICTURE_MAX_TILES = 1

_QUERY_COLUMNS = ("qid", "query_txt", "query_img_path", "pos_cand_list")
_CANDIDATE_COLUMNS = ("did", "txt", "img_path")
_NOT_FIELDS = {*_QUERY_COLUMNS, "neg_cand_list", "query_modality", "task", "task_id"}

_Record = TypeVar("_Record", Query, Candidate)


@dataclass(frozen=True, kw_only=True)
class RetrievalTask:
    """The queries of one task and split, and everything that they may find.

    Every id that a query names is the id of one of the candidates.
    revision: of the data, where it is known.  pictures_revision: likewise, of an archive of pictures of another one.
    problems: rows of the files that are in neither list, and why.
    num_lost_queries: how many queries the benchmark has beyond these, since a row or picture of theirs cannot be used.
    instructions: those that a query may have, where the dataset or a recipe says so; see :func:`with_instructions`.
    """

    dataset: str
    task: str
    split: str
    queries: list[Query]
    candidates: list[Candidate]
    revision: str | None = None
    pictures_revision: str | None = None
    problems: tuple[Problem, ...] = ()
    num_lost_queries: int = 0
    instructions: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """``dataset/task.split``, for tables and messages."""
        return f"{self.dataset}/{self.task}.{self.split}"


def with_instructions(
    task: RetrievalTask, *, query: str | Sequence[str] | None = None, document: str | None = None
) -> RetrievalTask:
    """The same task with an instruction in every item that has none of its own.

    query: of several, queries get the first, which is how a model is evaluated, and the task keeps all of them, for
        training to draw from.  A single one goes before those that the task has, which are forgotten.  ``None`` takes
        those of the task, or else the paper's for its direction; a task whose name says none keeps to the model's.
    document: ``None`` keeps to the model's default for the candidate's modality.
    """
    if query is not None:
        task = replace(task, instructions=() if isinstance(query, str) else tuple(query))
        query = query if isinstance(query, str) else None
    if query is None and task.instructions:
        query = task.instructions[0]
    if query is None and task.task in QUERY_INSTRUCTIONS:
        query = query_instruction(task.task)

    def instruct(item: Item, instruction: str | None) -> Item:
        return item if instruction is None or item.instruction is not None else replace(item, instruction=instruction)

    queries, candidates = task.queries, task.candidates
    if query is not None:
        queries = [replace(one, item=instruct(one.item, query)) for one in queries]
    if document is not None:
        candidates = [replace(one, item=instruct(one.item, document)) for one in candidates]
    return replace(task, queries=queries, candidates=candidates)


def with_negatives(
    task: RetrievalTask,
    negatives: Mapping[str, Sequence[str]],
    *,
    also_relevant: Mapping[str, Sequence[str]] | None = None,
    keep_labelled: bool = False,
) -> RetrievalTask:
    """The same task with other negatives, and what a judge found to be relevant, by query id.

    negatives: replace those of every query; a query without any here has none.  also_relevant: likewise; what is a
        positive anyway is left out.  keep_labelled: the labelled negatives stay, before these, unless judged relevant.
    Raises DatasetError, naming qid and did, for an id outside the pool and for a negative that is a positive of the
    query or judged relevant.
    """
    pool = {candidate.did for candidate in task.candidates}

    def fail(query: Query, did: str, what: str) -> NoReturn:
        raise DatasetError(f"{task.label}: {did!r}, given for the query {query.qid!r}, {what}.")

    def replaced(query: Query) -> Query:
        mined, judged = negatives.get(query.qid, ()), (also_relevant or {}).get(query.qid, ())
        for did in (*mined, *judged):
            if did not in pool:
                fail(query, did, "is not in the pool: were the ids found in another dataset or split?")
        relevant = {*query.positives, *judged}
        for did in mined:
            if did in relevant:
                kind = "one of its positives" if did in query.positives else "judged relevant to it"
                fail(query, did, f"cannot be its negative, for it is {kind}")
        labelled = [did for did in query.negatives if did not in relevant] if keep_labelled else ()
        return replace(
            query,
            negatives=tuple(dict.fromkeys((*labelled, *mined))),
            also_relevant=tuple(did for did in dict.fromkeys(judged) if did not in query.positives),
        )

    return replace(task, queries=[replaced(query) for query in task.queries])


class RetrievalDataset:
    """A dataset folder; files are read when a task is loaded, pictures only when they are looked at.

    Pictures of a dataset that has a ``t2vd`` task are document pages and get up to 4 tiles, others 1
    (Magic-MM-Embedding, section 5.2).  Raises DatasetError when the folder is not in the layout above.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not is_dataset(self.folder):
            raise DatasetError(f"{self.folder} is not a retrieval dataset: it has no folders queries/ and pools/.")
        self._queries = _list_files(self.folder / "queries")
        self._pools = _list_files(self.folder / "pools")
        if not self._queries:
            raise DatasetError(f"{self.folder}/queries has no file named <task>.<split>.jsonl or .jsonl.gz.")
        has_pages = any(task == PAGE_TASK for task, _ in self._queries)
        self.max_tiles = PAGE_MAX_TILES if has_pages else PICTURE_MAX_TILES
        self._folder_of_pictures = PictureFolder(self.folder)
        self._pictures: dict[str, ImageSource] = {}

    def __repr__(self) -> str:
        return f"RetrievalDataset({str(self.folder)!r})"

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @cached_property
    def id(self) -> str:
        """What stands before the colon in every id of the dataset ("101" in "101:7"); its name if nothing does."""
        for path in self._pools.values():
            for _, row in _read_rows(path, _CANDIDATE_COLUMNS):
                prefix, colon, _ = str(row["did"]).partition(":")
                return prefix if colon else self.name
        return self.name

    @property
    def splits(self) -> list[str]:
        """The splits that any task has."""
        return _ordered({split for _, split in self._queries}, SPLITS)

    def tasks(self, split: str | None = None) -> list[str]:
        """The tasks that have this split; without one, all tasks. Empty when no task has it."""
        return _ordered({task for task, has in self._queries if split in (None, has)}, TASKS)

    def load(self, task: str, split: str) -> RetrievalTask:
        """Reads one task; its queries have no instruction yet, see :func:`with_instructions`.

        Raises DatasetError, naming file and line, for a row that is not JSON, lacks a column, has neither text nor
        picture, repeats an id, or names a candidate that the pool does not have.
        """
        queries_file, pool_file = self._files(task, split)
        pool = _unique(pool_file, _CANDIDATE_COLUMNS, self._candidate)
        queries = _unique(queries_file, _QUERY_COLUMNS, lambda where, row: self._query(where, row, pool))
        return RetrievalTask(
            dataset=self.name,
            task=task,
            split=split,
            queries=list(queries.values()),
            candidates=list(pool.values()),
            instructions=self._instructions.get(task, ()),
        )

    def fingerprint(self, task: str, split: str) -> str:
        """SHA-256, in hex, of the two files of a task, as they are on disk, and of its instructions if it has any; the
        pictures are not in it.

        Raises DatasetError when there is no such task.
        """
        digest = hashlib.sha256()
        for path in self._files(task, split):
            digest.update(path.read_bytes())
        if task in self._instructions:
            digest.update(json.dumps(self._instructions[task]).encode())
        return digest.hexdigest()

    @cached_property
    def _instructions(self) -> dict[str, tuple[str, ...]]:
        """Task -> instructions of its queries."""
        found, known = read_instructions(self.folder), self.tasks()
        for task in found:
            if task not in known:
                raise DatasetError(
                    f"{self.folder / INSTRUCTIONS_FILE} names a task {task!r}, of which queries/ has no file. "
                    f"{did_you_mean(task, known)}"
                )
        return found

    def _files(self, task: str, split: str) -> tuple[Path, Path]:
        """The queries and the pool of a task."""
        if (task, split) not in self._queries:
            known = did_you_mean(f"{task}.{split}", [f"{t}.{s}" for t, s in self._queries])
            raise DatasetError(f"The dataset {self.name} has no task {task!r} with a split {split!r}. {known}")
        if (task, split) not in self._pools:
            raise DatasetError(f"{self.folder}/pools has no {task}.{split}.jsonl[.gz] for the queries of that name.")
        return self._queries[task, split], self._pools[task, split]

    def _query(self, where: _Line, row: dict[str, Any], pool: Mapping[str, Candidate]) -> Query:
        item = self._item(where, row["query_txt"], row["query_img_path"])
        positives, negatives = _ids(where, row, "pos_cand_list"), _ids(where, row, "neg_cand_list")
        if not positives:
            where.fail("the query has no positive candidate in pos_cand_list")
        for did in (*positives, *negatives):
            if did not in pool:
                where.fail(f"the candidate {did!r} is not in the pool of this task and split")
        fields = {key: value for key, value in row.items() if key not in _NOT_FIELDS}
        return Query(qid=row["qid"], item=item, positives=positives, negatives=negatives, fields=fields)

    def _candidate(self, where: _Line, row: dict[str, Any]) -> Candidate:
        return Candidate(did=row["did"], item=self._item(where, row["txt"], row["img_path"]))

    def _item(self, where: _Line, text: Any, image_path: Any) -> Item:
        """An absent part is ``null`` or an empty string."""
        several = isinstance(image_path, list) and all(isinstance(path, str) and path for path in image_path)
        if not isinstance(text, str | None) or not (several or isinstance(image_path, str | None)):
            where.fail("text and picture path must each be a string or null")
        has_text = bool(text and not text.isspace())
        if not has_text and not image_path:
            where.fail("the row has neither text nor picture")
        if not image_path:
            return Item(text=text)
        image = (
            tuple(self._picture(where, path) for path in image_path) if several else self._picture(where, image_path)
        )
        return Item(text=text if has_text else None, image=image, max_tiles=self.max_tiles)

    def _picture(self, where: _Line, path: str) -> ImageSource:
        """The same object for the same path, so that a large pool costs one reference a row."""
        if path not in self._pictures:
            try:
                self._pictures[path] = self._folder_of_pictures.source(path)
            except DatasetError as error:
                where.fail(str(error))
        return self._pictures[path]


def is_dataset(folder: Path) -> bool:
    """Whether the folder is laid out as a retrieval dataset."""
    return (folder / "queries").is_dir() and (folder / "pools").is_dir()


def read_instructions(folder: Path) -> dict[str, tuple[str, ...]]:
    """Task -> instructions of its queries, the first of which a model is evaluated with; empty where nothing is said.

    Raises DatasetError for a file that cannot be read or says anything else.
    """
    path = folder / INSTRUCTIONS_FILE
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as JSON in UTF-8 ({error}).") from error
    if not isinstance(found, dict):
        raise DatasetError(f"{path} must be a JSON object of tasks, got {type(found).__name__}.")
    for task, some in found.items():
        if not (isinstance(some, list) and some and all(isinstance(one, str) and one.strip() for one in some)):
            raise DatasetError(
                f"{path}: the task {task!r} must have a list of one or more sentences, got {some!r:.80}."
            )
    return {task: tuple(some) for task, some in found.items()}


def write_instructions(folder: Path, task: str, instructions: Sequence[str]) -> None:
    """Puts the instructions of a task's queries into a dataset folder; those of its other tasks stay."""
    known = read_instructions(folder) | {task: tuple(instructions)}
    replace_file(folder / INSTRUCTIONS_FILE, json.dumps(known, indent=1, ensure_ascii=False) + "\n")


def find_datasets(folder: str | os.PathLike[str]) -> list[RetrievalDataset]:
    """The dataset that the folder is, or all datasets directly inside it, by name.

    Raises DatasetError when there are none.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DatasetError(f"{root} is not a folder.")
    found = [root] if is_dataset(root) else [path for path in sorted(root.iterdir()) if is_dataset(path)]
    if not found:
        raise DatasetError(f"{root} neither is a retrieval dataset (folders queries/ and pools/) nor holds any.")
    return [RetrievalDataset(path) for path in found]


@dataclass(frozen=True)
class _Line:
    """Where a row stands, for messages."""

    path: Path
    number: int

    def fail(self, problem: str) -> NoReturn:
        raise DatasetError(f"{self.path}, line {self.number}: {problem}.")


def _ids(where: _Line, row: dict[str, Any], column: str) -> tuple[str, ...]:
    """The ids that a row lists, each once."""
    ids = row.get(column) or []
    if not isinstance(ids, list):
        where.fail(f"{column} must be a list of ids, got {ids!r}")
    return tuple(dict.fromkeys(map(str, ids)))


def _unique(
    path: Path, columns: tuple[str, ...], build: Callable[[_Line, dict[str, Any]], _Record]
) -> dict[str, _Record]:
    """The records of a file by id, which is the first of ``columns``."""
    records: dict[str, _Record] = {}
    for where, row in _read_rows(path, columns):
        name = row[columns[0]]
        if not isinstance(name, str):
            where.fail(f"{columns[0]} must be a string, got {name!r}")
        if name in records:
            where.fail(f"{columns[0]} {name!r} occurs a second time")
        records[name] = build(where, row)
    return records


def _read_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[_Line, dict[str, Any]]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                where = _Line(path, number)
                if line.isspace():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    where.fail(f"not a line of JSON in UTF-8 ({error})")
                if not isinstance(row, dict):
                    where.fail(f"a row must be a JSON object, got {type(row).__name__}")
                for column in columns:
                    if column not in row:
                        where.fail(f"the column {column!r} is missing")
                yield where, row
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read after line {number} ({error}).") from error


def _list_files(folder: Path) -> dict[tuple[str, str], Path]:
    """Files named ``<task>.<split>.jsonl[.gz]``, by task and split."""
    files: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.iterdir()):
        match path.name.removesuffix(".gz").split("."):
            case [task, split, "jsonl"] if task and split:
                if (task, split) in files:
                    raise DatasetError(f"{files[task, split]} and {path.name} are the same table; keep one of them.")
                files[task, split] = path
    return files


def _ordered(names: set[str], order: tuple[str, ...]) -> list[str]:
    """Known names in their order, then the others by name."""
    return [name for name in order if name in names] + sorted(names.difference(order))
