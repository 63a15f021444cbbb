"""InternVL: a picture is tiles of one size, each with as many visual tokens as any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from quarterlight.models.backbones.backbone import Backbone, Tower
from quarterlight.models.internvl_vtc.processing import InternVLVTCImageProcessor
from quarterlight.models.merging import lengths, merges
from quarterlight.models.tiles import Grid, num_tiles


class InternVL(Backbone):
    """The adapter of ``internvl_vtc``: n are the tiles of a picture, k the tokens of a tile."""

    eyes = ("vision_tower", "multi_modal_projector")
    tower_layers = "vision_tower.encoder.layer"
    tower_settings = (
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
        "norm_type",
        "use_qk_norm",
        "image_size",
        "patch_size",
    )
    connector_settings = (
        "visual_token_compression",
        "downsample_ratio",
        "projector_hidden_act",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )
    unheeded = ("max_pixels", "positions")
    limits = ("max_patches",)

    def see(self, model: Any, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        found: Tensor = model.get_image_features(pixel_values, return_dict=True).pooler_output
        return found

    def num_rows(self, config: Any, grid: Grid) -> int:
        return num_tiles(grid)

    def tokens_per_row(self, config: Any) -> int:
        return int(config.image_seq_length)

    def tokens_per_tile(self, config: Any) -> float:
        return float(config.image_seq_length)

    def tower(self, config: Any) -> Tower:
        vision = config.vision_config
        d, text, patches = vision.hidden_size, config.text_config.hidden_size, self.patches(config)
        merged = merges(patches, vision.num_hidden_layers, config.vision_token_merging)
        return Tower(
            width=d,
            mlp=vision.intermediate_size,
            num_layers=vision.num_hidden_layers,
            sequence=1 + patches,  # and the CLS token
            patches=patches,
            layer=4 * d * d + 2 * d * vision.intermediate_size,
            embedding=3 * vision.patch_size[0] * vision.patch_size[1] * d,
            connector=4 * d * text + text * text,  # behind the pixel shuffle, which puts four patches side by side
            outputs=config.image_seq_length,
            tiles_are_pictures=True,
            seen=tuple(1 + left for left in lengths(patches, merged)) if any(merged) else (),
        )

    def most_tiles(self, config: Any, max_tiles: int, max_pixels: int) -> int:
        return max_tiles + (max_tiles > 1)  # and the thumbnail

    def image_processor(self, config: Any) -> InternVLVTCImageProcessor:
        height, width = config.vision_config.image_size
        return InternVLVTCImageProcessor(size={"height": height, "width": width})

    def patches(self, config: Any) -> int:
        vision = config.vision_config
        return int((vision.image_size[0] // vision.patch_size[0]) * (vision.image_size[1] // vision.patch_size[1]))

    def split(self, grids: Sequence[Grid], most_tiles: int) -> list[list[Grid]]:
        """Tiles do not see each other, so that a run ends anywhere."""
        total = sum(map(num_tiles, grids))
        return [[min(most_tiles, total - start)] for start in range(0, total, most_tiles)]

    def split_alike(self, grids: Sequence[Grid], most_tiles: int) -> tuple[list[list[Grid]], int]:
        """Always as many tiles together."""
        total = sum(map(num_tiles, grids))
        blank = -total % most_tiles
        return [[most_tiles]] * ((total + blank) // most_tiles), blank

    def configure(self, config: Any, settings: Any) -> None:
        """Nothing: what an item may have reaches the model with the item."""

    def stored(self, config: Any, tokens: Tensor, grid: Grid) -> Tensor:
        return tokens.flatten(0, 1)

    def restored(self, config: Any, stored_RW: Tensor) -> tuple[Tensor, Grid]:
        k, width = self.tokens_per_row(config), self.width(config)
        if stored_RW.ndim != 2 or stored_RW.shape[1] != width or not len(stored_RW) or len(stored_RW) % k:
            raise ValueError(f"must be of shape [tiles * {k}, {width}], got {list(stored_RW.shape)}")
        return stored_RW.unflatten(0, (-1, k)), len(stored_RW) // k

    def smallest(self) -> Grid:
        return 1

    def largest(self, config: Any, max_tiles: int, max_pixels: int) -> Grid:
        return self.most_tiles(config, max_tiles, max_pixels)

    def pixels_shape(self, config: Any, grids: Sequence[Grid]) -> tuple[int, ...]:
        return (sum(map(num_tiles, grids)), 3, *config.vision_config.image_size)
