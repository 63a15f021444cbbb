"""The nearest candidates of each query by dot product: all of them compared, or an index whose recall is measured.

Legend of shapes: Q queries, C candidates, D columns, K neighbours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple, Protocol

import faiss
import numpy as np
import numpy.typing as npt
import torch

from quarterlight.errors import InputError
from quarterlight.files import replace_file, replacing

BLOCK_BYTES = 2**28
"""Candidates that are in memory at once."""

EXACT_LIMIT = 1_000_000
"""Candidates up to which all are compared on a CPU; a GPU compares any number."""

RECALL = 0.95
"""Share of the exact neighbours that an index finds, at least; more of its lists are searched until it does."""

_SAMPLE = 512  # queries by which the recall of an index is measured
_SCORES = 2**28  # that a GPU holds at once: 1 GiB, and as much again for sorting
_FIRST_PROBES = 8
_ROWS_PER_LIST = 64  # that k-means sees; faiss wants at least 39


class Rows(Protocol):
    """Vectors that are read a slice at a time: an array, or rows on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> npt.NDArray[np.float32]: ...


class Neighbours(NamedTuple):
    """What is nearest to each query, best first; equal scores in the order of the columns.

    score_QK: float32.  column_QK: int64, -1 (with a score of -inf) where an index found fewer than K.
    """

    score_QK: npt.NDArray[np.float32]
    column_QK: npt.NDArray[np.int64]


class ExactSearch:
    """Compares with every candidate, so many at a time as fill ``block_bytes``.

    device: where; ``None`` takes a GPU if there is one, and faiss on the CPU otherwise.
    """

    recall = 1.0

    def __init__(self, candidate_CD: Rows, *, device: str | None = None, block_bytes: int = BLOCK_BYTES) -> None:
        self.candidate_CD = candidate_CD
        self.device = device or ("cuda" if torch.cuda.is_available() else None)
        self.block = max(1, block_bytes // (4 * candidate_CD.shape[1]))

    def search(self, query_QD: npt.NDArray[np.float32], k: int) -> Neighbours:
        """The ``min(k, C)`` nearest candidates of each query."""
        num_candidates = self.candidate_CD.shape[0]
        k = min(k, num_candidates)
        query_QD = np.ascontiguousarray(query_QD, np.float32)
        best = Neighbours(np.empty((len(query_QD), 0), np.float32), np.empty((len(query_QD), 0), np.int64))
        for start in range(0, num_candidates if len(query_QD) else 0, self.block):
            block_BD = np.ascontiguousarray(self.candidate_CD[start : start + self.block], np.float32)
            score_QK, column_QK = self._compare(query_QD, block_BD, min(k, len(block_BD)))
            found = Neighbours(
                np.concatenate([best.score_QK, score_QK], axis=1),
                np.concatenate([best.column_QK, column_QK + start], axis=1),
            )
            best = _sorted(found, k)
        return best

    def _compare(self, query_QD: npt.NDArray[np.float32], block_BD: npt.NDArray[np.float32], k: int) -> Neighbours:
        if self.device is None:
            return Neighbours(*faiss.knn(query_QD, block_BD, k, metric=faiss.METRIC_INNER_PRODUCT))
        block_DB = torch.from_numpy(block_BD).to(self.device).T
        parts = [
            torch.topk(part_PD.to(self.device) @ block_DB, k)
            for part_PD in torch.from_numpy(query_QD).split(max(1, _SCORES // len(block_BD)))
        ]
        return Neighbours(
            np.concatenate([part.values.cpu().numpy() for part in parts]),
            np.concatenate([part.indices.cpu().numpy() for part in parts]),
        )


class IndexedSearch:
    """Searches the lists of an inverted index (faiss IndexIVFFlat) on disk that :func:`build_index` wrote.

    recall: share of the exact neighbours that it found for a sample of the queries.
    """

    def __init__(self, file: Path) -> None:
        self._index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
        self.recall = float(json.loads(_notes(file).read_text(encoding="utf-8"))["recall"])

    def search(self, query_QD: npt.NDArray[np.float32], k: int) -> Neighbours:
        """Up to k near candidates of each query, nearly always the nearest."""
        score_QK, column_QK = self._index.search(np.ascontiguousarray(query_QD, np.float32), k)
        score_QK[column_QK < 0] = -np.inf
        return _sorted(Neighbours(score_QK, column_QK), k)


Search = ExactSearch | IndexedSearch


def build_index(candidate_CD: Rows, query_QD: Rows, k: int, file: Path, *, recall: float = RECALL) -> None:
    """Writes an inverted index of the candidates that finds ``recall`` of the k nearest for a sample of the queries.

    It has about 4 sqrt(C) lists (the advice of faiss up to a million), and is as large as the candidates in memory and
    on disk.  It searches 8 lists, 16, 32, ... until the recall is reached.
    """
    num_candidates, columns = candidate_CD.shape
    num_lists = max(1, round(4 * num_candidates**0.5))
    if num_candidates < _ROWS_PER_LIST * num_lists // 2:
        raise InputError(f"{num_candidates:,} candidates are too few for an index: compare them all.")
    rows = max(1, BLOCK_BYTES // (4 * columns))
    starts = range(0, num_candidates, rows)
    step = max(1, num_candidates // (_ROWS_PER_LIST * num_lists))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(columns), columns, num_lists, faiss.METRIC_INNER_PRODUCT)
    index.train(np.concatenate([candidate_CD[start : start + rows][::step] for start in starts]))
    for start in starts:
        index.add(np.ascontiguousarray(candidate_CD[start : start + rows]))
    step = max(1, query_QD.shape[0] // _SAMPLE)
    sample_SD = np.concatenate([query_QD[row : row + 1] for row in range(0, query_QD.shape[0], step)])
    exact = ExactSearch(candidate_CD).search(sample_SD, k).column_QK
    index.nprobe, found = min(_FIRST_PROBES, num_lists), _recall(index, sample_SD, exact)
    while found < recall and index.nprobe < num_lists:
        index.nprobe = min(2 * index.nprobe, num_lists)
        found = _recall(index, sample_SD, exact)
    notes = {"recall": found, "lists": num_lists, "searched": index.nprobe}
    replace_file(_notes(file), json.dumps(notes))
    with replacing(file) as draft:
        faiss.write_index(index, str(draft))


def _recall(index: faiss.IndexIVFFlat, sample_SD: npt.NDArray[np.float32], exact_SK: npt.NDArray[np.int64]) -> float:
    """The share of the exact neighbours that the index finds."""
    _, found_SK = index.search(sample_SD, exact_SK.shape[1])
    hits = sum(len(np.intersect1d(found, exact)) for found, exact in zip(found_SK, exact_SK, strict=True))
    return hits / exact_SK.size


def _sorted(found: Neighbours, k: int) -> Neighbours:
    """The k best, equal scores in the order of the columns."""
    order_QK = np.lexsort((found.column_QK, -found.score_QK), axis=1)[:, :k]
    return Neighbours(
        np.take_along_axis(found.score_QK, order_QK, axis=1), np.take_along_axis(found.column_QK, order_QK, axis=1)
    )


def _notes(file: Path) -> Path:
    return file.with_suffix(".json")
