from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quarterlight.errors import InputError
from quarterlight.mining.neighbours import ExactSearch, IndexedSearch, build_index


def _vectors(rows: int, seed: int, columns: int = 16) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("device", [None, "cpu"])  # faiss, and what a GPU does
@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_exact_is_brute_force(device: str | None, block: int) -> None:
    query_QD, candidate_CD = _vectors(20, 0), _vectors(200, 1)
    score_QC = query_QD @ candidate_CD.T
    expected_QK = np.argsort(-score_QC, axis=1)[:, :9]
    found = ExactSearch(candidate_CD, device=device, block_bytes=block * 16 * 4).search(query_QD, 9)
    assert np.array_equal(found.column_QK, expected_QK)
    assert found.score_QK == pytest.approx(np.take_along_axis(score_QC, expected_QK, axis=1), abs=1e-6)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_equal_scores_stand_in_the_order_of_the_columns(device: str | None) -> None:
    candidate_CD = np.repeat(np.eye(4, dtype=np.float32), 5, axis=0)  # columns 0-4 are alike, then 5-9, ...
    found = ExactSearch(candidate_CD, device=device).search(np.eye(4, dtype=np.float32)[2:3], 20)
    assert found.column_QK[0].tolist() == [*range(10, 15), *range(10), *range(15, 20)]


def test_more_neighbours_than_candidates() -> None:
    found = ExactSearch(_vectors(3, 1)).search(_vectors(2, 0), 10)
    assert found.column_QK.shape == (2, 3)
    assert ExactSearch(_vectors(0, 1)).search(_vectors(2, 0), 10).column_QK.shape == (2, 0)
    assert ExactSearch(_vectors(3, 1)).search(_vectors(0, 0), 10).column_QK.shape[0] == 0


def test_index_has_the_recall_that_it_says(tmp_path: Path) -> None:
    query_QD, candidate_CD = _vectors(300, 0), _vectors(20_000, 1)
    build_index(candidate_CD, query_QD, 10, tmp_path / "index.faiss")
    search = IndexedSearch(tmp_path / "index.faiss")
    exact, found = ExactSearch(candidate_CD).search(query_QD, 10), search.search(query_QD, 10)
    hits = sum(len(set(a) & set(b)) for a, b in zip(exact.column_QK.tolist(), found.column_QK.tolist(), strict=True))
    assert search.recall == pytest.approx(hits / 3000)
    assert 0.95 <= search.recall <= 1.0
    assert (np.diff(found.score_QK, axis=1) <= 0).all()
    assert not list(tmp_path.glob("*.part"))


def test_few_candidates_need_no_index(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="200 candidates are too few"):
        build_index(_vectors(200, 1), _vectors(2, 0), 10, tmp_path / "index.faiss")
