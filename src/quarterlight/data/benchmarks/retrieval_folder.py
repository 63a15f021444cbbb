"""This project's own retrieval folders, as tasks of a suite: see :mod:`quarterlight.data.retrieval`."""

from __future__ import annotations

from quarterlight.data.benchmarks.source import Source
from quarterlight.data.retrieval import RetrievalDataset, RetrievalTask


def load(source: Source) -> RetrievalTask:
    """One task of a dataset's folder.  Raises DatasetError as :class:`RetrievalDataset` does."""
    return RetrievalDataset(source.folder).load(source.task, source.split)
