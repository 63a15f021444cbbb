"""What indexing and searching ask of models.

:class:`quarterlight.models.embedder.Embedder` is an :class:`Encoder` with :class:`Eyes`, and
:class:`quarterlight.models.reranker.Reranker` a :class:`Reranker`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from quarterlight.errors import NOT_FINITE, CheckpointError, InputError
from quarterlight.index import ModelIdentity
from quarterlight.records import ImageSource, Item

if TYPE_CHECKING:  # imports torch
    from quarterlight.models.settings import RerankerSettings

Encoded = TypeVar("Encoded")

Tokens: TypeAlias = "npt.NDArray[np.floating[Any]] | None"
"""Visual tokens of all tiles of an item's picture, ``[tokens, columns]``; ``None`` where there are none."""


class Pictures(Protocol):
    """How a model reads pictures: what it makes of ``fit(read(file, n), n)`` is what it makes of the file.

    :class:`quarterlight.models.pictures.Pictures` is one.  It can be pickled, and used by several threads.
    max_tiles: of the item; ``None`` takes the model's default.
    """

    def read(self, source: ImageSource, max_tiles: int | None = None) -> Image.Image:
        """The picture, decoded. Raises ImageError."""

    def fit(self, picture: Image.Image, max_tiles: int | None = None) -> Image.Image:
        """As much of a picture that was read as the model makes use of."""


class Encoder(Protocol):
    """Turns items into vectors: float32 ``[N, dimension]``, rows of L2 norm 1.

    name: as the user wrote it.  model_hash: hex, over everything that changes a vector.
    """

    @property
    def pictures(self) -> Pictures: ...

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


class Eyes(Encoder, Protocol):
    """An encoder that also tells what it saw, for the visual tokens of an index.

    vision_hash: hex, over everything that changes a visual token.
    """

    @property
    def vision_hash(self) -> str: ...

    def encode_document_with_visual_tokens(
        self, items: Sequence[Item], *, instruction: str | None = None
    ) -> tuple[npt.NDArray[np.float32], Sequence[Tokens]]:
        """As ``encode_document``, and the visual tokens of each item."""


class Reranker(Protocol):
    """Tells how well candidates meet a query.

    vision_hash: as of :class:`Eyes`; stored tokens of the same hash are used in place of pictures.
    settings: of which the weight of its score beside the cosine.
    """

    @property
    def pictures(self) -> Pictures: ...

    @property
    def vision_hash(self) -> str: ...

    @property
    def settings(self) -> RerankerSettings: ...

    def score(
        self,
        query: Item,
        candidates: Sequence[Item],
        *,
        instruction: str | None = None,
        visual_tokens: Sequence[Tokens] | None = None,
    ) -> npt.NDArray[np.float32]:
        """P(Yes) of each candidate, in [0, 1].

        visual_tokens: of each candidate, whose picture is then not looked at; ``None`` for the others.
        """


def identity_of(encoder: Encoder) -> ModelIdentity:
    """What a store remembers of the model."""
    return ModelIdentity(name=encoder.name, hash=encoder.model_hash, dimension=encoder.dimension)


def encode_each(encode: Callable[[Sequence[Item]], Iterable[Encoded]], items: Sequence[Item]) -> list[Encoded | str]:
    """What ``encode`` makes of each item, or why it refuses that one; it is asked one by one where it refuses some.

    Raises CheckpointError when it makes something of none of them and the weights look damaged.
    """
    if not items:
        return []
    try:
        return list(encode(items))
    except InputError as error:
        if len(items) == 1:
            return [" ".join(str(error).split())]
    found: list[Encoded | str] = []
    damaged: CheckpointError | None = None
    for item in items:
        try:
            found += encode_each(encode, [item])
        except CheckpointError as error:  # what is not a number alone may be the item's fault or that of the weights
            damaged = error
            found.append(NOT_FINITE)
    if damaged is not None and all(isinstance(one, str) for one in found):
        raise damaged
    return found
