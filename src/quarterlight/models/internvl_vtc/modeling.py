"""InternVL3-VTC: InternVL whose feature map is compressed between the CLS token's removal and the pixel shuffle."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.internvl.modeling_internvl import (
    InternVLForConditionalGeneration,
    InternVLModel,
    InternVLPreTrainedModel,
)

from quarterlight.models.compression import compress
from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig
from quarterlight.models.masked_instruction import masking_instruction


class InternVLVTCModel(InternVLModel):
    """Vision tower, compression, projector and language model, without a language modelling head."""

    config_class = InternVLVTCConfig
    config: InternVLVTCConfig
    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight"]  # noqa: RUF012  of checkpoints with a language head

    forward = masking_instruction(InternVLModel.forward)

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
