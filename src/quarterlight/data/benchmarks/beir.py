"""Three tables of pages, questions and relevance: ViDoRe v1 and v2, VisRAG, ViDoSeek and MMLongBench-Doc.

    corpus/<split>-*.parquet     corpus-id (int or string), image {bytes, path}
    queries/<split>-*.parquet    query-id, query, anything else (language, corpus_range, ...)
    qrels/<split>-*.parquet      query-id, corpus-id, score (int, or float with a whole value)

mteb's copies of some have the ids in a column ``id`` or ``_id``, the question in ``text`` and qrels in ``data/``.  The
rows of VisRAG lie in a split named ``train``; its ids are names of files, also with blanks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quarterlight.data.benchmarks.builder import TaskBuilder
from quarterlight.data.benchmarks.gallery import Gallery
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.benchmarks.tables import Place, Row, find_tables, read_rows
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError, did_you_mean
from quarterlight.records import ImageSource

_IDS = ("id", "_id")


def load(source: Source) -> RetrievalTask:
    """The whole corpus and every question; several pages may be relevant, in grades.

    Options: ``split`` of the files, where it differs from the task's.  A score of 0 or less is not relevant; of a page
    that is judged twice for one question, the highest counts.  Left out and listed: questions without a relevant page,
    pages without a picture.  Raises DatasetError for a table that breaks the layout and an id that occurs twice.
    """
    builder = TaskBuilder(source)
    folder, split = source.folder, source.option("split", source.split)
    gallery = Gallery([folder, folder / "images"])
    for path in find_tables(folder, "corpus", split):
        for place, row in read_rows(path, ("image",)):
            did = _id(place, row, "corpus-id", *_IDS)
            try:
                item = builder.item("", picture(source, gallery, row["image"]))
            except DatasetError as error:
                builder.leave_out(did, f"{place}: {error}")
                continue
            builder.candidate(place, did, item)
    grades = _grades(find_tables(folder, "qrels" if (folder / "qrels").is_dir() else "default", split))
    for path in find_tables(folder, "queries", split):
        for place, row in read_rows(path, ()):
            qid = _id(place, row, "query-id", *_IDS)
            judged = {did: grade for did, grade in grades.pop(qid, {}).items() if grade > 0}
            relevant = {did: grade for did, grade in judged.items() if did in builder.candidates}
            if len(relevant) < len(judged):
                missing = next(did for did in judged if did not in relevant)
                builder.lost_query(qid, f"{place}: its relevant page {missing!r} is not in the corpus")
                continue
            try:
                item = builder.item(place.text(row, _column(place, row, "query", "text")))
            except DatasetError as error:
                builder.lost_query(qid, f"{place}: {error}")
                continue
            fields = {key: value for key, value in row.items() if key in ("language", "doc_type", "source_type")}
            builder.query(place, qid, item, tuple(relevant), grades=relevant, fields=fields)
    for qid in grades:
        builder.lost_query(qid, f"{folder}: qrels judge a query that is not among the queries")
    return builder.build()


def picture(source: Source, gallery: Gallery, value: Any) -> ImageSource:
    """The picture in a cell of a table: its bytes, or the path of a file beside the tables.

    Raises DatasetError, as the end of a sentence, when there is neither.
    """
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes) and data:
            return source.keep(data)
        value = path
    if isinstance(value, bytes) and value:
        return source.keep(value)
    if isinstance(value, str) and value:
        return gallery.find(value)
    raise DatasetError("there is no picture in the row")


def _grades(paths: list[Path]) -> dict[str, dict[str, int]]:
    grades: dict[str, dict[str, int]] = {}
    for path in paths:
        for place, row in read_rows(path, ("query-id", "corpus-id", "score")):
            score = row["score"]
            if isinstance(score, bool) or not isinstance(score, (int, float)) or score != score or score != int(score):
                place.fail(f"score must be a whole number, got {score!r}")
            pages = grades.setdefault(_id(place, row, "query-id"), {})
            did = _id(place, row, "corpus-id")
            pages[did] = max(pages.get(did, int(score)), int(score))
    return grades


def _id(place: Place, row: Row, *columns: str) -> str:
    column = _column(place, row, *columns)
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        place.fail(f"{column} must be a number or a string, got {value!r}")
    return str(value)


def _column(place: Place, row: Row, *columns: str) -> str:
    """The first of these columns that the table has."""
    for column in columns:
        if column in row:
            return column
    place.fail(f"the column {columns[0]!r} is missing. {did_you_mean(columns[0], row)}")
