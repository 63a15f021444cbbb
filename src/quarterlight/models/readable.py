"""Embeddings of items of which some have pictures that cannot be read, or embeddings that are not numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from quarterlight.errors import NOT_FINITE, ImageError, InputError, NotFiniteError
from quarterlight.images import load_image
from quarterlight.records import Item

Encode = Callable[[Sequence[Item]], npt.NDArray[np.float32]]
"""What :meth:`Embedder.encode_query` and :meth:`Embedder.encode_document` are: float32 ``[N, D]`` of N items."""


def encode_readable(encode: Encode, items: Sequence[Item]) -> tuple[npt.NDArray[np.float32], dict[int, str]]:
    """The rows of the items that can be embedded, in their order, and position -> reason of the others.

    Without any, the rows have no columns.  Raises InputError for what is not the fault of a picture.
    """
    problems: dict[int, str] = {}
    left = list(range(len(items)))
    vector_ND = np.empty((0, 0), np.float32)
    while left:
        try:
            vector_ND = encode([items[number] for number in left])
            break
        except NotFiniteError as error:
            found = {left[position]: NOT_FINITE for position in error.positions}
        except InputError:
            # One bad picture stops a whole call; only then is every picture looked at, to name all that are bad.
            found = {number: reason for number in left if (reason := _unreadable(items[number]))}
            if not found:
                raise
        problems |= found
        left = [number for number in left if number not in problems]
    finite_N = np.isfinite(vector_ND.sum(axis=1))
    problems |= {number: NOT_FINITE for number, finite in zip(left, finite_N.tolist(), strict=True) if not finite}
    return np.asarray(vector_ND, dtype=np.float32)[finite_N], problems


def _unreadable(item: Item) -> str | None:
    try:
        for source in item.images:
            load_image(source)
    except ImageError as error:
        return str(error)
    return None
