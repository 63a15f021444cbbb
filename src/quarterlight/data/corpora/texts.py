"""Texts that find texts.

    *.jsonl[.gz]            query, pos and neg (lists), as BAAI's text pairs are written; BAAI-MTP too, as far as known
    nli_for_simcse.csv      of princeton-nlp/datasets-for-simcse: sent0, sent1, hard_neg
    triplet/train-*         of sentence-transformers/nli-for-simcse: anchor, positive, negative

Other names of columns are given as options.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from quarterlight.data.benchmarks.tables import Place, Row, find_tables, read_rows
from quarterlight.data.corpora.example import Corpus, Example, Examples, Part, placed
from quarterlight.errors import DatasetError

_NLI = (("sent0", "sent1", "hard_neg"), ("anchor", "positive", "negative"))


def read(corpus: Corpus) -> Examples:
    """Pairs in JSON lines.  Options: ``query``, ``pos``, ``neg``, the names of the columns."""
    names = tuple(corpus.options.get(name, name) for name in ("query", "pos", "neg"))
    files = [corpus.path] if corpus.path.is_file() else sorted(corpus.path.rglob("*.jsonl*"))
    if not files:
        raise DatasetError(f"{corpus.path} has no file *.jsonl.")
    for path in files:
        yield from _read(path, (names[0], names[1], names[2]))


def read_nli(corpus: Corpus) -> Examples:
    """Triples of a premise, what follows from it and what contradicts it."""
    own = [corpus.path] if corpus.path.is_file() else sorted(corpus.path.glob("*.csv"))
    for path in own or find_tables(corpus.folder, "triplet", corpus.split):
        for names in _NLI:
            if _has(path, names[0]):
                yield from _read(path, names)
                break
        else:
            raise DatasetError(f"{path} has neither a column sent0 nor a column anchor.")


def _read(path: Path, names: tuple[str, str, str]) -> Examples:
    for place, row in read_rows(path, names[:2]):
        try:
            positives, negatives = (_texts(place, row, name) for name in names[1:])
            yield Example(place, Part(place.text(row, names[0]).strip()), positives, negatives)
        except DatasetError as error:
            yield placed(place, error)


def _texts(place: Place, row: Row, column: str) -> tuple[Part, ...]:
    value = row.get(column)
    texts = place.texts(row, column) if isinstance(value, list) else [place.text(row, column)]
    return tuple(Part(text.strip()) for text in texts if text.strip())


def _has(path: Path, column: str) -> bool:
    return any(column in row for _, row in itertools.islice(read_rows(path, ()), 1))
