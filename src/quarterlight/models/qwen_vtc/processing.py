"""Pictures to merged patches, and prompts with pictures to tensors, without torchvision.

A tile is the square of pixels behind one visual token before compression (28 pixels, 32 for Qwen3-VL); a picture is a
grid of them in reading order.  T tiles, H and W pixels, 3 colours.
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
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin

from quarterlight.errors import ImageError
from quarterlight.images import describe
from quarterlight.models.compression import compressed_grid
from quarterlight.models.positions import Positions, rope_positions
from quarterlight.models.spelt_tokens import SpeltTokensAreText
from quarterlight.models.tiles import Grid, PictureReader, Tiles

MAX_ASPECT = 200
"""How much longer than the other a side may be (the limit of Qwen-VL)."""


class QwenVTCImageProcessor(PictureReader, Qwen2VLImageProcessorPil):
    """Qwen-VL's resizing on Pillow and NumPy; the most pixels can be given for each picture.

    The settings are those of the ``preprocessor_config.json`` it was loaded from.  ``size`` holds the least and the
    most pixels of a picture, as ``shortest_edge`` and ``longest_edge``.
    """

    def cut(self, image: Image.Image, max_tiles: int | None = None, max_pixels: int | None = None) -> Tiles:
        """A picture resized to whole tiles of about its aspect ratio, with ``max_pixels`` times ``max_tiles`` at most.

        A page that may have four tiles of an InternVL so has four times the pixels of a natural picture here.
        Raises ImageError for a picture that is more than 200 times as long as it is wide.
        """
        try:
            rows, columns = self.grid_of(image.width, image.height, max_tiles, max_pixels)
        except ValueError as error:
            raise ImageError(
                f"{describe(image)} cannot be read by this model: one side may be {MAX_ASPECT} times the other at most."
            ) from error
        height, width = self.tile_pixels
        canvas = np.asarray(image.resize((columns * width, rows * height), self.resample))
        tiles_THW3 = np.empty((rows * columns, height, width, 3), dtype=np.uint8)
        tiles_THW3.reshape(rows, columns, height, width, 3)[:] = canvas.reshape(
            rows, height, columns, width, 3
        ).swapaxes(1, 2)
        return Tiles(tiles_THW3, (rows, columns))

    def blank(self, grid: Grid | None = None) -> Tiles:
        """A white picture, of one tile if nobody says."""
        rows, columns = (1, 1) if grid is None or isinstance(grid, int) else grid
        return Tiles(np.full((rows * columns, *self.tile_pixels, 3), 255, np.uint8), (rows, columns))

    def grid_of(
        self, width: int, height: int, max_tiles: int | None = None, max_pixels: int | None = None
    ) -> tuple[int, int]:
        """Rows and columns of a picture of so many pixels. Raises ValueError for an impossible aspect ratio.

        transformers' rule, but that a strip one tile high or wide keeps to the limit too.
        """
        side = self.tile_pixels[0]
        most = max(side * side, (max_pixels or self.size["longest_edge"]) * (max_tiles or 1))
        least = min(most, self.size["shortest_edge"])
        height, width = smart_resize(height, width, side, least, most)
        rows, columns = height // side, width // side
        limit = most // (side * side)
        return (rows, min(columns, limit)) if rows == 1 else (min(rows, limit // columns or 1), columns)

    def most_tiles(self, max_tiles: int, max_pixels: int) -> int:
        """Tiles of a picture, at most."""
        return max(1, max_tiles * max_pixels // self.tile_pixels[0] ** 2)

    def enough_pixels(self, max_tiles: int) -> int | None:
        """Unknown: rows and columns are those of the picture, unless it is too large."""
        return None

    @property
    def tile_pixels(self) -> tuple[int, int]:
        """Height and width of a tile, which are the same."""
        side = self.patch_size * self.merge_size
        return side, side

    def set_limits(self, max_tiles: int, max_pixels: int) -> None:
        """The most pixels of a picture when nobody says."""
        self.size = {"shortest_edge": self.size["shortest_edge"], "longest_edge": max_tiles * max_pixels}

    def normalize_tiles(self, tiles_THW3: Tensor) -> Tensor:
        """What the vision tower reads of the uint8 ``[T, H, W, 3]`` tiles, on their device: float32 ``[T * m^2, C]``.

        A row is a patch, those of a tile one after the other, with its numbers by colour, time, height and width; a
        still picture is a film of equal frames.
        """
        mean, std = (torch.tensor(values, device=tiles_THW3.device) for values in (self.image_mean, self.image_std))
        pixels_THW3 = torch.addcmul(-mean / std, tiles_THW3, self.rescale_factor / std)
        merge, patch = self.merge_size, self.patch_size
        patches = pixels_THW3.reshape(-1, merge, patch, merge, patch, 3).permute(0, 1, 3, 5, 2, 4)
        frames = patches.unsqueeze(4).expand(-1, -1, -1, -1, self.temporal_patch_size, -1, -1)
        return frames.reshape(len(tiles_THW3) * merge * merge, -1)

    def preprocess(
        self,
        images: Any,
        *,
        max_pixels: int | Sequence[int] | None = None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """``pixel_values``, float32 ``[all patches, C]``, and ``image_grid_thw``, int64 ``[pictures, 3]`` in patches.

        Raises ValueError for settings that this processor would not heed.
        """
        if unheeded := sorted(key for key, value in kwargs.items() if value is not None and key != "device"):
            raise ValueError(f"These image settings are fixed in the checkpoint: {', '.join(unheeded)}.")
        flat: Any = make_flat_list_of_images(self.fetch_images(images))
        pictures = [self._picture(image) for image in flat]
        limits = [max_pixels] * len(pictures) if max_pixels is None or isinstance(max_pixels, int) else max_pixels
        tiles = [self.cut(one, None, limit) for one, limit in zip(pictures, limits, strict=True)]
        grids = torch.tensor([(1, *one.grid) for one in tiles])  # type: ignore[misc]  # ours are pairs
        grids[:, 1:] *= self.merge_size
        pixel_values = self.normalize_tiles(torch.from_numpy(np.concatenate([one.pixels for one in tiles])))
        return BatchFeature({"pixel_values": pixel_values, "image_grid_thw": grids})


class QwenVTCProcessor(SpeltTokensAreText, Qwen2VLProcessor):  # type: ignore[misc]  # what it does not name goes through
    """Tokenizer and resizing of all three, agreeing with the model on the tokens of a picture."""

    text_kwargs = {"return_token_type_ids": False}  # noqa: RUF012

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        visual_token_compression: int = 1,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(image_processor, QwenVTCImageProcessor):
            settings, known = image_processor.to_dict(), QwenVTCImageProcessor.valid_kwargs.__annotations__
            image_processor = QwenVTCImageProcessor(**{key: settings[key] for key in known if key in settings})
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.visual_token_compression = visual_token_compression
        self.image_token = "<|image_pad|>"
        names = (self.image_token, "<|vision_start|>", "<|vision_end|>")
        ids = tokenizer.convert_tokens_to_ids(list(names))
        if missing := [name for name, id in zip(names, ids, strict=True) if id in (None, tokenizer.unk_token_id)]:
            raise ValueError(f"The tokenizer has no token {missing[0]}, with which a Qwen-VL writes pictures.")
        self.image_token_id, self.start_image_token_id, self.end_image_token_id = ids

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> QwenVTCProcessor:
        """The processor of a checkpoint folder or hub id, with s from its configuration. Raises ValueError when patches
        and vision tower disagree."""
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        try:
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path)
        except (OSError, ValueError):  # a processor saved without a model
            return processor
        if hasattr(config, "visual_token_compression"):
            processor.agree_with(config)
        return processor

    @property
    def picture(self) -> str:
        """How a chat template spells a picture."""
        return f"<|vision_start|>{self.image_token}<|vision_end|>"

    @property
    def num_axes(self) -> int:
        """M-RoPE's: time, height and width."""
        return 3

    def grid(self, grid: Grid) -> tuple[int, int]:
        """Rows and columns of a picture's visual tokens, after compression."""
        assert not isinstance(grid, int)
        return compressed_grid(*grid, self.visual_token_compression)

    def num_visual_tokens(self, grid: Grid) -> int:
        """Tokens of a picture, after compression."""
        rows, columns = self.grid(grid)
        return rows * columns

    def most_visual_tokens(self, max_tiles: int, max_pixels: int) -> int:
        """Tokens of a picture, at most; a strip that is too narrow to be compressed both ways may have more."""
        tiles = int(self.image_processor.most_tiles(max_tiles, max_pixels))
        return max(1, tiles // self.visual_token_compression**2)

    def positions(self, ids: Sequence[int], grids: Sequence[Grid], mode: Positions, start: int = 0) -> Tensor:
        """Places in the row of tokens or, of visual ones, in the compressed picture: int64 ``[3, L]``."""
        return rope_positions(ids, [self.grid(one) for one in grids], self.image_token_id, mode, start)

    def agree_with(self, config: Any) -> None:
        """Takes s from ``config``. Raises ValueError when its tower reads patches of another size, or its language
        model knows another token of pictures."""
        vision = config.vision_config
        ours = self.image_processor
        cut = ours.patch_size, ours.merge_size, ours.temporal_patch_size
        read = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        if cut != read:
            raise ValueError(
                f"The image processor makes patches of {cut[0]} pixels, {cut[1]} x {cut[1]} of them a token and "
                f"{cut[2]} frames deep, but the vision tower reads {read[0]}, {read[1]} and {read[2]}: mend "
                "preprocessor_config.json."
            )
        if config.image_token_id != self.image_token_id:
            raise ValueError(
                f"The tokenizer's {self.image_token} has the id {self.image_token_id}, but the model expects "
                f"{config.image_token_id}: mend image_token_id in config.json."
            )
        self.visual_token_compression = config.visual_token_compression

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """As many placeholders as the picture has visual tokens."""
        _, rows, columns = (int(one) for one in image_inputs["image_grid_thw"][image_idx])
        merge = self.image_processor.merge_size
        return self.image_token * self.num_visual_tokens((rows // merge, columns // merge))
