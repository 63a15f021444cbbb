"""What differs between families of backbones once their inputs are tensors.

B rows, L tokens, T tiles, D columns of the language model; n x k visual tokens of a picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from quarterlight.models.tiles import Grid


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The sizes of a vision tower that its cost follows from; entries are those of matrices.

    width, mlp: columns of a hidden state and of the inner layer of its perceptrons.
    sequence, patches: hidden states, and those of them that come from pixels, of a tile.
    layer, embedding, connector: entries of a layer, of the patch embedding and of what follows the tower.
    outputs: how often a tile goes through the connector.
    window: patches that a patch sees in the layers that do not see the whole picture; ``None`` where all layers do.
    whole_layers: how many see all of it.
    tiles_are_pictures: whether tiles see nothing of each other.
    seen: hidden states of a tile that each layer is given, where these get fewer; empty where all have ``sequence``.
    """

    width: int
    mlp: int
    num_layers: int
    sequence: int
    patches: int
    layer: int
    embedding: int
    connector: int
    outputs: float
    window: int | None = None
    whole_layers: int | None = None
    tiles_are_pictures: bool = False
    seen: tuple[int, ...] = ()


class Backbone(ABC):
    """The adapter of a family; it has no state, and is told of the model whenever it is asked.

    Visual tokens are ``[n, k, W]``, all of a picture's in order and those of several pictures one after the other.
    W is the number of columns of the language model, or a multiple of it where deeper layers are given something of
    pictures too.  In the model they pass by ``mm_encoder_outputs``, or :meth:`place` puts them among the embeddings of
    words for whoever calls the language model itself.
    """

    eyes: tuple[str, ...]
    """submodules of the model that make visual tokens: vision tower and connector"""

    tower_layers: str
    """the list of the vision tower's layers"""

    tower_settings: tuple[str, ...]
    """settings of the vision tower that change visual tokens and are not seen in the shapes of weights"""

    connector_settings: tuple[str, ...] = ("visual_token_compression",)
    """those of the model"""

    unheeded: tuple[str, ...] = ()
    """settings of an embedder or a reranker that change nothing here"""

    limits: tuple[str, ...]
    """settings of the image processor that are only what a picture may have when nobody says"""

    @abstractmethod
    def see(self, model: Any, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Visual tokens of pictures, ``[n, k, W]``.

        model: without or with a language head.
        pixel_values: what the image processor's ``normalize_tiles`` makes of their tiles.
        """

    @abstractmethod
    def num_rows(self, config: Any, grid: Grid) -> int:
        """n of a picture."""

    @abstractmethod
    def tokens_per_row(self, config: Any) -> int:
        """k of every picture."""

    def width(self, config: Any) -> int:
        """W."""
        return int(config.text_config.hidden_size)

    @abstractmethod
    def tokens_per_tile(self, config: Any) -> float:
        """Visual tokens of a picture for each of its tiles, before anything is rounded."""

    @abstractmethod
    def tower(self, config: Any) -> Tower:
        """The sizes of the vision tower."""

    @abstractmethod
    def most_tiles(self, config: Any, max_tiles: int, max_pixels: int) -> int:
        """Tiles of a picture, at most, as its image processor would say."""

    @abstractmethod
    def image_processor(self, config: Any) -> Any:
        """An image processor that cuts pictures as the vision tower reads them; what the configuration does not say is
        as the family has it when nobody says."""

    @abstractmethod
    def patches(self, config: Any) -> int:
        """Patches of a tile, for which the vision tower has a hidden state each."""

    @abstractmethod
    def split(self, grids: Sequence[Grid], most_tiles: int) -> list[list[Grid]]:
        """The pictures in runs that go through the tower together, of about so many tiles: nothing that may not be cut
        is cut, and a run that comes out larger is one picture."""

    @abstractmethod
    def split_alike(self, grids: Sequence[Grid], most_tiles: int) -> tuple[list[list[Grid]], int]:
        """Runs such that the shape of what goes through the tower with a picture never depends on other pictures, and
        how many blank tiles must be added behind the last for it: the rounding of a product depends on its shape."""

    @abstractmethod
    def smallest(self) -> Grid:
        """The grid of a picture of one tile."""

    @abstractmethod
    def largest(self, config: Any, max_tiles: int, max_pixels: int) -> Grid:
        """The grid of a picture of 4 : 3 with as many tiles as it may have."""

    @abstractmethod
    def pixels_shape(self, config: Any, grids: Sequence[Grid]) -> tuple[int, ...]:
        """Shape of the ``pixel_values`` of pictures."""

    @abstractmethod
    def stored(self, config: Any, tokens: Tensor, grid: Grid) -> Tensor:
        """The visual tokens of a picture as they are kept without it, ``[rows, W]``."""

    @abstractmethod
    def restored(self, config: Any, stored_RW: Tensor) -> tuple[Tensor, Grid]:
        """Of what :meth:`stored` made, and which may have been rounded, the visual tokens and a grid that has as many.

        Raises ValueError, saying what is expected, for what cannot be that.
        """

    def encoder_outputs(self, config: Any, tokens: Tensor) -> dict[str, Any]:
        """Visual tokens as the model's ``mm_encoder_outputs``."""
        return {"image": BaseModelOutputWithPooling(pooler_output=tokens)}

    def place(self, model: Any, input_ids_BL: Tensor, embeds_BLD: Tensor, tokens: Tensor) -> tuple[Tensor, Any]:
        """Embeddings of words with visual tokens in the places of pictures, and what else the language model is given.

        model: without a language head.  tokens: of all pictures of the rows in order.
        Raises ValueError or RuntimeError when there are not as many as places.
        """
        tokens = tokens.to(embeds_BLD)
        slots = model.get_placeholder_mask(input_ids_BL, embeds_BLD, tokens)  # checks that they are as many
        return embeds_BLD.masked_scatter(slots, tokens), {}

    def base_name(self, name: str) -> str:
        """What a weight is called in a saved model without a language head, of its name in any saved model."""
        return name

    def picture_settings(self, image_processor: Any) -> dict[str, Any]:
        """Settings of an image processor that change how a picture of known limits is cut."""
        values: dict[str, Any] = image_processor.to_dict()
        for name in self.limits:
            values.pop(name)
        return values

    @abstractmethod
    def configure(self, config: Any, settings: Any) -> None:
        """Takes from an embedder's settings what the bare model needs to know to give the same embeddings."""

    def parts(self, model: Any) -> list[nn.Module]:
        """Vision tower and connector."""
        return [model.base_model.get_submodule(name) for name in self.eyes]

    def blank(self, model: Any) -> Tensor:
        """Zero, by way of vision tower and connector: where processes share weights, all must use them, or the others
        wait."""
        base = model.base_model
        grids = [self.smallest()]
        pixels = torch.zeros(self.pixels_shape(model.config, grids), device=next(base.parameters()).device)
        return 0.0 * self.see(base, pixels, grids).float().sum()
