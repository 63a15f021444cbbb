"""An encoder that needs no model: colours of the picture and words of the text, hashed into 64 numbers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from quarterlight.images import load_image
from quarterlight.records import Item

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
_RGB = np.array([(255, 0, 0), (0, 160, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255), (0, 0, 0)], np.float32)


class FakeEncoder:
    """Deterministic, independent of batches; a text that names a colour is near to pictures of it."""

    name = "fake"
    dimension = 64

    def __init__(self, *, model_hash: str = "fa4e" * 16) -> None:
        self.model_hash = model_hash
        self.num_encoded = 0

    def encode_query(self, items: Sequence[Item], *, instruction: str | None = None) -> npt.NDArray[np.float32]:
        return np.stack([self._vector(item) for item in items])

    def encode_document(self, items: Sequence[Item], *, instruction: str | None = None) -> npt.NDArray[np.float32]:
        self.num_encoded += len(items)
        return self.encode_query(items)

    def _vector(self, item: Item) -> npt.NDArray[np.float32]:
        vector = np.full(self.dimension, 1e-3, np.float32)
        for source in item.images:
            pixels = np.asarray(load_image(source).resize((16, 16)), np.float32).reshape(-1, 3)
            nearest = ((pixels[:, None] - _RGB) ** 2).sum(-1).argmin(1)
            vector[: len(COLOURS)] += np.bincount(nearest, minlength=len(COLOURS)) / len(pixels)
            vector[6:30] += np.asarray(load_image(source).resize((4, 2)), np.float32).reshape(-1) / 2550
        for word in re.findall(r"\w+", (item.text or "").lower()):
            slot = COLOURS.index(word) if word in COLOURS else 30 + hashlib.sha256(word.encode()).digest()[0] % 34
            vector[slot] += 1
        return vector / np.linalg.norm(vector)
