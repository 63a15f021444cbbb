"""MegaPairs: a picture and a change to it find a picture (arXiv:2412.14475).

    *.jsonl     q_img: path; q_text: list of instructions; t_img: path; hns: list of paths

The first of ``hns`` is the query's own picture, which is meant to stay a negative.  Of the instructions, which say the
same, each makes a query of its own if ``texts`` is ``all``; the usual is the first.
"""

from __future__ import annotations

from quarterlight.data.benchmarks.tables import read_rows
from quarterlight.data.corpora.example import Corpus, Example, Examples, Part, placed
from quarterlight.errors import DatasetError


def read(corpus: Corpus) -> Examples:
    """The rows of a file, or of every ``*.jsonl`` of a folder.  Options: ``texts``, ``first`` or ``all``."""
    gallery = corpus.gallery()
    every = corpus.options.get("texts", "first") == "all"
    for path in [corpus.path] if corpus.path.is_file() else sorted(corpus.path.rglob("*.jsonl")):
        for place, row in read_rows(path, ("q_img", "q_text", "t_img")):
            try:
                texts = place.texts(row, "q_text")
                picture = gallery.find(place.text(row, "q_img"))
                target = Part("", (gallery.find(place.text(row, "t_img")),))
                negatives = tuple(Part("", (gallery.find(path),)) for path in place.ids(row, "hns"))
            except DatasetError as error:
                yield placed(place, error)
                continue
            for text in texts if every else texts[:1]:
                yield Example(place, Part(text, (picture,)), (target,), negatives)
