"""Two opinions of the same candidates as one: the embedder's cosine and the reranker's probability.

K candidates, the first that the embedder found.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from quarterlight.metrics.ranking import PRODUCT_TOLERANCE

Floats: TypeAlias = npt.NDArray[np.floating[Any]]

RERANK = 5
"""Candidates that a reranker is given unless told otherwise, as in Magic-MM-Embedding (table 7)."""


def fuse(recall_K: Floats, rerank_K: Floats, weight: float) -> npt.NDArray[np.float64]:
    """The scores by which K candidates are ordered, higher first, float64 [K].

    (1 - weight) * recall + weight * rerank.  At weight 1 the reranker alone decides, as in Magic-MM-Embedding
    (section 3.4); below, the cosine has a say, as in U-MARVEL+.

    recall_K: cosines in [-1, 1].  rerank_K: P(Yes) in [0, 1].  Any shapes, if they are the same.
    Raises ValueError when the shapes differ or the weight is outside [0, 1].

    >>> fuse(np.array([0.75, 0.5]), np.array([0.0, 1.0]), 0.5).tolist()
    [0.375, 0.75]
    """
    if recall_K.shape != rerank_K.shape:
        raise ValueError(
            f"Every candidate needs both scores; got cosines of shape {list(recall_K.shape)} and reranker's scores of "
            f"shape {list(rerank_K.shape)}."
        )
    if not 0 <= weight <= 1:
        raise ValueError(f"The weight of the reranker must be from 0 to 1, got {weight}.")
    return (1 - weight) * recall_K.astype(np.float64) + weight * rerank_K.astype(np.float64)


def places(
    recall_K: Floats, rerank_K: Floats, weight: float, *, tolerance: float = PRODUCT_TOLERANCE
) -> npt.NDArray[np.int64]:
    """The places of K candidates by their fused scores, int64 [K]: 0 for the best, equal ones for a tie.

    Where the fused scores are equal the cosine decides, as in a search, which reranks what stands in its order.  A tie
    takes both: the same score of the reranker, and cosines within ``tolerance``.

    >>> places(np.array([0.9, 0.8, 0.7, 0.7]), np.array([0.1, 0.1, 0.5, 0.5]), 1.0).tolist()
    [1, 2, 0, 0]
    """
    order = np.lexsort((-recall_K, -fuse(recall_K, rerank_K, weight)))
    # where the reranker has no weight, it does not break ties either
    recall, rerank = recall_K[order], (rerank_K if weight else np.zeros_like(rerank_K))[order]
    is_next = (rerank[1:] != rerank[:-1]) | (np.abs(np.diff(recall)) > tolerance)
    place_K = np.zeros(len(order), np.int64)
    place_K[order[1:]] = np.cumsum(is_next)
    return place_K
