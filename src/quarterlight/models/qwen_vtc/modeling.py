"""Qwen-VL whose visual tokens are compressed on the grid of merged patches, behind the connector.

P pictures, n visual tokens of one of them, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLPreTrainedModel,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLPreTrainedModel,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLPreTrainedModel,
)

from quarterlight.models.compression import compress_grid, compressed_grid
from quarterlight.models.masked_instruction import masking_instruction
from quarterlight.models.positions import Positions
from quarterlight.models.qwen_vtc.configuration import Qwen2_5VLVTCConfig, Qwen2VLVTCConfig, Qwen3VLVTCConfig


class _Compressed:
    """What the three models do differently from those of transformers."""

    config: Any

    def _merged(self, image_grid_thw: Tensor) -> Tensor:
        """Rows and columns of merged patches of each picture, int64 ``[P, 2]``."""
        return image_grid_thw[:, 1:] // self.config.vision_config.spatial_merge_size

    def _compress(self, features: Sequence[Tensor], image_grid_thw: Tensor) -> tuple[Tensor, ...]:
        """The features of each picture, ``[n, D]``, on a smaller grid."""
        factor = self.config.visual_token_compression
        grids = self._merged(image_grid_thw).tolist()
        return tuple(
            compress_grid(one.unflatten(0, (rows, columns)), factor).flatten(0, 1)
            for one, (rows, columns) in zip(features, grids, strict=True)
        )

    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, *, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        """As transformers' model has them, ``pooler_output`` and DeepStack's features compressed."""
        parent: Any = super()
        found = parent.get_image_features(pixel_values, image_grid_thw, return_dict=True, **kwargs)
        if self.config.visual_token_compression > 1:
            assert image_grid_thw is not None
            found.pooler_output = self._compress(found.pooler_output, image_grid_thw)
            if hasattr(found, "deepstack_features"):
                found.deepstack_features = [self._compress(one, image_grid_thw) for one in found.deepstack_features]
        return found if return_dict else found.to_tuple()

    def get_rope_index(self, *args: Any, **kwargs: Any) -> Any:
        """M-RoPE's positions on the compressed grid, which must be given by its name as transformers does."""
        assert len(args) < 3
        image_grid_thw = kwargs.pop("image_grid_thw", None)
        if image_grid_thw is not None and self.config.visual_token_compression > 1:
            factor, merge = self.config.visual_token_compression, self.config.vision_config.spatial_merge_size
            grids = [compressed_grid(rows, columns, factor) for rows, columns in self._merged(image_grid_thw).tolist()]
            left = torch.tensor(grids, dtype=image_grid_thw.dtype, device=image_grid_thw.device)
            image_grid_thw = torch.cat([image_grid_thw[:, :1], merge * left], dim=1)
        parent: Any = super()
        return parent.get_rope_index(*args, image_grid_thw=image_grid_thw, **kwargs)

    def compute_3d_position_ids(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """None, for places in the row of tokens, where the checkpoint was trained with these."""
        if self.config.positions == Positions.SEQUENTIAL:
            return None
        parent: Any = super()
        found: Tensor | None = parent.compute_3d_position_ids(*args, **kwargs)
        return found


class Qwen2VLVTCModel(_Compressed, Qwen2VLModel):
    """Qwen2-VL without a language modelling head."""

    config_class = Qwen2VLVTCConfig
    config: Qwen2VLVTCConfig
    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight"]  # noqa: RUF012  of checkpoints with a language head

    forward = masking_instruction(Qwen2VLModel.forward)


class Qwen2VLVTCForConditionalGeneration(Qwen2VLForConditionalGeneration):
    """Qwen2-VL with its head: for restoration (stage 1), judging and reranking."""

    config_class = Qwen2VLVTCConfig
    config: Qwen2VLVTCConfig

    def __init__(self, config: Qwen2VLVTCConfig) -> None:
        Qwen2VLPreTrainedModel.__init__(self, config)  # the parent's own would build the uncompressed model
        self.model = Qwen2VLVTCModel(config)
        self.lm_head = _head(config)
        self.post_init()


class Qwen2_5VLVTCModel(_Compressed, Qwen2_5_VLModel):
    """Qwen2.5-VL without a language modelling head."""

    config_class = Qwen2_5VLVTCConfig
    config: Qwen2_5VLVTCConfig
    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight"]  # noqa: RUF012

    forward = masking_instruction(Qwen2_5_VLModel.forward)


class Qwen2_5VLVTCForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with its head."""

    config_class = Qwen2_5VLVTCConfig
    config: Qwen2_5VLVTCConfig

    def __init__(self, config: Qwen2_5VLVTCConfig) -> None:
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.model = Qwen2_5VLVTCModel(config)
        self.lm_head = _head(config)
        self.post_init()


class Qwen3VLVTCModel(_Compressed, Qwen3VLModel):
    """Qwen3-VL without a language modelling head."""

    config_class = Qwen3VLVTCConfig
    config: Qwen3VLVTCConfig
    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight"]  # noqa: RUF012

    forward = masking_instruction(Qwen3VLModel.forward)


class Qwen3VLVTCForConditionalGeneration(Qwen3VLForConditionalGeneration):
    """Qwen3-VL with its head."""

    config_class = Qwen3VLVTCConfig
    config: Qwen3VLVTCConfig

    def __init__(self, config: Qwen3VLVTCConfig) -> None:
        Qwen3VLPreTrainedModel.__init__(self, config)
        self.model = Qwen3VLVTCModel(config)
        self.lm_head = _head(config)
        self.post_init()


def _head(config: Any) -> nn.Linear:
    text = config.text_config
    return nn.Linear(text.hidden_size, text.vocab_size, bias=False)


# The published weights of Qwen2-VL and Qwen2.5-VL carry older names, which transformers translates by class name.
for _ours, _theirs in {
    Qwen2VLVTCModel: Qwen2VLModel,
    Qwen2VLVTCForConditionalGeneration: Qwen2VLForConditionalGeneration,
    Qwen2_5VLVTCModel: Qwen2_5_VLModel,
    Qwen2_5VLVTCForConditionalGeneration: Qwen2_5_VLForConditionalGeneration,
    Qwen3VLVTCModel: Qwen3VLModel,
    Qwen3VLVTCForConditionalGeneration: Qwen3VLForConditionalGeneration,
}.items():
    if _mapping := get_checkpoint_conversion_mapping(_theirs.__name__):
        register_checkpoint_conversion_mapping(_ours.__name__, _mapping, overwrite=True)
