"""How a model reads pictures: one place for the embedder and for those who read files ahead of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from quarterlight.images import load_image
from quarterlight.models.tiles import Tiles
from quarterlight.records import ImageSource


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Files to pictures, and pictures to tiles; can be pickled.

    image_processor: a :class:`quarterlight.models.processor.VTCImageProcessor`.
    max_tiles: of a picture when nobody says.  max_pixels: see there.
    decode_margin: as of :class:`quarterlight.models.embedder.Embedder`.
    """

    image_processor: Any
    max_tiles: int
    max_pixels: int
    decode_margin: int | None = None

    def read(self, source: ImageSource, max_tiles: int | None = None) -> Image.Image:
        """The picture with all its pixels, or with those that ``decode_margin`` asks for. Raises ImageError."""
        reduce_to = None
        if self.decode_margin and (side := self.image_processor.enough_pixels(max_tiles or self.max_tiles)):
            reduce_to = self.decode_margin * side
        return load_image(source, reduce_to=reduce_to)

    def fit(self, picture: Image.Image, max_tiles: int | None = None) -> Image.Image:
        """A smaller picture that :meth:`cut` makes the same tiles of, to the bit; the picture itself if there is none.

        picture: as :meth:`read` gives it.
        That is what it is resized to where all tiles are parts of that; several tiles of an InternVL and their
        thumbnail are two sizes of one picture, which stays whole.
        """
        limits = (max_tiles or self.max_tiles, self.max_pixels)
        try:
            grid = self.image_processor.grid_of(*picture.size, *limits)
            if isinstance(grid, int) and grid > 1:
                return picture
            rows, columns = (1, 1) if isinstance(grid, int) else grid
            height, width = self.image_processor.tile_pixels
            size = (columns * width, rows * height)
            if size[0] * size[1] >= picture.width * picture.height:
                return picture
            if self.image_processor.grid_of(*size, *limits) != grid:  # at the limits of a Qwen-VL
                return picture
        except ValueError:  # too narrow for the model: whoever cuts it says so
            return picture
        return picture.resize(size, self.image_processor.resample)

    def cut(self, source: ImageSource, max_tiles: int | None = None) -> Tiles:
        """A picture in so many tiles at most, cut up. Raises ImageError."""
        picture = self.read(source, max_tiles)
        tiles: Tiles = self.image_processor.cut(picture, max_tiles or self.max_tiles, self.max_pixels)
        return tiles
