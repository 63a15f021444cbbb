"""The configuration of InternVL3-VTC: that of InternVL, and s."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.internvl.configuration_internvl import InternVLConfig

from quarterlight.models.compression import FACTORS
from quarterlight.models.merging import merges


@strict
class InternVLVTCConfig(InternVLConfig):
    """InternVL's configuration with ``visual_token_compression``: the s of the paper; 1 leaves the backbone as it was.

    ``image_seq_length``, the number of tokens a tile costs, follows from the tower's patch grid, the pixel shuffle and
    s, whatever a file says: 256 for 448 px tiles at s = 1, 64 at s = 2, 16 at s = 4.
    ``vision_token_merging``: share of a tile's patches that are merged with similar ones before the tower's last layer,
    see :mod:`quarterlight.models.merging`; the number of visual tokens stays the same.  0 merges none.
    ``masked_instruction``: see :mod:`quarterlight.models.masked_instruction`.
    Raises ValueError when the patch grid is not square or cannot be divided by the pixel shuffle times s, or when the
    tower cannot merge so much.
    """

    model_type = "internvl_vtc"

    visual_token_compression: int = 1
    vision_token_merging: float | int = 0.0
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
        merges(rows * columns, vision.num_hidden_layers, self.vision_token_merging)
        if self.vision_token_merging and self.vision_feature_layer != -1:
            raise ValueError(
                "vision_token_merging needs vision_feature_layer=-1, as only the last layer's patches are put back in "
                f"their places, got {self.vision_feature_layer}."
            )
        self.image_seq_length = (rows // (shuffle * factor)) ** 2
