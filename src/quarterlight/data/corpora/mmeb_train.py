"""MMEB's training sets, and mmE5-synthetic, which has the same columns.

    <config>/original-*.parquet     of TIGER-Lab/MMEB-train: qry, qry_image_path, pos_text, pos_image_path and, in some
                                    configs, neg_text, neg_image_path; all strings, empty for none
    images_zip/<config>.zip         the pictures; the paths begin with images/, and names may hold blanks
    <config>/<config>.parquet       of intfloat/mmE5-synthetic: the two columns of negatives are lists written out as in
                                    Python

The split ``diverse_instruction`` has marks of pictures amid its sentences and ten wordings of the instruction, which
cannot be taken off: only ``original`` is read.  In mmE5-synthetic the instruction is part of the question and stays.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

from quarterlight.data.benchmarks.builder import without_tokens
from quarterlight.data.benchmarks.gallery import Gallery
from quarterlight.data.benchmarks.mmeb import train_prefixes, without_prefix
from quarterlight.data.benchmarks.tables import Place, Row, find_tables, read_rows
from quarterlight.data.corpora.example import Corpus, Example, Examples, Part, placed
from quarterlight.errors import DatasetError

COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
NEGATIVES = ("neg_text", "neg_image_path")


def read(corpus: Corpus) -> Examples:
    """The rows of a config of MMEB-train.  Options: ``config``; without it, the name of the folder."""
    config, folder = _config(corpus)
    query_prefix, target_prefix = train_prefixes(config)
    split = "original" if corpus.split == "train" else corpus.split
    yield from _read(
        find_tables(folder, config, split),
        _gallery(corpus, folder, config),
        lambda text: without_prefix(text, query_prefix),
        lambda text: without_prefix(text, target_prefix),
        lambda place, row, column: [place.text(row, column)],
    )


def read_mme5(corpus: Corpus) -> Examples:
    """The rows of a config of mmE5-synthetic: Classification, Retrieval or VQA.  Options: ``config``."""
    config, folder = _config(corpus)
    yield from _read(
        find_tables(folder, config, corpus.split),
        _gallery(corpus, folder, config),
        without_tokens,
        without_tokens,
        _written_list,
    )


def _config(corpus: Corpus) -> tuple[str, Path]:
    """The config and the folder of the repository; the folder of the config may be named instead."""
    if "config" in corpus.options:
        return corpus.options["config"], corpus.folder
    return corpus.folder.name, corpus.folder.parent


def _gallery(corpus: Corpus, folder: Path, config: str) -> Gallery:
    if corpus.images is not None:
        return corpus.gallery()
    return Gallery([folder], [folder / "images_zip" / f"{config}.zip"])


def _read(
    tables: list[Path],
    gallery: Gallery,
    query_text: Callable[[str], str],
    target_text: Callable[[str], str],
    negatives: Callable[[Place, Row, str], list[str]],
) -> Examples:
    def part(text: str, path: str) -> Part:
        return Part(text, (gallery.find(path),) if path else ())

    for table in tables:
        for place, row in read_rows(table, COLUMNS, known=NEGATIVES):
            try:
                query = part(query_text(place.text(row, "qry")), place.text(row, "qry_image_path"))
                positive = part(target_text(place.text(row, "pos_text")), place.text(row, "pos_image_path"))
                texts, paths = (negatives(place, row, column) if column in row else [""] for column in NEGATIVES)
                count = max(len(texts), len(paths))
                several = zip(texts + [""] * (count - len(texts)), paths + [""] * (count - len(paths)), strict=True)
                others = (part(target_text(text), path) for text, path in several)
                yield Example(place, query, (positive,), tuple(other for other in others if other.kind))
            except DatasetError as error:
                yield placed(place, error)


def _written_list(place: Place, row: Row, column: str) -> list[str]:
    """A list that is written out as in Python, read without running it."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if value.strip() else []
        except (ValueError, SyntaxError) as error:
            place.fail(f"{column} must be a list written out, got {value!r:.60} ({error})")
    if not isinstance(value, list | None) or not all(isinstance(one, str | None) for one in value or ()):
        place.fail(f"{column} must be a list of strings, got {value!r:.60}")
    return [one or "" for one in value or ()]
