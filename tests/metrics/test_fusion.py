from __future__ import annotations

import numpy as np
import pytest

from quarterlight.metrics.fusion import fuse, places


def test_weights() -> None:
    recall, rerank = np.array([0.9, 0.8, -0.2], np.float32), np.array([0.1, 0.7, 1.0], np.float32)
    np.testing.assert_array_equal(fuse(recall, rerank, 1), rerank)
    np.testing.assert_array_equal(fuse(recall, rerank, 0), recall)
    np.testing.assert_allclose(fuse(recall, rerank, 0.25), [0.7, 0.775, 0.1], atol=1e-6)
    assert fuse(recall[:0], rerank[:0], 0.5).shape == (0,)


def test_impossible_arguments() -> None:
    with pytest.raises(ValueError, match=r"cosines of shape \[2\] and reranker's scores of shape \[3\]"):
        fuse(np.zeros(2), np.zeros(3), 1)
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            fuse(np.zeros(2), np.zeros(2), weight)


def test_places() -> None:
    recall = np.array([0.5, 0.9, 0.9, 0.7])
    assert places(recall, np.array([0.9, 0.1, 0.2, 0.5]), 1).tolist() == [0, 3, 2, 1]
    assert places(recall, np.array([0.9, 0.1, 0.2, 0.5]), 0.1).tolist() == [3, 1, 0, 2]
    # equal scores of the reranker leave the order of the search, and what ties there ties still
    assert places(recall, np.full(4, 0.3), 1).tolist() == [2, 0, 0, 1]
    assert places(recall + np.array([0, 1e-8, 0, 0]), np.full(4, 0.3), 0.5).tolist() == [2, 0, 0, 1]
    # the cosine alone is no tie
    assert places(recall, np.array([0.3, 0.1, 0.2, 0.3]), 1).tolist() == [1, 3, 2, 0]
    assert places(recall[:1], recall[:1], 1).tolist() == [0]
    assert places(recall[:0], recall[:0], 1).tolist() == []


def test_without_weight_the_reranker_does_not_break_ties() -> None:
    recall = np.array([0.5, 0.5, 0.5])
    assert places(recall, np.array([0.9, 0.1, 0.5]), 0.0).tolist() == [0, 0, 0]
