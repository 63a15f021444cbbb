"""InternVL3-VTC: InternVL whose feature map is compressed between the CLS token's removal and the pixel shuffle.

T tiles; N patches, M hidden states of patches that are left, C columns of the vision tower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.internvl import modeling_internvl
from transformers.models.internvl.modeling_internvl import (
    InternVLForConditionalGeneration,
    InternVLModel,
    InternVLPreTrainedModel,
    InternVLVisionEncoder,
)

from quarterlight.models.compression import compress
from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig
from quarterlight.models.masked_instruction import masking_instruction
from quarterlight.models.merging import MASKED_ATTENTION, Merged, merges


class InternVLVisionLayer(modeling_internvl.InternVLVisionLayer):
    """A layer that can be given a bias of its attention.

    Called as its parent, since whoever cuts models into layers, such as FSDP, finds them by the names of classes.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            unbiased: Tensor = super().forward(hidden_states)
            return unbiased
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask=attention_mask)
        hidden_states = self.lambda_1 * attended + hidden_states
        more: Tensor = self.lambda_2 * self.dropout(self.mlp(self.layernorm_after(hidden_states)))
        return more + hidden_states


class InternVLVTCVisionEncoder(InternVLVisionEncoder):
    """The layers of the vision tower, between which similar patches are merged; the CLS token never is.

    A hidden state that stands for n patches counts n times in every attention: log n is added to its scores
    ("proportional attention", arXiv:2210.09461, section 3), so that merging equal patches changes nothing but rounding.
    """

    merging: float = 0.0
    """share of the patches that are gone before the last layer; 0 leaves the parent as it was"""

    def forward(self, hidden_states: Tensor) -> Any:
        removed = merges(hidden_states.shape[1] - 1, len(self.layer), self.merging) if self.layer else []
        if not any(removed):
            return super().forward(hidden_states)
        if self.config._attn_implementation not in MASKED_ATTENTION:
            raise ValueError(
                f"vision_token_merging works with the attention implementations {' and '.join(MASKED_ATTENTION)}, the "
                f"vision tower has {self.config._attn_implementation!r}: call set_attn_implementation."
            )
        patches, bias = Merged.of(hidden_states[:, 1:]), None
        hidden_states = torch.cat([hidden_states[:, :1], patches.hidden_TMC], dim=1)
        for layer, count in zip(self.layer, removed, strict=True):
            hidden_states = layer(hidden_states) if bias is None else layer(hidden_states, attention_mask=bias)
            patches = patches.with_hidden(hidden_states[:, 1:])
            if count:
                patches = patches.merge(count)
                hidden_states = torch.cat([hidden_states[:, :1], patches.hidden_TMC], dim=1)
                bias = nn.functional.pad(patches.size_TM.log(), (1, 0))[:, None, None].to(hidden_states.dtype)
        return BaseModelOutput(last_hidden_state=torch.cat([hidden_states[:, :1], patches.unmerge()], dim=1))


class InternVLVTCModel(InternVLModel):
    """Vision tower, compression, projector and language model, without a language modelling head."""

    config_class = InternVLVTCConfig
    config: InternVLVTCConfig
    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight"]  # noqa: RUF012  of checkpoints with a language head

    forward = masking_instruction(InternVLModel.forward)

    def __init__(self, config: InternVLVTCConfig) -> None:
        super().__init__(config)
        # the same modules with the same weights, which can do more: to build others would draw random numbers twice
        encoder = self.vision_tower.encoder
        encoder.__class__ = InternVLVTCVisionEncoder
        for layer in encoder.layer:
            layer.__class__ = InternVLVisionLayer

    def get_image_features(self, *arguments: Any, **options: Any) -> Any:
        """As transformers' model has them."""
        # asked for every time: a configuration may be changed, or shared weights be run with several
        self.vision_tower.encoder.merging = self.config.vision_token_merging
        return super().get_image_features(*arguments, **options)

    def pixel_shuffle(self, vision_features: Tensor, scale_factor: float = 0.5) -> Tensor:
        return super().pixel_shuffle(compress(vision_features, self.config.visual_token_compression), scale_factor)


class InternVLVTCForConditionalGeneration(InternVLForConditionalGeneration):
    """The same with the language modelling head: for restoration (stage 1), judging and reranking."""

    config_class = InternVLVTCConfig
    config: InternVLVTCConfig

    def __init__(self, config: InternVLVTCConfig) -> None:
        InternVLPreTrainedModel.__init__(self, config)  # the parent's own would build the uncompressed model
        self.model = InternVLVTCModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


# The published InternVL3 "-hf" weights carry older names, which transformers translates by model type and class name.
for _ours, _theirs in {
    InternVLVTCConfig.model_type: "internvl",
    InternVLVTCModel.__name__: "InternVLModel",
}.items():
    register_checkpoint_conversion_mapping(_ours, get_checkpoint_conversion_mapping(_theirs) or [], overwrite=True)
