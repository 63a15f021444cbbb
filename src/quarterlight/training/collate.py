"""Batches of items to tensors for training; a process decodes each picture once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from quarterlight.data.contrastive import BatchSampler, ContrastiveBatch
from quarterlight.images import load_image
from quarterlight.models.inputs import InputFormatter
from quarterlight.models.internvl_vtc.processing import InternVLVTCImageProcessor
from quarterlight.prompts import Role
from quarterlight.records import Item
from quarterlight.training.augment import AugmentRecipe, augment


class Pictures:
    """The tiles of pictures, kept as bytes in memory after their first use (12 KiB for a tile of 64 pixels).

    max_tiles: the most tiles of a picture whose item does not say.
    """

    def __init__(
        self, image_processor: InternVLVTCImageProcessor, recipe: AugmentRecipe | None = None, *, max_tiles: int = 1
    ) -> None:
        self.image_processor = image_processor
        self.recipe = recipe
        self.max_tiles = max_tiles
        self._tiles: dict[Hashable, np.ndarray] = {}

    def tiles(self, items: Sequence[Item]) -> tuple[np.ndarray, list[list[int]]]:
        """uint8 ``[T, H, W, 3]`` of all the items' pictures, and for each item the tiles of each of its pictures."""
        tiles = [[self._one(source, item.max_tiles or self.max_tiles) for source in item.images] for item in items]
        flat = [one for pictures in tiles for one in pictures]
        side = self.image_processor.size.height
        stacked = np.concatenate(flat) if flat else np.empty((0, side, side, 3), np.uint8)
        return stacked, [[len(one) for one in pictures] for pictures in tiles]

    def pixel_values(
        self, tiles_THW3: np.ndarray, counts: Sequence[Sequence[int]], generator: torch.Generator | None
    ) -> Tensor:
        """float32 ``[T, 3, H, W]`` as the vision tower reads it; augmented when there is a recipe and a generator.

        counts: tiles of each item's pictures. A picture of several stays as it is, or its tiles would not fit together.
        """
        pixels = torch.from_numpy(tiles_THW3)
        if self.recipe is not None and generator is not None:
            alone_T = torch.tensor([count == 1 for pictures in counts for count in pictures for _ in range(count)])
            pixels = pixels.float()
            pixels[alone_T] = augment(pixels[alone_T], self.recipe, generator)
        return self.image_processor.normalize_tiles(pixels)

    def _one(self, source: Any, max_tiles: int) -> np.ndarray:
        if isinstance(source, Image.Image):  # mutable and without a name: nothing to remember it by
            return self.image_processor.tiles(source, max_tiles)
        key = (source, max_tiles)
        if key not in self._tiles:
            self._tiles[key] = self.image_processor.tiles(load_image(source), max_tiles).copy()
        return self._tiles[key]


class ItemEncoder(Protocol):
    """Turns the items of one side of a batch into the inputs of a model."""

    def __call__(self, items: Sequence[Item], role: Role, generator: torch.Generator | None) -> dict[str, Any]: ...


class SecondEncoder(Protocol):
    """Makes the inputs of a teacher that embeds the same items."""

    def beside(self, inputs: Mapping[str, Any], items: Sequence[Item]) -> dict[str, Any]: ...


class PromptEncoder:
    """Inputs of a multimodal language model: prompts and tiles; those of a teacher beside them, if there is one."""

    def __init__(self, formatter: InputFormatter, pictures: Pictures, teacher: SecondEncoder | None = None) -> None:
        self.formatter = formatter
        self.pictures = pictures
        self.teacher = teacher

    def __call__(self, items: Sequence[Item], role: Role, generator: torch.Generator | None) -> dict[str, Any]:
        tiles_THW3, counts = self.pictures.tiles(items)
        prompts = [self.formatter.prompt(item, role, position=n) for n, item in enumerate(items)]
        inputs: dict[str, Any] = self.formatter.collate(self.formatter.tokenize(prompts), counts)
        if len(tiles_THW3):
            inputs["pixel_values"] = self.pictures.pixel_values(tiles_THW3, counts, generator)
        if self.teacher is not None and generator is not None:
            inputs["teacher"] = self.teacher.beside(inputs, items)
        return inputs


class ContrastiveSteps(Dataset[tuple[int, ContrastiveBatch]]):
    """The batches of a run by step, so that ``Trainer`` resumes by skipping numbers instead of reading data."""

    def __init__(self, sampler: BatchSampler, num_steps: int) -> None:
        self.sampler = sampler
        self.num_steps = num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> tuple[int, ContrastiveBatch]:
        return step, self.sampler.batch(step)


class ContrastiveCollator:
    """One batch as two sides, each distinct candidate once.

    Candidates that are equal in content share a row of ``candidate`` inputs, and ``candidate_index``, int64 [C], maps
    the batch's candidates to those rows.
    """

    def __init__(self, encode: ItemEncoder, *, seed: int) -> None:
        self.encode = encode
        self.seed = seed

    def __call__(self, steps: Sequence[tuple[int, ContrastiveBatch]]) -> dict[str, Any]:
        ((step, batch),) = steps
        generator = torch.Generator().manual_seed((self.seed << 40) + step)
        distinct: dict[Hashable, tuple[int, Item]] = {}
        index = [distinct.setdefault(_shown(c.item), (len(distinct), c.item))[0] for c in batch.candidates]
        return {
            "query": self.encode([query.item for query in batch.queries], "query", generator),
            "candidate": self.encode([item for _, item in distinct.values()], "document", generator),
            "candidate_index": torch.tensor(index),
            "known_positive": torch.from_numpy(batch.known_positive),
            "step": step,
        }


def _shown(item: Item) -> Hashable:
    return item.text, item.images, item.instruction, item.max_tiles
