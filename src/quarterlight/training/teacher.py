"""A small two-sided teacher: a convolutional net for pictures, a bag of character trigrams for texts.

A vision transformer that starts from random weights needs far more pictures than a convolutional net to learn what a
shape is.  The teacher learns in minutes, and the tower of a new model starts by imitating it (:mod:`.tower`).

B items, T tiles, D columns of an embedding.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quarterlight.errors import DatasetError, RecipeError
from quarterlight.prompts import Role
from quarterlight.records import Item
from quarterlight.training.collate import Pictures


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    """Size of the teacher."""

    channels: tuple[int, ...] = (64, 128, 256)
    """of the feature maps at a quarter, an eighth and a sixteenth of a tile's side"""
    embedding_size: int = 256
    """columns of an embedding"""
    num_ngrams: int = 8192
    """buckets that trigrams and words are hashed into"""


class _Residual(nn.Module):
    """Two 3 x 3 convolutions beside a short cut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.short_cut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short_cut(x))


class Teacher(nn.Module):
    """Embeds pictures, texts and both: the sum of the two, and a correction that sees them together."""

    def __init__(self, recipe: TeacherRecipe) -> None:
        super().__init__()
        first, second, third = recipe.channels
        D = recipe.embedding_size
        self.stem = nn.Sequential(nn.Conv2d(3, first, 6, 4, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.eighth = nn.Sequential(_Residual(first, first, 1), _Residual(first, second, 2))
        self.sixteenth = _Residual(second, third, 2)
        self.picture = nn.Linear(4 * third, D)
        self.ngrams = nn.EmbeddingBag(recipe.num_ngrams, D, mode="mean")
        self.text = nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D))
        self.both = nn.Sequential(nn.Linear(3 * D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D))

    def feature_maps(self, pixel_values_T3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Maps at an eighth and a sixteenth of the side: ``[T, C, H/8, W/8]``, ``[T, 2C, H/16, W/16]``."""
        eighth = self.eighth(self.stem(pixel_values_T3HW.contiguous(memory_format=torch.channels_last)))
        return eighth, self.sixteenth(eighth)

    def embed_pictures(self, sixteenth: Tensor) -> Tensor:
        """``[T, D]``, not normalised, from the last feature map."""
        return self.picture(F.adaptive_avg_pool2d(sixteenth, 2).flatten(1))

    def forward(self, *sides: Mapping[str, Any]) -> Tensor:
        """Embeddings of norm 1, float32 ``[B, D]``, of all rows of what :class:`TeacherEncoder` made of each side."""
        return torch.cat([self._embed(inputs) for inputs in sides])

    def _embed(self, inputs: Mapping[str, Any]) -> Tensor:
        total: Tensor | float = 0.0
        if (pixel_values := inputs.get("pixel_values")) is not None:
            picture_BD = self.embed_pictures(self.feature_maps(pixel_values)[1]).float()
            total = total + picture_BD
        if (ngrams := inputs.get("ngrams")) is not None:
            text_BD = self.ngrams(ngrams, inputs["offsets"])
            text_BD = text_BD + self.text(text_BD).float()
            total = total + text_BD
        if pixel_values is not None and ngrams is not None:
            total = total + self.both(torch.cat([picture_BD, text_BD, picture_BD * text_BD], dim=1)).float()
        return F.normalize(total, dim=-1)


class TeacherEncoder:
    """Inputs of a teacher. The items of a call must be alike: all with one picture or none, with text or none."""

    def __init__(self, pictures: Pictures, recipe: TeacherRecipe) -> None:
        self.pictures = pictures
        self.num_ngrams = recipe.num_ngrams
        self._ngrams = lru_cache(maxsize=1 << 16)(self._hashed)

    def __call__(self, items: Sequence[Item], role: Role, chance_P9: Tensor | None = None) -> dict[str, Any]:
        """Raises DatasetError when the items are not alike, or have several pictures each."""
        if len({(len(item.images), bool(item.text)) for item in items}) > 1 or len(items[0].images) > 1:
            raise DatasetError(
                "A teacher needs tasks whose queries, and whose candidates, are all text, all one picture, or all one "
                "picture with text: take the task that is not out of the mixture, or train without a teacher."
            )
        inputs: dict[str, Any] = {}
        if items[0].images:
            whole = [replace(item, max_tiles=1) for item in items]  # it reads a page as one small picture
            inputs["pixel_values"] = self.pictures.pixel_values(*self.pictures.tiles(whole), chance_P9)
        if items[0].text:
            inputs |= self.texts([item.text or "" for item in items])
        return inputs

    def num_tokens(self, items: Sequence[Item], role: Role) -> list[int]:
        """Raises RecipeError: the statistics of its batch normalisation are those of whole batches."""
        raise RecipeError("A teacher is trained on whole batches: leave chunk_tokens out of its loss.")

    def beside(self, inputs: Mapping[str, Any], items: Sequence[Item]) -> dict[str, Any]:
        """Inputs for the items that another encoder made ``inputs`` of, with its pixels if a picture is one tile."""
        own = self(items, "document")
        if "pixel_values" in own and own["pixel_values"].shape == inputs["pixel_values"].shape:
            own["pixel_values"] = inputs["pixel_values"]
        return own

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``ngrams``, int64 buckets of all texts in a row, and ``offsets``, int64 [B], where each text begins."""
        bags = [self._ngrams(text) for text in texts]
        lengths = torch.tensor([0, *map(len, bags[:-1])])
        return {"ngrams": torch.tensor([one for bag in bags for one in bag]), "offsets": lengths.cumsum(0)}

    def _hashed(self, text: str) -> list[int]:
        padded = f" {text.lower()} "
        grams = [padded[start : start + 3] for start in range(len(padded) - 2)] + padded.split()
        return [zlib.crc32(gram.encode()) % self.num_ngrams for gram in grams]
