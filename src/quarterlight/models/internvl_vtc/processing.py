"""Pictures to tiles, and prompts with pictures to tensors, without torchvision.

T tiles, H and W pixels, 3 colours; a tile is square, and a picture cut into more than one is followed by its thumbnail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.processing_utils import ProcessorMixin

from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig
from quarterlight.models.positions import Positions
from quarterlight.models.spelt_tokens import SpeltTokensAreText
from quarterlight.models.tiles import Grid, PictureReader, Tiles, num_tiles


class InternVLVTCImageProcessor(PictureReader, GotOcr2ImageProcessorPil):
    """InternVL's dynamic tiling on Pillow and NumPy; ``max_patches``, the most tiles, can be given for each picture.

    The settings are those of the ``preprocessor_config.json`` it was loaded from; the defaults are InternVL3's.
    """

    image_mean = [0.485, 0.456, 0.406]  # noqa: RUF012  ImageNet's; the parent's are CLIP's
    image_std = [0.229, 0.224, 0.225]  # noqa: RUF012
    size: Any = {"height": 448, "width": 448}  # noqa: RUF012
    crop_to_patches = True

    def tiles(self, image: Image.Image, max_tiles: int | None = None) -> np.ndarray:
        """The tiles of an RGB picture in reading order, then its thumbnail: uint8 ``[T, H, W, 3]``.

        The grid has at most ``max_tiles`` tiles and the aspect ratio nearest to the picture's.
        """
        height, width = self.size.height, self.size.width
        columns, rows = get_optimal_tiled_canvas(
            (image.height, image.width), (height, width), self.min_patches, max_tiles or self.max_patches
        )
        canvas = np.asarray(image.resize((columns * width, rows * height), self.resample))
        count = rows * columns
        tiles_THW3 = np.empty((count + (count > 1), height, width, 3), dtype=np.uint8)
        tiles_THW3[:count].reshape(rows, columns, height, width, 3)[:] = canvas.reshape(
            rows, height, columns, width, 3
        ).swapaxes(1, 2)
        if count > 1:
            tiles_THW3[count] = image.resize((width, height), self.resample)
        return tiles_THW3

    def cut(self, image: Image.Image, max_tiles: int | None = None, max_pixels: int | None = None) -> Tiles:
        """:meth:`tiles` and how many they are. A tile has as many pixels as any other: ``max_pixels`` is not heeded."""
        tiles_THW3 = self.tiles(image, max_tiles)
        return Tiles(tiles_THW3, len(tiles_THW3))

    def blank(self, grid: Grid | None = None) -> Tiles:
        """White tiles, one if nobody says how many."""
        count = 1 if grid is None else num_tiles(grid)
        return Tiles(np.full((count, *self.tile_pixels, 3), 255, np.uint8), count)

    def grid_of(self, width: int, height: int, max_tiles: int | None = None, max_pixels: int | None = None) -> int:
        """The number of tiles, thumbnail included, of a picture of so many pixels."""
        settings = {"max_patches": max_tiles or self.max_patches, "crop_to_patches": True}
        return int(self.get_number_of_image_patches(height, width, settings))

    def most_tiles(self, max_tiles: int, max_pixels: int) -> int:
        """Tiles of a picture, at most: a thumbnail is added to more than one."""
        return max_tiles + (max_tiles > 1)

    def enough_pixels(self, max_tiles: int) -> int | None:
        """A tile's, where all of a picture becomes one; which grid fits best also depends on the number of pixels."""
        return max(self.tile_pixels) if max_tiles == 1 else None

    @property
    def tile_pixels(self) -> tuple[int, int]:
        """Height and width of a tile."""
        return self.size.height, self.size.width

    def set_limits(self, max_tiles: int, max_pixels: int) -> None:
        """The most tiles of a picture when nobody says."""
        self.max_patches = max_tiles

    def normalize_tiles(self, tiles_THW3: Tensor) -> Tensor:
        """What the vision tower reads, float32 ``[T, 3, H, W]``, on the device of the uint8 ``[T, H, W, 3]`` tiles."""
        mean, std = (torch.tensor(values, device=tiles_THW3.device) for values in (self.image_mean, self.image_std))
        return torch.addcmul(-mean / std, tiles_THW3, self.rescale_factor / std).movedim(-1, 1)

    def preprocess(
        self,
        images: Any,
        *,
        max_patches: int | Sequence[int] | None = None,
        crop_to_patches: bool | None = None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """``pixel_values``, float32 ``[all tiles, 3, H, W]``, and ``num_patches``, the number of tiles of each picture.

        Raises ValueError for settings that this processor would not heed.
        """
        if unheeded := sorted(key for key, value in kwargs.items() if value is not None and key != "device"):
            raise ValueError(f"These image settings are fixed in the checkpoint: {', '.join(unheeded)}.")
        flat: Any = make_flat_list_of_images(self.fetch_images(images))
        pictures = [self._picture(image) for image in flat]
        if not (self.crop_to_patches if crop_to_patches is None else crop_to_patches):
            max_patches = 1
        limits = [max_patches] * len(pictures) if max_patches is None or isinstance(max_patches, int) else max_patches
        tiles = [self.tiles(picture, limit) for picture, limit in zip(pictures, limits, strict=True)]
        pixel_values = self.normalize_tiles(torch.from_numpy(np.concatenate(tiles)))
        return BatchFeature({"pixel_values": pixel_values, "num_patches": [len(one) for one in tiles]})


class InternVLVTCProcessor(SpeltTokensAreText, InternVLProcessor):  # type: ignore[misc]  # what it does not name goes through
    """Tokenizer and tiling, agreeing with the model on the tokens of a tile because the configuration says how many."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(image_processor, InternVLVTCImageProcessor):
            settings, known = image_processor.to_dict(), InternVLVTCImageProcessor.valid_kwargs.__annotations__
            image_processor = InternVLVTCImageProcessor(**{key: settings[key] for key in known if key in settings})
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.image_seq_length = image_seq_length
        self.start_image_token = tokenizer.start_image_token
        self.start_image_token_id = tokenizer.start_image_token_id
        self.end_image_token = tokenizer.end_image_token
        self.end_image_token_id = tokenizer.end_image_token_id
        self.image_token = tokenizer.context_image_token
        self.image_token_id = tokenizer.context_image_token_id

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> InternVLVTCProcessor:
        """The processor of a checkpoint folder or hub id, with the tile size and the tokens of a tile from its
        configuration.  Raises ValueError when tile size and vision tower disagree."""
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        try:
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path)
        except (OSError, ValueError):  # a processor saved without a model
            return processor
        if isinstance(config, InternVLVTCConfig):
            processor.agree_with(config)
        return processor

    @property
    def picture(self) -> str:
        """How a chat template spells a picture: the brackets come with the visual tokens."""
        return self.image_token

    @property
    def num_axes(self) -> int:
        """Positions are numbers: the language models are Qwen2.5 and Qwen3."""
        return 1

    def num_visual_tokens(self, grid: Grid) -> int:
        """Tokens of a picture in so many tiles."""
        return num_tiles(grid) * self.image_seq_length

    def most_visual_tokens(self, max_tiles: int, max_pixels: int) -> int:
        """Tokens of a picture, at most."""
        return int(self.image_processor.most_tiles(max_tiles, max_pixels)) * self.image_seq_length

    def positions(self, ids: Sequence[int], grids: Sequence[Grid], mode: Positions, start: int = 0) -> Tensor:
        """Places in the row of tokens, int64 ``[1, L]``."""
        return torch.arange(start, start + len(ids))[None]

    def agree_with(self, config: InternVLVTCConfig) -> None:
        """Takes the tokens of a tile from ``config``.  Raises ValueError when its tower reads another tile size."""
        vision: Any = config.vision_config
        cut, read = (self.image_processor.size.height, self.image_processor.size.width), tuple(vision.image_size)
        if cut != read:
            raise ValueError(
                f"The image processor cuts tiles of {cut[0]} x {cut[1]} pixels, but the vision tower reads "
                f"{read[0]} x {read[1]}: mend the size in preprocessor_config.json or processor_config.json."
            )
        self.image_seq_length = config.image_seq_length

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Token ids of texts in which ``<IMG_CONTEXT>`` stands for each picture, and ``pixel_values`` of all tiles."""
        inputs = ProcessorMixin.__call__(self, images=images, text=text, **kwargs)
        inputs.pop("num_patches", None)
        return inputs
