"""Tiles against transformers' own, and the settings that come from a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from quarterlight.models.internvl_vtc import InternVLVTCImageProcessor, InternVLVTCProcessor

SIZES = [(64, 64), (90, 70), (1, 400), (400, 1), (200, 60), (640, 480), (130, 260), (50, 51)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("max_tiles", [1, 4, 12])
def test_tiles_equal_those_of_transformers(
    size: tuple[int, int], max_tiles: int, image_processor: Any, picture: Callable[..., Image.Image]
) -> None:
    image = picture(0, *size)
    theirs = GotOcr2ImageProcessorPil(
        size={"height": 64, "width": 64}, image_mean=image_processor.image_mean, image_std=image_processor.image_std
    )(image, crop_to_patches=True, max_patches=max_tiles, return_tensors="pt")
    ours = image_processor(image, max_patches=max_tiles)
    assert ours["num_patches"] == theirs["num_patches"].tolist()
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=2e-6)


def test_tiles_are_in_reading_order_then_the_thumbnail(image_processor: Any) -> None:
    image = Image.new("RGB", (128, 128))
    for index, colour in enumerate(("red", "lime", "blue", "white")):
        image.paste(colour, (64 * (index % 2), 64 * (index // 2), 64 * (index % 2) + 64, 64 * (index // 2) + 64))
    tiles = image_processor.tiles(image, 4)
    assert tiles.dtype == np.uint8
    assert tiles.shape == (5, 64, 64, 3)
    assert [tuple(tile[32, 32]) for tile in tiles[:4]] == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    assert tuple(tiles[4][0, 0]) == (255, 0, 0)
    assert tuple(tiles[4][-1, -1]) == (255, 255, 255)


def test_limits_can_differ_from_picture_to_picture(image_processor: Any, picture: Callable[..., Image.Image]) -> None:
    wide = picture(1, 256, 64)
    assert image_processor([wide, wide, wide], max_patches=[1, 4, 2])["num_patches"] == [1, 5, 3]


def test_normalisation_comes_from_the_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, folder)
    file = folder / "processor_config.json"
    content = json.loads(file.read_text())
    assert content["image_processor"]["image_mean"] == [0.485, 0.456, 0.406]
    content["image_processor"] |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 1.0]}
    file.write_text(json.dumps(content))
    image_processor = InternVLVTCProcessor.from_pretrained(folder).image_processor
    pixels = image_processor(Image.new("RGB", (64, 64), (255, 0, 51)))["pixel_values"]
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([1.8, -0.8, -0.1]))


def test_orientation_and_transparency(image_processor: Any, tmp_path: Path) -> None:
    sideways = Image.new("RGB", (64, 32), "black")
    sideways.paste("white", (0, 0, 32, 32))  # left half, which orientation 6 turns to the top
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "sideways.png", exif=exif)
    for source in (str(tmp_path / "sideways.png"), Image.open(tmp_path / "sideways.png")):
        pixels = image_processor(source)["pixel_values"][0, 0]
        assert pixels[4].min() > pixels[-4].max()

    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    white = image_processor(Image.new("RGB", (64, 64), "white"))["pixel_values"]
    assert torch.equal(image_processor(clear)["pixel_values"], white)


def test_arrays(image_processor: Any, picture: Callable[..., Image.Image]) -> None:
    image = picture(2)
    array = np.asarray(image)
    expected = image_processor(image)["pixel_values"]
    assert torch.equal(image_processor(array)["pixel_values"], expected)
    assert torch.equal(image_processor(array.transpose(2, 0, 1))["pixel_values"], expected)
    with pytest.raises(ValueError, match="must be uint8"):
        image_processor(array / 255)


def test_settings_without_effect_are_errors(image_processor: Any, picture: Callable[..., Image.Image]) -> None:
    with pytest.raises(ValueError, match=r"fixed in the checkpoint: do_normalize"):
        image_processor(picture(0), do_normalize=False)


def test_tile_size_must_be_the_towers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, folder)
    file = folder / "processor_config.json"
    content = json.loads(file.read_text())
    content["image_processor"]["size"] = {"height": 32, "width": 32}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tiles of 32 x 32 pixels, but the vision tower reads 64 x 64"):
        InternVLVTCProcessor.from_pretrained(folder)


def test_processor_takes_tokens_per_tile_from_the_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"visual_token_compression": 4}))
    assert InternVLVTCProcessor.from_pretrained(tiny_checkpoint).image_seq_length == 4
    assert InternVLVTCProcessor.from_pretrained(folder).image_seq_length == 1


def test_processor_call(tiny_checkpoint: Path, picture: Callable[..., Image.Image]) -> None:
    processor = InternVLVTCProcessor.from_pretrained(tiny_checkpoint)
    batch = processor(
        images=[[picture(0, 256, 64)], [picture(1), picture(2)]],
        text=["<IMG_CONTEXT> a", "<IMG_CONTEXT><IMG_CONTEXT>"],
        return_tensors="pt",
        padding=True,
        max_patches=2,
    )
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert batch["pixel_values"].shape == (3 + 1 + 1, 3, 64, 64)
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [12, 8]


def test_defaults_are_those_of_internvl3() -> None:
    image_processor = InternVLVTCImageProcessor()
    assert (image_processor.size.height, image_processor.size.width) == (448, 448)
    assert list(image_processor.image_mean) == [0.485, 0.456, 0.406]
    assert image_processor.max_patches == 12
