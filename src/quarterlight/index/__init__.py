"""Vectors on disk with what they stand for: rows, locations, and the stores that keep them and their visual tokens."""

from quarterlight.index.precision import VECTOR_PRECISIONS, VectorPrecision
from quarterlight.index.rows import KINDS, Kind, Row
from quarterlight.index.store import IndexedFile, IndexStore, ModelIdentity
from quarterlight.index.visual_tokens import PRECISIONS, Precision, VisualTokenStore

__all__ = [
    "KINDS",
    "PRECISIONS",
    "VECTOR_PRECISIONS",
    "IndexStore",
    "IndexedFile",
    "Kind",
    "ModelIdentity",
    "Precision",
    "Row",
    "VectorPrecision",
    "VisualTokenStore",
]
