"""Models that need no weights: colours of the picture and words of the text, hashed into 64 numbers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from quarterlight.images import load_image
from quarterlight.records import ImageSource, Item

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
_RGB = np.array([(255, 0, 0), (0, 160, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255), (0, 0, 0)], np.float32)


class FakePictures:
    """Reads everything and makes use of all of it."""

    def read(self, source: ImageSource, max_tiles: int | None = None) -> Image.Image:
        return load_image(source)

    def fit(self, picture: Image.Image, max_tiles: int | None = None) -> Image.Image:
        return picture


class FakeEncoder:
    """Deterministic, independent of batches; a text that names a colour is near to pictures of it."""

    name = "fake"
    dimension = 64
    pictures = FakePictures()

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


class FakeEyes(FakeEncoder):
    """Also tells what it saw: a visual token for each colour, [6, 4], whose numbers all are the share of the colour."""

    vision_hash = "e1e5" * 16

    def encode_document_with_visual_tokens(
        self, items: Sequence[Item], *, instruction: str | None = None
    ) -> tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float16] | None]]:
        vectors = self.encode_document(items)
        return vectors, [self.look(item) if item.images else None for item in items]

    def look(self, item: Item) -> npt.NDArray[np.float16]:
        vector = self._vector(Item(image=item.image))
        return np.repeat(vector[: len(COLOURS), None], 4, axis=1).astype(np.float16)


class FakeReranker:
    """Likes the dark: P(Yes) of a picture is its share of black and blue, of a text that of the word ``dark``."""

    vision_hash = FakeEyes.vision_hash
    pictures = FakeEyes.pictures

    def __init__(self, **settings: Any) -> None:
        from quarterlight.models.settings import RerankerSettings  # imports torch, which most tests here do without

        self.settings = RerankerSettings(**settings)
        self.asked: list[tuple[Item, list[Item], str | None]] = []
        self.num_seen = 0

    def score(
        self,
        query: Item,
        candidates: Sequence[Item],
        *,
        instruction: str | None = None,
        visual_tokens: Sequence[npt.NDArray[np.floating[Any]] | None] | None = None,
    ) -> npt.NDArray[np.float32]:
        self.asked.append((query, list(candidates), instruction))
        tokens = visual_tokens or [None] * len(candidates)
        return np.array([self._score(*pair) for pair in zip(candidates, tokens, strict=True)], np.float32)

    def _score(self, item: Item, tokens: npt.NDArray[np.floating[Any]] | None) -> float:
        if not item.images:
            words = re.findall(r"\w+", (item.text or "").lower())
            return words.count("dark") / len(words)
        if tokens is None:
            self.num_seen += 1
            tokens = FakeEyes().look(item)
        dark = [COLOURS.index("blue"), COLOURS.index("black")]
        return float(np.clip(tokens[dark].sum() / tokens.sum(), 0, 1))
