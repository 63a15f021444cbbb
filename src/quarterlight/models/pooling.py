"""From the language model's hidden states to one embedding.

B rows, L tokens, D columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn


class PoolingMode(StrEnum):
    """Which hidden states become the embedding."""

    LAST_TOKEN = "last_token"
    """that of the last token (Magic-MM-Embedding, eq. 1)"""
    MEAN = "mean"
    """the mean over all tokens but the instruction's (U-MARVEL)"""


class Attention(StrEnum):
    """What a token sees."""

    CAUSAL = "causal"
    """the tokens before it (Magic-MM-Embedding)"""
    BIDIRECTIONAL = "bidirectional"
    """all tokens of its row (U-MARVEL)"""


def pool(hidden_BLD: Tensor, attention_mask_BL: Tensor, instruction_mask_BL: Tensor, mode: PoolingMode) -> Tensor:
    """One vector per row, ``[B, D]`` float32, not normalised; padding may stand on either side.

    attention_mask_BL: 1 for real tokens.  instruction_mask_BL: 1 for the tokens that the mean leaves out.
    """
    if mode is PoolingMode.LAST_TOKEN:
        position = torch.arange(hidden_BLD.shape[1], device=hidden_BLD.device)
        last_B = (attention_mask_BL * position).argmax(dim=1)
        return hidden_BLD[torch.arange(len(last_B), device=last_B.device), last_B].float()
    keep_BL1 = (attention_mask_BL * (1 - instruction_mask_BL)).unsqueeze(-1)
    return (hidden_BLD.float() * keep_BL1).sum(dim=1) / keep_BL1.sum(dim=1)


def embed(model: nn.Module, inputs: Mapping[str, Any], *, pooling: PoolingMode, attention: Attention) -> Tensor:
    """Embeddings of norm 1, float32 ``[B, D]``, of what :meth:`InputFormatter.collate` made.

    inputs: ``input_ids``, ``attention_mask``, ``instruction_mask`` and, where there are pictures, ``pixel_values`` or
        ``mm_encoder_outputs``.
    Rows padded on the right need no mask under causal attention, as nothing real comes after the padding.
    """
    inputs = dict(inputs)
    attention_mask, instruction_mask = inputs.pop("attention_mask"), inputs.pop("instruction_mask")
    inputs["is_causal"] = attention is Attention.CAUSAL  # whatever the configuration says
    if attention is Attention.BIDIRECTIONAL:
        inputs["attention_mask"] = attention_mask
    hidden_BLD = model(**inputs, use_cache=False).last_hidden_state
    return nn.functional.normalize(pool(hidden_BLD, attention_mask, instruction_mask, pooling), dim=-1)
