"""M-BEIR: queries and pools in JSON lines, relevance in a file of its own.

    query/<split>/mbeir_<set>_task<id>_<split>.jsonl           qid, query_txt, query_img_path, query_modality,
                                                               pos_cand_list, neg_cand_list, ...
    cand_pool/local/mbeir_<set>_task<id>[_<split>]_cand_pool.jsonl    did, txt, img_path, modality, ...
    cand_pool/global/mbeir_union_<split>_cand_pool.jsonl       all pools of a split together
    qrels/<split>/mbeir_<set>_task<id>_<split>_qrels.txt       qid 0 did relevance task
    mbeir_images/                                              the pictures, of the archives joined and unpacked

Training files have no task in their names and may hold two tasks, told apart by ``task_id`` or by their modalities.
"Local" is one pool for each task, "global" one for all; neither is a list for each query (UniIR, arXiv:2311.17136).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from quarterlight.data.benchmarks.builder import TaskBuilder
from quarterlight.data.benchmarks.gallery import Gallery
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.benchmarks.tables import Place, Row, read_rows
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError
from quarterlight.records import Candidate, ImageSource, Problem

DATASETS = {
    "visualnews": 0,
    "fashion200k": 1,
    "webqa": 2,
    "edis": 3,
    "nights": 4,
    "oven": 5,
    "infoseek": 6,
    "fashioniq": 7,
    "cirr": 8,
    "mscoco": 9,
}
"""Set -> what stands before the colon of its ids."""

TASKS = {
    0: ("text", "image"),
    1: ("text", "text"),
    2: ("text", "image,text"),
    3: ("image", "text"),
    4: ("image", "image"),
    6: ("image,text", "text"),
    7: ("image,text", "image"),
    8: ("image,text", "image,text"),
}
"""Task -> modalities of queries and candidates."""

_QUERY = ("qid", "query_txt", "query_img_path", "pos_cand_list")
_CANDIDATE = ("did", "txt", "img_path")


def load(source: Source) -> RetrievalTask:
    """One of the 16 tasks.  Options: ``set``, ``task`` (its number), ``pool``: ``local``, ``global`` or ``used``, that
    is, those of the union that some query names, for training.

    Relevance comes from the qrels where there are any, else from the lists in the queries.  Left out and listed:
    queries without a positive in the pool, rows with neither text nor picture or whose picture is missing.  Raises
    DatasetError for a row that breaks the layout and for ids that occur twice.
    """
    try:
        return _load(source)
    except _NoPictures as error:
        raise DatasetError(str(error)) from None


def _load(source: Source) -> RetrievalTask:
    name, number, split = source.option("set"), int(source.option("task")), source.split
    if name not in DATASETS or number not in TASKS:
        raise DatasetError(f"M-BEIR has no set {name!r} with a task {number}.")
    folder, kind = source.folder, source.option("pool", "local")
    asked, is_shared = _query_file(folder, name, number, split)
    rows = list(_queries(asked, number, is_shared=is_shared))
    qrels = _qrels(folder / "qrels" / split / f"mbeir_{name}_task{number}_{split}_qrels.txt")
    positives = {place.text(row, "qid"): _positives(place, row, qrels, split, name) for place, row in rows}
    pool_file = _pool_file(folder, name, number, split, kind)
    if kind == "used":
        named = {did for dids in positives.values() for did in dids}
        named |= {did for place, row in rows for did in place.ids(row, "neg_cand_list")}
        pool, problems, declared = _read_pool(pool_file, folder, source.max_tiles, frozenset(named))
    else:
        pool, problems, declared = _pool(pool_file, folder, source.max_tiles, pool_file.stat().st_mtime_ns)
    builder = TaskBuilder(source, pool=pool, problems=problems)
    gallery = Gallery([folder])
    for place, row in rows:
        qid = place.text(row, "qid")
        found = [did for did in positives[qid] if did in pool]
        if is_shared and row.get("task_id") is None and found:
            kinds = {declared.get(did, pool[did].item.modality) for did in found}
            if TASKS[number][1] not in kinds:
                continue  # a row of the other task of the file
        for did in positives[qid]:
            if did not in pool:
                builder.leave_out(did, f"{place}: this positive of {qid!r} is not in {pool_file.name}")
        try:
            path = place.text(row, "query_img_path")
            item = builder.item(place.text(row, "query_txt"), *([_find(gallery, path)] if path else []))
        except DatasetError as error:
            builder.lost_query(qid, f"{place}: {error}")
            continue
        negatives = [did for did in place.ids(row, "neg_cand_list") if did in pool and did not in found]
        builder.query(place, qid, item, found, negatives=negatives)
    return builder.build()


def modality(value: str) -> str:
    """What a row is made of, whichever way round it is written.

    >>> modality("text,image")
    'image,text'
    """
    return ",".join(sorted(part.strip() for part in value.split(",")))


class _NoPictures(Exception):
    """There is no folder of pictures at all; not a problem of one row, so not a DatasetError."""


def _find(gallery: Gallery, path: str) -> ImageSource:
    """A picture.  Where there are none at all, one sentence is worth more than a million problems."""
    root = gallery.folders[0]
    if not (root / path.partition("/")[0]).is_dir():
        raise _NoPictures(
            f"{root} has no folder {path.partition('/')[0]}/ of pictures: join and unpack the archives there, "
            "cat mbeir_images.tar.gz.part-* | tar -xz"
        )
    return gallery.find(path)


def _query_file(folder: Path, name: str, number: int, split: str) -> tuple[Path, bool]:
    """The file of a task's queries, and whether it is one of training, which may hold those of another task too."""
    own = folder / "query" / split / f"mbeir_{name}_task{number}_{split}.jsonl"
    return (own, False) if own.is_file() else (own.with_name(f"mbeir_{name}_{split}.jsonl"), True)


