"""The configuration of InternVL3-VTC: that of InternVL, and s."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.internvl.configuration_internvl import InternVLConfig

from quarterlight.models.compression import FACTORS


@strict
class InternVLVTCConfig(InternVLConfig):
    """InternVL's configuration with ``visual_token_compression``: the s of the paper; 1 leaves the backbone as it was.

    ``image_seq_length``, the number of tokens a tile costs, follows from the tower's patch grid, the pixel shuffle and
    s, whatever a file says: 256 for 448 px tiles at s = 1, 64 at s = 2, 16 at s = 4.
    ``masked_instruction``: see :mod:`quarterlight.models.masked_instruction`.
    Raises ValueError when the patch grid is not square or cannot be divided by the pixel shuffle times s.
    """

    model_type = "internvl_vtc"

    visual_token_compression: int = 1
    masked_instruction: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        factor = self.visual_token_compression
        vision: Any = self.vision_config
        if factor not in FACTORS:
            raise ValueError(f"visual_token_compression must be one of {FACTORS}, got {factor}.")
        (height, width), (patch_height, patch_width) = vision.image_size, vision.patch_size
        rows, columns = height // patch_height, width // patch_width
        shuffle = round(1 / self.downsample_ratio)
        if rows != columns or rows % (shuffle * factor):
            raise ValueError(
                f"visual_token_compression={factor} needs a square grid of patches whose side is a multiple of "
                f"{shuffle * factor}, but {height} x {width} pixels in {patch_height} x {patch_width} patches make "
                f"{rows} x {columns}."
            )
        self.image_seq_length = (rows // (shuffle * factor)) ** 2
