"""Qwen3-VL: as Qwen2.5-VL, and the first layers of the language model are given earlier features of pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from quarterlight.models.backbones.qwen_vl import QwenVL


class Qwen3VL(QwenVL):
    """The adapter of ``qwen3_vl_vtc``.

    DeepStack (arXiv:2406.04334) adds features of the middle of the tower to hidden states of the language model.  They
    stand beside the visual token, in columns D to W, so that whoever keeps visual tokens keeps them too.
    """

    def width(self, config: Any) -> int:
        return super().width(config) * (1 + len(config.vision_config.deepstack_visual_indexes))

    def encoder_outputs(self, config: Any, tokens: Tensor) -> dict[str, Any]:
        first, *deeper = tokens.flatten(0, 1).split(super().width(config), dim=1)
        found = BaseModelOutputWithDeepstackFeatures(
            pooler_output=[first],  # type: ignore[arg-type]
            deepstack_features=[[one] for one in deeper],  # type: ignore[misc]
        )
        return {"image": found}

    def place(self, model: Any, input_ids_BL: Tensor, embeds_BLD: Tensor, tokens: Tensor) -> tuple[Tensor, Any]:
        first, *deeper = tokens.split(super().width(model.config), dim=-1)
        embeds_BLD, _ = super().place(model, input_ids_BL, embeds_BLD, first)
        return embeds_BLD, {
            "visual_pos_masks": input_ids_BL == model.config.image_token_id,
            "deepstack_visual_embeds": [one.flatten(0, 1).to(embeds_BLD) for one in deeper],
        }

    def _joined(self, found: Any) -> Tensor:
        layers = [found.pooler_output, *found.deepstack_features]
        return torch.cat([torch.cat(list(one)) for one in layers], dim=1)
