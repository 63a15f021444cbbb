"""What indexing and searching ask of a model; :class:`quarterlight.models.embedder.Embedder` gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from quarterlight.index import ModelIdentity
from quarterlight.records import Item


class Encoder(Protocol):
    """Turns items into vectors: float32 ``[N, dimension]``, rows of L2 norm 1.

    name: as the user wrote it.  model_hash: hex, over everything that changes a vector.
    """

    @property
    def name(self) -> str: ...

    @property
    def model_hash(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    def encode_query(self, items: Sequence[Item], *, instruction: str | None = None) -> npt.NDArray[np.float32]:
        """Vectors of what is searched with. Raises InputError for an item that cannot be used."""

    def encode_document(self, items: Sequence[Item], *, instruction: str | None = None) -> npt.NDArray[np.float32]:
        """Vectors of what is searched for. Raises InputError for an item that cannot be used."""


def identity_of(encoder: Encoder) -> ModelIdentity:
    """What a store remembers of the model."""
    return ModelIdentity(name=encoder.name, hash=encoder.model_hash, dimension=encoder.dimension)
