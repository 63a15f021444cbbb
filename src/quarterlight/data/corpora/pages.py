"""Questions about pages of documents.

    data/train-*.parquet     of vidore/colpali_train_set: query, image {bytes, path}, answer, source, ...
                             of openbmb/VisRAG-Ret-Train-*: query, image, source
    images/train-*.parquet   of HuggingFaceM4/Docmatix: images (list of them), texts (list of {user, assistant, source})

A question of Docmatix finds the whole document, since nothing says on which page the answer is; or, as ``it2t``, the
pages and the question find the answer.
"""

from __future__ import annotations

from typing import Any

from quarterlight.data.benchmarks.gallery import Gallery
from quarterlight.data.benchmarks.tables import find_tables, read_rows
from quarterlight.data.corpora.example import Corpus, Example, Examples, Part, placed
from quarterlight.errors import DatasetError
from quarterlight.records import ImageSource


def read(corpus: Corpus) -> Examples:
    """A page for each question."""
    gallery = corpus.gallery()
    for path in find_tables(corpus.folder, corpus.options.get("config", "default"), corpus.split):
        for place, row in read_rows(path, ("query", "image")):
            try:
                page = Part("", (_picture(gallery, row["image"]),))
                yield Example(place, Part(place.text(row, "query").strip()), (page,))
            except DatasetError as error:
                yield placed(place, error)


def read_docmatix(corpus: Corpus) -> Examples:
    """Every question of every document, with all of its pages.  Options: ``pages``, the most that are kept; 4."""
    gallery = corpus.gallery()
    limit = int(corpus.options.get("pages", "4"))
    for path in find_tables(corpus.folder, corpus.options.get("config", "images"), corpus.split):
        for place, row in read_rows(path, ("images", "texts")):
            try:
                pages = tuple(_picture(gallery, cell) for cell in (row["images"] or ())[:limit])
                for turn in row["texts"] or ():
                    question, answer = (place.text(turn, column).strip() for column in ("user", "assistant"))
                    if corpus.task == "it2t":
                        yield Example(place, Part(question, pages), (Part(answer),))
                    else:
                        yield Example(place, Part(question), (Part("", pages),))
            except DatasetError as error:
                yield placed(place, error)


def _picture(gallery: Gallery, cell: Any) -> ImageSource:
    """Bytes or a path.  Raises DatasetError, as the end of a sentence, when there is neither."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes) and cell:
        return cell
    if isinstance(cell, str) and cell:
        return gallery.find(cell)
    raise DatasetError("there is no picture in the row")
