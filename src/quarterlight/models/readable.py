"""Embeddings of items of which some have pictures that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from quarterlight.errors import ImageError, InputError
from quarterlight.images import load_image
from quarterlight.records import Item

Encode = Callable[[Sequence[Item]], npt.NDArray[np.float32]]
"""What :meth:`Embedder.encode_query` and :meth:`Embedder.encode_document` are: float32 ``[N, D]`` of N items."""


def encode_readable(encode: Encode, items: Sequence[Item]) -> tuple[npt.NDArray[np.float32], dict[int, str]]:
    """The rows of the items that can be embedded, in their order, and position -> reason of the others.

    Without any, the rows have no columns.  Raises InputError for what is not the fault of a picture.
    """
    problems: dict[int, str] = {}
    try:
        vector_ND = encode(items)
    except InputError:
        # One bad picture stops a whole call; only then is every picture looked at, to name all that are bad.
        problems = {number: reason for number, item in enumerate(items) if (reason := _unreadable(item))}
        if not problems:
            raise
        items = [item for number, item in enumerate(items) if number not in problems]
        if not items:
            return np.empty((0, 0), np.float32), problems
        vector_ND = encode(items)
    finite_N = np.isfinite(vector_ND.sum(axis=1))
    readable = [number for number in range(len(items) + len(problems)) if number not in problems]
    for number, finite in zip(readable, finite_N.tolist(), strict=True):
        if not finite:
            problems[number] = "its embedding is not finite (NaN or infinity)"
    return np.asarray(vector_ND, dtype=np.float32)[finite_N], problems


def _unreadable(item: Item) -> str | None:
    try:
        for source in item.images:
            load_image(source)
    except ImageError as error:
        return str(error)
    return None
