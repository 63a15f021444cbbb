"""A picture made smaller for the model is cut into the same tiles as the whole one."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quarterlight.models.internvl_vtc.processing import InternVLVTCImageProcessor
from quarterlight.models.pictures import Pictures
from quarterlight.models.qwen_vtc import QwenVTCImageProcessor
from quarterlight.models.tiles import Grid

INTERNVL = Pictures(
    image_processor=InternVLVTCImageProcessor(size={"height": 448, "width": 448}), max_tiles=4, max_pixels=1
)
TINY = Pictures(image_processor=InternVLVTCImageProcessor(size={"height": 64, "width": 64}), max_tiles=1, max_pixels=1)
QWEN = Pictures(
    image_processor=QwenVTCImageProcessor(patch_size=14, merge_size=2, temporal_patch_size=2),
    max_tiles=1,
    max_pixels=300 * 28 * 28,
)


@pytest.mark.parametrize(
    ("pictures", "size", "max_tiles", "grid", "fitted"),
    [
        (INTERNVL, (1800, 1800), None, 5, (1800, 1800)),
        (INTERNVL, (1500, 1000), None, 5, (1500, 1000)),
        (INTERNVL, (1800, 1800), 12, 10, (1800, 1800)),
        (INTERNVL, (1800, 1800), 1, 1, (448, 448)),
        (INTERNVL, (200, 300), 1, 1, (200, 300)),
        (INTERNVL, (460, 450), None, 1, (448, 448)),
        (TINY, (1800, 1800), None, 1, (64, 64)),
        (QWEN, (900, 900), None, (17, 17), (476, 476)),
        (QWEN, (4000, 3000), None, (15, 20), (560, 420)),
        (QWEN, (300, 200), 4, (7, 11), (300, 200)),
    ],
)
def test_the_grid_is_that_of_the_whole(
    picture: Callable[..., Image.Image],
    pictures: Pictures,
    size: tuple[int, int],
    max_tiles: int | None,
    grid: Grid,
    fitted: tuple[int, int],
) -> None:
    whole = picture(0, *size)
    small = pictures.fit(whole, max_tiles)
    assert small.size == fitted
    direct, again = pictures.cut(whole, max_tiles), pickle.loads(pickle.dumps(pictures)).cut(small, max_tiles)
    assert direct.grid == again.grid == grid
    assert np.array_equal(direct.pixels, again.pixels)


@pytest.mark.parametrize("pictures", [INTERNVL, QWEN])
def test_shapes_of_all_kinds(pictures: Pictures) -> None:
    """Strips and slivers too, where a resized picture may be cut in another way."""
    rng = np.random.default_rng(0)
    num_smaller = 0
    for _ in range(150):
        width, height = (int(one) for one in np.exp(rng.uniform(0, 7.5, 2)))
        if max(width, height) > 190 * min(width, height):
            continue
        whole = Image.frombytes("RGB", (width, height), rng.bytes(3 * width * height))
        small = pictures.fit(whole, 1)
        assert small.width * small.height <= width * height
        if small is not whole:
            num_smaller += 1
            direct, again = pictures.cut(whole, 1), pictures.cut(small, 1)
            assert direct.grid == again.grid and np.array_equal(direct.pixels, again.pixels), (width, height)
    assert num_smaller > 10


def test_what_a_model_refuses_is_left_to_it() -> None:
    sliver = Image.new("RGB", (4000, 2))
    assert QWEN.fit(sliver) is sliver


def test_decode_margin_is_heeded_where_it_means_something(tmp_path: Any) -> None:
    Image.new("RGB", (1000, 800)).save(tmp_path / "a.jpg")
    with_margin = Pictures(image_processor=TINY.image_processor, max_tiles=1, max_pixels=1, decode_margin=4)
    assert with_margin.read(tmp_path / "a.jpg").size == (500, 400)
    assert with_margin.read(tmp_path / "a.jpg", 2).size == TINY.read(tmp_path / "a.jpg").size == (1000, 800)
