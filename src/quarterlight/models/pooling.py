"""From the language model's hidden states to one embedding.

B rows, L tokens, D columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from quarterlight.models.backbones import backbone_of


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

    inputs: ``input_ids``, ``attention_mask``, ``instruction_mask``, perhaps ``position_ids`` and ``grids``, and, where
        there are pictures, ``pixel_values``, or ``visual_tokens`` as a backbone's adapter makes them.
    Rows padded on the right need no mask under causal attention, as nothing real comes after the padding.
    """
    attention_mask, instruction_mask = inputs["attention_mask"], inputs["instruction_mask"]
    rest: dict[str, Any] = {"is_causal": attention is Attention.CAUSAL}  # whatever the configuration says
    if attention is Attention.BIDIRECTIONAL:
        rest["attention_mask"] = attention_mask
    if (position_ids := inputs.get("position_ids")) is not None:
        rest["position_ids"] = position_ids
    rest.update(seen(model, inputs))
    hidden_BLD = model(input_ids=inputs["input_ids"], **rest, use_cache=False).last_hidden_state
    return nn.functional.normalize(pool(hidden_BLD, attention_mask, instruction_mask, pooling), dim=-1)


def seen(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The visual tokens of the inputs of :func:`embed` as arguments of the model; nothing where there are no pictures.

    They are made here, and not in the model's ``forward``, which would tell the vision tower what language models are
    told of attention.
    """
    tokens = visual_tokens(model, inputs)
    if tokens is None:
        return {}
    return {"mm_encoder_outputs": backbone_of(model.config).encoder_outputs(model.config, tokens)}


def visual_tokens(model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """The visual tokens of the inputs of :func:`embed`, ``[n, k, W]``; ``None`` where there are no pictures."""
    if (pixel_values := inputs.get("pixel_values")) is None:
        return inputs.get("visual_tokens")
    grids = inputs.get("grids")
    pairs = [] if grids is None else [(rows, columns) for rows, columns in grids.tolist()]
    return backbone_of(model.config).see(model, pixel_values, pairs)
