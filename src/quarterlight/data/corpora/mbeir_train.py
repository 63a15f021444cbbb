"""M-BEIR's training queries, with those candidates of the union that they name: see the loader of the benchmark."""

from __future__ import annotations

from quarterlight.data.benchmarks import mbeir
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.benchmarks.tables import Place
from quarterlight.data.corpora.example import Corpus, Example, Examples, Part
from quarterlight.data.registry import datasets
from quarterlight.errors import DatasetError
from quarterlight.records import Item


def read(corpus: Corpus) -> Examples:
    """The queries of one task.  Options: ``set`` and ``task``, its number.

    The candidates that its queries name are held in memory, not the pool.
    """
    options = {"pool": "used", **corpus.options}
    source = Source(dataset="M-BEIR", task=corpus.task, split=corpus.split, folder=corpus.folder, options=options)
    task = mbeir.load(source)
    pool = {one.did: _part(one.item) for one in task.candidates}
    for problem in task.problems:
        yield DatasetError(f"{problem.reason}.")
    for number, query in enumerate(task.queries, 1):
        positives, negatives = (tuple(pool[did] for did in dids) for dids in (query.positives, query.negatives))
        yield Example(Place(corpus.folder, number), _part(query.item), positives, negatives)


def instructions(corpus: Corpus) -> tuple[str, ...]:
    """What queries of the task may have, by the registry: M-BEIR has them in a table of their own, not in rows."""
    name = f"M-BEIR/{corpus.options.get('set')} task{corpus.options.get('task')}".lower()
    return next((entry.query_instructions for entry in datasets() if entry.name.lower() == name), ())


def _part(item: Item) -> Part:
    return Part(item.text or "", item.images)
