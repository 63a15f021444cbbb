"""Qwen2-VL and Qwen2.5-VL: a picture is one grid of patches, and visual tokens stand in rows and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from quarterlight.models.backbones.backbone import Backbone, Tower
from quarterlight.models.compression import compressed_grid
from quarterlight.models.qwen_vtc.processing import QwenVTCImageProcessor
from quarterlight.models.tiles import Grid, num_tiles


class QwenVL(Backbone):
    """The adapter of ``qwen2_vl_vtc`` and ``qwen2_5_vl_vtc``: n are the visual tokens of a picture, k is 1."""

    eyes = ("visual",)
    tower_layers = "visual.blocks"
    tower_settings = (
        "num_heads",
        "hidden_act",
        "patch_size",
        "spatial_merge_size",
        "temporal_patch_size",
        "window_size",
        "fullatt_block_indexes",
        "deepstack_visual_indexes",
        "rope_parameters",
    )
    limits = ("size",)

    def see(self, model: Any, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        return self._joined(self._features(model, pixel_values, grids)).unsqueeze(1)

    def num_rows(self, config: Any, grid: Grid) -> int:
        assert not isinstance(grid, int)
        rows, columns = compressed_grid(*grid, config.visual_token_compression)
        return rows * columns

    def tokens_per_row(self, config: Any) -> int:
        return 1

    def tokens_per_tile(self, config: Any) -> float:
        return 1.0 / config.visual_token_compression**2

    def tower(self, config: Any) -> Tower:
        vision = config.vision_config
        d, merged = self._widths(vision)
        mlp = getattr(vision, "intermediate_size", None) or int(d * vision.mlp_ratio)
        group = vision.spatial_merge_size**2
        window = getattr(vision, "window_size", None)
        return Tower(
            width=d,
            mlp=mlp,
            num_layers=vision.depth,
            sequence=group,
            patches=group,
            layer=4 * d * d + (3 if window else 2) * d * mlp,  # Qwen2.5-VL's perceptrons have a gate
            embedding=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * d,
            connector=(group * d) ** 2 + group * d * merged,
            outputs=1 + len(getattr(vision, "deepstack_visual_indexes", ())),
            window=(window // vision.patch_size) ** 2 if window else None,
            whole_layers=len(vision.fullatt_block_indexes) if window else None,
        )

    @staticmethod
    def _widths(vision: Any) -> tuple[int, int]:
        """Columns of the tower, and of visual tokens."""
        if hasattr(vision, "embed_dim"):  # what Qwen2-VL calls hidden_size is what later ones call out_hidden_size
            return vision.embed_dim, vision.hidden_size
        return vision.hidden_size, vision.out_hidden_size

    def most_tiles(self, config: Any, max_tiles: int, max_pixels: int) -> int:
        vision = config.vision_config
        return max(1, max_tiles * max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2)

    def image_processor(self, config: Any) -> QwenVTCImageProcessor:
        vision = config.vision_config
        return QwenVTCImageProcessor(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
        )

    def patches(self, config: Any) -> int:
        return int(config.vision_config.spatial_merge_size**2)

    def split(self, grids: Sequence[Grid], most_tiles: int) -> list[list[Grid]]:
        """The patches of a picture see each other, so that a picture is never cut."""
        runs: list[list[Grid]] = []
        size = 0
        for grid in grids:
            if not runs or size + num_tiles(grid) > most_tiles:
                runs.append([])
                size = 0
            runs[-1].append(grid)
            size += num_tiles(grid)
        return runs

    def split_alike(self, grids: Sequence[Grid], most_tiles: int) -> tuple[list[list[Grid]], int]:
        """Each picture alone."""
        return [[grid] for grid in grids], 0

    def stored(self, config: Any, tokens: Tensor, grid: Grid) -> Tensor:
        """The tokens, behind a row that begins with the numbers of their rows and columns, for M-RoPE."""
        assert not isinstance(grid, int)
        first_1W = tokens.new_zeros(1, tokens.shape[-1])
        first_1W[0, :2] = torch.tensor(compressed_grid(*grid, config.visual_token_compression)).to(tokens)
        return torch.cat([first_1W, tokens.flatten(0, 1)])

    def restored(self, config: Any, stored_RW: Tensor) -> tuple[Tensor, Grid]:
        width = self.width(config)
        if stored_RW.ndim == 2 and stored_RW.shape[1] == width and len(stored_RW) > 1:
            count = len(stored_RW) - 1
            rows, columns = stored_RW[0, :2].tolist()
            # where numbers were rounded to 127 steps of the largest, it alone is exact
            larger = max(1, round(max(rows, columns)))
            pair = (larger, count // larger) if rows >= columns else (count // larger, larger)
            if pair[0] * pair[1] == count:
                s = config.visual_token_compression
                return stored_RW[1:].unsqueeze(1), (pair[0] * s, pair[1] * s)
        raise ValueError(
            f"must be of shape [1 + tokens, {width}], numbers of rows and columns first, got {list(stored_RW.shape)}"
        )

    def smallest(self) -> Grid:
        return 1, 1

    def largest(self, config: Any, max_tiles: int, max_pixels: int) -> Grid:
        most = self.most_tiles(config, max_tiles, max_pixels)
        rows = max(1, math.isqrt(most * 3 // 4))
        return rows, most // rows

    def pixels_shape(self, config: Any, grids: Sequence[Grid]) -> tuple[int, ...]:
        vision = config.vision_config
        numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return sum(map(num_tiles, grids)) * self.patches(config), numbers

    def encoder_outputs(self, config: Any, tokens: Tensor) -> dict[str, Any]:
        # a list of pictures there, which it joins
        return {"image": BaseModelOutputWithPooling(pooler_output=[tokens.flatten(0, 1)])}  # type: ignore[arg-type]

    def place(self, model: Any, input_ids_BL: Tensor, embeds_BLD: Tensor, tokens: Tensor) -> tuple[Tensor, Any]:
        tokens = tokens.flatten(0, 1).to(embeds_BLD)
        slots, _ = model.get_placeholder_mask(input_ids_BL, embeds_BLD, tokens)  # checks that they are as many
        return embeds_BLD.masked_scatter(slots, tokens), {}

    def base_name(self, name: str) -> str:
        inner = name.removeprefix("model.")
        if inner == name or inner.startswith(("language_model.", *(f"{one}." for one in self.eyes))):
            return inner
        return f"language_model.{inner}"  # as in the folders that were published first

    def picture_settings(self, image_processor: Any) -> dict[str, Any]:
        return super().picture_settings(image_processor) | {"min_pixels": image_processor.size["shortest_edge"]}

    def configure(self, config: Any, settings: Any) -> None:
        config.positions = str(settings.positions)

    def _features(self, model: Any, pixel_values: Tensor, grids: Sequence[Grid]) -> Any:
        merge = model.config.vision_config.spatial_merge_size
        pairs = torch.tensor(grids, device=pixel_values.device).reshape(-1, 2)
        grid_thw = torch.cat([torch.ones_like(pairs[:, :1]), merge * pairs], dim=1)
        return model.get_image_features(pixel_values, grid_thw, return_dict=True)

    def _joined(self, found: Any) -> Tensor:
        """Visual tokens of all pictures, ``[n, W]``."""
        return torch.cat(list(found.pooler_output))
