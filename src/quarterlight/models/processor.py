"""What this package asks of the processor of a backbone: its tokenizer, and how it cuts pictures and counts tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from quarterlight.models.positions import Positions
from quarterlight.models.tiles import Grid, Tiles


class VTCImageProcessor(Protocol):
    """How pictures become what a vision tower reads.

    max_tiles and max_pixels are two ways to say how large a picture may be; each family heeds its own, or both.
    """

    def cut(self, image: Image.Image, max_tiles: int | None = None, max_pixels: int | None = None) -> Tiles:
        """The tiles of an RGB picture; ``None`` takes the checkpoint's limit. Raises ImageError for one that cannot be
        cut."""

    def blank(self, grid: Grid | None = None) -> Tiles:
        """A white picture, of one tile or of a given grid."""

    def normalize_tiles(self, tiles_THW3: Tensor) -> Tensor:
        """What the vision tower reads, float32, of uint8 ``[T, H, W, 3]`` tiles of any number of pictures."""

    def grid_of(self, width: int, height: int, max_tiles: int | None = None, max_pixels: int | None = None) -> Grid:
        """How :meth:`cut` cuts a picture of so many pixels."""

    def most_tiles(self, max_tiles: int, max_pixels: int) -> int:
        """Tiles of a picture, at most."""

    def enough_pixels(self, max_tiles: int) -> int | None:
        """The shortest side that :meth:`cut` makes use of; ``None`` where a picture's size decides how it is cut."""

    @property
    def tile_pixels(self) -> tuple[int, int]:
        """Height and width of a tile."""

    def set_limits(self, max_tiles: int, max_pixels: int) -> None:
        """What a picture may have when nobody says; saved with the checkpoint."""

    def to_dict(self) -> dict[str, Any]:
        """The settings."""


class VTCProcessor(Protocol):
    """The processors of all families, as the rest of this package sees them."""

    tokenizer: Any
    image_processor: Any  # a VTCImageProcessor
    chat_template: Any

    @property
    def image_token(self) -> str:
        """The token that stands for a visual token."""

    @property
    def image_token_id(self) -> int: ...

    @property
    def start_image_token_id(self) -> int: ...

    @property
    def end_image_token_id(self) -> int: ...

    @property
    def picture(self) -> str:
        """How a chat template spells a picture."""

    @property
    def num_axes(self) -> int:
        """Of positions: 1, or 3 for M-RoPE."""

    def num_visual_tokens(self, grid: Grid) -> int:
        """Tokens of a picture, after compression, without its two brackets."""

    def most_visual_tokens(self, max_tiles: int, max_pixels: int) -> int:
        """The same of the largest picture."""

    def positions(self, ids: Sequence[int], grids: Sequence[Grid], mode: Positions, start: int = 0) -> Tensor:
        """Positions of tokens, int64 ``[axes, L]``, the first being ``start``; the next one's is their maximum + 1.

        grids: of the pictures among the tokens, in order.
        """

    def agree_with(self, config: Any) -> None:
        """Takes from a model's configuration what decides the number of visual tokens. Raises ValueError when the two
        cannot work together."""

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Writes the files of tokenizer and processor."""
