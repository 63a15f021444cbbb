"""Files that the benches make up: pictures with the detail of photographs, pages with lines of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_picture(file: Path, seed: int, shortest: int = 128, longest: int = 350) -> None:
    """Smooth shapes with fine grain: about as large a file, and as slow to decode, as a photograph of that size.

    shortest, longest: pixels of a side.
    """
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(shortest, longest + 1, size=2))
    shapes = Image.fromarray(rng.integers(0, 256, size=(6, 6, 3), dtype=np.uint8)).resize((width, height), 3)
    grain = rng.integers(-16, 17, size=(height, width, 1))
    picture = Image.fromarray(np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8))
    picture.save(file, quality=80)


def page(size: tuple[int, int], seed: Any) -> Image.Image:
    """A scan of made-up words on white, of so many pixels wide and high."""
    from PIL import ImageDraw, ImageFont

    font: Any = ImageFont.load_default(26)
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for top in range(80, size[1] - 80, 40):
        words = ("".join(map(chr, rng.integers(97, 123, size=length))) for length in rng.integers(2, 10, 14))
        draw.text((80, top), " ".join(words), fill="black", font=font)
    return picture
