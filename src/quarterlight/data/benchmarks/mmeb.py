"""MMEB as first published: ``TIGER-Lab/MMEB-eval``, and its pictures in ``images.zip``.

    <config>/test-*.parquet     qry_text, qry_img_path: strings; tgt_text, tgt_img_path: lists of strings
    images.zip                  or unpacked, in images/ or beside the configs

Each query chooses from its own list, whose first candidate is the right one.  The texts hold the instruction and marks
of pictures; both are taken off, since the instruction is put in front again by the prompt (VLM2Vec, arXiv:2410.05160).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache

from quarterlight.data.benchmarks.builder import TaskBuilder, without_tokens
from quarterlight.data.benchmarks.gallery import Gallery
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.benchmarks.tables import Place, Row, find_tables, read_rows
from quarterlight.data.registry import resource_rows
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError
from quarterlight.records import ImageSource

COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


def load(source: Source) -> RetrievalTask:
    """One config as a task.  Options: ``config``; without it, the name of the dataset.

    Raises DatasetError for a table that breaks the layout; rows whose pictures are missing are listed in the task.
    """
    config = source.option("config", source.dataset)
    prefixes = eval_prefixes(config)
    return choices(
        source,
        config,
        gallery=Gallery([source.folder / "images", source.folder], [source.folder / "images.zip"]),
        columns=COLUMNS,
        query_text=lambda text: without_prefix(text, prefixes[0]),
        target_text=lambda text: without_prefix(text, prefixes[1]),
    )


def choices(
    source: Source,
    config: str,
    *,
    gallery: Gallery,
    columns: Sequence[str],
    query_text: Callable[[str], str],
    target_text: Callable[[str], str],
) -> RetrievalTask:
    """Rows of a query and its list of candidates, the first of which is right.

    Candidates with the same text and picture are one, which is embedded once; a copy of the right one is right.
    """
    builder = TaskBuilder(source)
    number = 0
    shared: dict[tuple[str, str], str] = {}  # a thousand queries list the same thousand candidates

    def target(text: str, path: str) -> str:
        if (did := shared.get((text, path))) is None:
            item = builder.item(target_text(text), *([gallery.find(path)] if path else []))
            did = shared[text, path] = builder.share(item)
        return did

    for path in find_tables(source.folder, config, source.split):
        for place, row in read_rows(path, columns, known=()):
            number += 1
            texts, paths = place.texts(row, "tgt_text"), place.texts(row, "tgt_img_path")
            if len(texts) != len(paths):
                place.fail(f"tgt_text has {len(texts)} candidates and tgt_img_path {len(paths)}: expected as many")
            try:
                item = builder.item(query_text(place.text(row, "qry_text")), *_picture(place, row, gallery))
                dids = [target(text, path) for text, path in zip(texts, paths, strict=True)]
            except DatasetError as error:
                builder.lost_query(str(number), f"{place}: {error}")
                continue
            builder.query(place, str(number), item, dids[:1], candidates=dids)
    return builder.build()


def without_prefix(text: str, prefix: str) -> str:
    """The text without marks of pictures, the instruction in front of it and the quotes around it.

    >>> without_prefix('<|image_1|> Select the portion of the image that isolates the object labeled as "cup"\\n',
    ...     "Select the portion of the image that isolates the object labeled as ")
    'cup'
    """
    text = without_tokens(text)
    if prefix.strip() and (found := _pattern(prefix).match(text)):
        text = text[found.end() :]
    return unquoted(text)


def unquoted(text: str) -> str:
    """The text without a pair of double quotes around the whole of it, as around labels and expressions."""
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1] else text


@cache
def eval_prefixes(dataset: str) -> tuple[str, str]:
    """What stands in front of the texts of queries and targets of an MMEB evaluation set."""
    for row in resource_rows("mmeb_prefixes.csv"):
        if row["dataset"] == dataset:
            return row["eval_query_prefix"], row["eval_target_prefix"]
    raise DatasetError(f"MMEB has no evaluation set {dataset!r}.")


@cache
def train_prefixes(config: str) -> tuple[str, str]:
    """What stands in front of the texts of queries and targets of an MMEB training set, by its config."""
    for row in resource_rows("mmeb_prefixes.csv"):
        if row["train_config"] and config in (row["train_config"], row["dataset"]):
            return row["train_query_prefix"], row["train_target_prefix"]
    raise DatasetError(f"MMEB has no training set {config!r}.")


@cache
def _pattern(prefix: str) -> re.Pattern[str]:
    """The prefix with any white space between its words, and with or without a full stop or colon."""
    return re.compile(r"\s+".join(re.escape(word) for word in prefix.split()) + r"[.:]?\s*")


def _picture(place: Place, row: Row, gallery: Gallery) -> list[ImageSource]:
    path = place.text(row, "qry_img_path")
    return [gallery.find(path)] if path else []