def _queries(path: Path, number: int, *, is_shared: bool) -> Iterator[tuple[Place, Row]]:
    """The rows of a task; of a file that holds two, those that are or may be of this one."""
    for place, row in read_rows(path, _QUERY):
        if is_shared:
            if row.get("task_id") is not None and int(row["task_id"]) != number:
                continue
            if row.get("query_modality") and modality(row["query_modality"]) != TASKS[number][0]:
                continue
        yield place, row


def _positives(place: Place, row: Row, qrels: dict[str, list[str]], split: str, name: str) -> list[str]:
    """Relevance; without qrels, a test keeps to ids of its own set, since OVEN and InfoSeek share Wikipedia."""
    qid = place.text(row, "qid")
    if qid in qrels:
        return qrels[qid]
    listed = place.ids(row, "pos_cand_list")
    own = [did for did in listed if split == "train" or did.partition(":")[0] == str(DATASETS[name])]
    return own or listed


def _qrels(path: Path) -> dict[str, list[str]]:
    """The relevant candidates of each query: lines of qid, 0, did, relevance, task."""
    qrels: dict[str, list[str]] = {}
    if not path.is_file():
        return qrels
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match line.split():
            case [qid, _, did, relevance, *_] if relevance.lstrip("-").isdigit():
                dids = qrels.setdefault(qid, [])
                if int(relevance) > 0:
                    dids.append(did)
            case []:
                pass
            case _:
                Place(path, number).fail(f"expected 'qid 0 did relevance task', got {line!r:.60}")
    return qrels


def _pool_file(folder: Path, name: str, number: int, split: str, kind: str) -> Path:
    pools = folder / "cand_pool"
    if kind == "local":
        names = [f"mbeir_{name}_task{number}_{split}_cand_pool.jsonl", f"mbeir_{name}_task{number}_cand_pool.jsonl"]
        paths = [pools / "local" / one for one in names]  # MSCOCO has a pool for each split
    else:
        paths = [pools / "global" / f"mbeir_union_{split}_cand_pool.jsonl"]
    for path in paths:
        if path.is_file():
            return path
    raise DatasetError(f"{folder} has no pool {' or '.join(str(path.relative_to(folder)) for path in paths)}.")


class _Pool(NamedTuple):
    """candidates: by id.  problems: rows that cannot be used.  declared: what rows say they are made of, of those alone
    that are not: a picture with an empty text is declared ``image,text``.
    """

    candidates: dict[str, Candidate]
    problems: tuple[Problem, ...]
    declared: dict[str, str]


@lru_cache(maxsize=1)
def _pool(path: Path, folder: Path, max_tiles: int, mtime_ns: int) -> _Pool:
    """A whole pool, kept because the union of 5.6 million is the same for 16 tasks."""
    return _read_pool(path, folder, max_tiles, None)


def _read_pool(path: Path, folder: Path, max_tiles: int, named: frozenset[str] | None) -> _Pool:
    """A pool.  named: the only candidates that are wanted."""
    source = Source(dataset=path.name, task="", split="", folder=folder, max_tiles=max_tiles)
    builder, gallery = TaskBuilder(source), Gallery([folder])
    declared: dict[str, str] = {}
    for place, row in read_rows(path, _CANDIDATE):
        did = place.text(row, "did")
        if named is not None and did not in named:
            continue
        try:
            picture = place.text(row, "img_path")
            item = builder.item(place.text(row, "txt"), *([_find(gallery, picture)] if picture else []))
        except DatasetError as error:
            builder.leave_out(did, f"{place}: {error}")
            continue
        builder.candidate(place, did, item)
        if row.get("modality") and (kind := modality(str(row["modality"]))) != item.modality:
            declared[did] = kind
    return _Pool(builder.candidates, tuple(builder.problems), declared)
