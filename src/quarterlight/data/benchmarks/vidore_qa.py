"""ViDoRe v1 as first published: one table of questions, each with its page; pages without a question distract.

    <split>-*.parquet     in data/ or the folder itself: query (null for a distractor), image {bytes, path},
                          image_filename, anything else (answer, source, page, ...)

The page of a question is the one of the same ``image_filename``.  A question that occurs with two pages has only the
later one, as the official evaluator reads it; scores therefore differ from the same data in the layout of BEIR, where
both are relevant.
"""

from __future__ import annotations

from quarterlight.data.benchmarks.beir import picture
from quarterlight.data.benchmarks.builder import TaskBuilder
from quarterlight.data.benchmarks.gallery import Gallery
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.benchmarks.tables import Place, find_tables, read_rows
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError


def load(source: Source) -> RetrievalTask:
    """Every page once, by its name, and every question once.  Raises DatasetError for a table that breaks the layout.

    A page that has no picture is listed with its questions.
    """
    builder = TaskBuilder(source)
    gallery = Gallery([source.folder, source.folder / "images"])
    page_of: dict[str, tuple[Place, str]] = {}
    for path in find_tables(source.folder, "default", source.split):
        for place, row in read_rows(path, ("query", "image", "image_filename")):
            name = place.text(row, "image_filename")
            if not name:
                place.fail("image_filename is empty")
            if name not in builder.candidates:
                try:
                    builder.candidate(place, name, builder.item("", picture(source, gallery, row["image"])))
                except DatasetError as error:
                    builder.leave_out(name, f"{place}: {error}")
            if query := place.text(row, "query").strip():
                page_of[query] = (place, name)
    for number, (query, (place, name)) in enumerate(page_of.items(), 1):
        builder.query(place, str(number), builder.item(query), [name] if name in builder.candidates else [])
    return builder.build()
