"""Vectors on disk with what they stand for: rows, locations, and the store that keeps them."""

from quarterlight.index.rows import KINDS, Kind, Row
from quarterlight.index.store import IndexedFile, IndexStore, ModelIdentity

__all__ = ["KINDS", "IndexStore", "IndexedFile", "Kind", "ModelIdentity", "Row"]
