"""Pictures as a backbone reads them: tiles of one size, and a grid that says how many visual tokens they become.

T tiles, H and W pixels, 3 colours.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from quarterlight.images import load_image

Grid: TypeAlias = "int | tuple[int, int]"
"""How a picture was cut: the number of its tiles where each is a small picture of its own (InternVL), rows and columns
where a tile is the block of pixels behind one visual token and all of them are one picture (Qwen-VL)."""


class Tiles(NamedTuple):
    """A picture cut up. Those of several pictures are stacked one after the other.

    pixels: uint8 ``[T, H, W, 3]``, in reading order.
    """

    pixels: np.ndarray
    grid: Grid


def num_tiles(grid: Grid) -> int:
    """Tiles of a picture.

    >>> num_tiles(5), num_tiles((2, 3))
    (5, 6)
    """
    return grid if isinstance(grid, int) else grid[0] * grid[1]


class PictureReader:
    """Part of an image processor of transformers: pictures are read as everywhere in this package."""

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Pictures read by :func:`quarterlight.images.load_image`: upright, transparency on white; URLs as transformers
        does.  May be called on its own results, as a processor does before it calls its image processor."""
        source: Any = image_url_or_urls
        if isinstance(source, (list, tuple)):
            return [self.fetch_images(one) for one in source]
        if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
            source = super().fetch_images(source)  # type: ignore[misc]  # transformers' image processors have it
        if not isinstance(source, (str, os.PathLike, bytes, Image.Image)):
            return source
        picture = load_image(source)
        if picture is not source:
            picture.info = {}  # no EXIF that would turn it once more
        return picture

    @staticmethod
    def _picture(image: Any) -> Image.Image:
        if isinstance(image, Image.Image):
            return image
        array = np.asarray(image)
        if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
            array = array.transpose(1, 2, 0)
        if array.dtype != np.uint8:
            raise ValueError(f"A picture given as an array must be uint8, got {array.dtype}.")
        return load_image(Image.fromarray(array.squeeze(-1) if array.ndim == 3 and array.shape[-1] == 1 else array))
