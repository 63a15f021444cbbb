"""A vision tower and a connector that stay as they are: every picture is looked at once, and what they see is kept.

Both papers freeze them in their fine-tunes, where the tower would otherwise be the largest part of a step.  Pictures
must be shown as they are: an augmented one is another picture every time.

T tiles, H and W pixels; n, k, W as in :class:`quarterlight.models.backbones.backbone.Backbone`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from quarterlight.models.backbones import backbone_of
from quarterlight.models.tiles import Grid, num_tiles
from quarterlight.records import Item

_TILES_AT_ONCE, _TILES_ON_CPU = 128, 4  # in the tower


class Pictures(Protocol):
    """What decodes pictures; :class:`quarterlight.training.collate.Pictures` does."""

    def tiles(self, items: Sequence[Item], /) -> tuple[np.ndarray, list[list[Grid]]]: ...


@dataclass(frozen=True)
class PictureKey:
    """What tells a picture from others, cut into so many tiles at most. No tuple, into which ``Trainer`` would look."""

    source: Hashable
    max_tiles: int


class VisualTokens:
    """Visual tokens of pictures, ``[n, k, W]`` each, and how these were cut, in main memory as long as there is room.

    Nothing is ever dropped, so that whoever found a picture here finds it later too.
    """

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._tokens: dict[PictureKey, Tensor] = {}
        self._grids: dict[PictureKey, Grid] = {}

    def __contains__(self, key: PictureKey) -> bool:
        return key in self._tokens

    def __getitem__(self, key: PictureKey) -> Tensor:
        return self._tokens[key]

    def grid(self, key: PictureKey) -> Grid:
        """How a picture was cut whose tokens are here."""
        return self._grids[key]

    def put(self, key: PictureKey, tokens: Tensor, grid: Grid) -> None:
        """Keeps a picture's tokens if there is room for them."""
        if key not in self._tokens and tokens.nbytes <= self._room:
            self._room -= tokens.nbytes
            self._grids[key] = grid
            self._tokens[key] = tokens.to("cpu", copy=True)  # not a part of something larger


def picture_keys(item: Item, max_tiles: int) -> list[PictureKey]:
    """The keys of an item's pictures, each in so many tiles at most."""
    # an opened picture has no name, but lives as long as its item
    return [PictureKey(id(one) if isinstance(one, Image.Image) else one, max_tiles) for one in item.images]


def show(
    item: Item,
    max_tiles: int,
    pictures: Pictures,
    known: VisualTokens,
    fresh: dict[PictureKey, Tensor],
    cut: dict[PictureKey, Grid],
) -> Iterator[tuple[PictureKey, Grid]]:
    """For each picture of an item its key, and how it was cut.

    pictures: decode those whose tokens are not known; their tiles, uint8 ``[T, H, W, 3]``, are put into ``fresh``, and
        how they were cut into ``cut``.
    """
    for source, key in zip(item.images, picture_keys(item, max_tiles), strict=True):
        if key not in known and key not in fresh:
            tiles_THW3, ((cut[key],),) = pictures.tiles([Item(image=source, max_tiles=max_tiles)])
            fresh[key] = torch.from_numpy(tiles_THW3)
        yield key, cut[key] if key in fresh else known.grid(key)


class FrozenEyes:
    """Vision tower and connector of a model whose language model alone is trained.

    model: of one of the families, with or without a language head; its tower and connector get no gradients from now
        on.  known: visual tokens of pictures.
    """

    def __init__(self, model: Any, image_processor: Any, known: VisualTokens) -> None:
        self._model = model
        self._backbone = backbone_of(model.config)
        self._image_processor = image_processor
        self.known = known
        for part in self._backbone.parts(model):
            part.requires_grad_(False)

    def rest(self) -> None:
        """Ends the training mode of both: what they see must not depend on when they look."""
        for part in self._backbone.parts(self._model):
            part.eval()

    @torch.no_grad()
    def look(self, fresh: Mapping[PictureKey, Tensor], cut: Mapping[PictureKey, Grid]) -> dict[PictureKey, Tensor]:
        """The visual tokens of pictures that are not known, which are known from then on if there is room.

        fresh: uint8 tiles ``[T, H, W, 3]`` of each.  cut: how each was.
        On a CPU the shape of what goes through the tower does not depend on what else there is to look at: the rounding
        of a product does, and a run that was stopped has other pictures.
        """
        fresh = {key: tiles for key, tiles in fresh.items() if key not in self.known}
        if not fresh:
            return {}
        grids = [cut[key] for key in fresh]
        tiles_THW3 = torch.cat(list(fresh.values()))
        runs = self._backbone.split(grids, _TILES_AT_ONCE)
        if tiles_THW3.device.type == "cpu":
            runs, blank = self._backbone.split_alike(grids, _TILES_ON_CPU)
            tiles_THW3 = F.pad(tiles_THW3, (0, 0, 0, 0, 0, 0, 0, blank))
        parts = tiles_THW3.split([sum(map(num_tiles, run)) for run in runs])
        tokens = torch.cat([self._tower(some, run) for some, run in zip(parts, runs, strict=True)])
        counts = [self._backbone.num_rows(self._model.config, grid) for grid in grids]
        seen = dict(zip(fresh, tokens[: sum(counts)].split(counts), strict=True))
        for (key, one), grid in zip(seen.items(), grids, strict=True):
            self.known.put(key, one, grid)
        return seen

    def tokens(self, keys: Sequence[PictureKey], seen: Mapping[PictureKey, Tensor], like: Tensor) -> Tensor:
        """The visual tokens of pictures one after the other, ``[n, k, W]``, in the dtype of ``like``.

        seen: what :meth:`look` gave for the pictures of the batch.
        """
        return torch.cat([(seen[key] if key in seen else self.known[key]).to(like) for key in keys])

    def _tower(self, tiles_THW3: Tensor, grids: Sequence[Grid]) -> Tensor:
        return self._backbone.see(self._model.base_model, self._image_processor.normalize_tiles(tiles_THW3), grids)
