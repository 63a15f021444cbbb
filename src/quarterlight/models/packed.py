"""Rows of a batch one after the other in a single sequence, without padding, and blind to each other.

B rows, L tokens of the longest, N tokens of all rows, D columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quarterlight.models.pooling import Attention, PoolingMode, pool, seen


def embed_packed(model: Any, inputs: Mapping[str, Any], *, pooling: PoolingMode, attention: Attention) -> Tensor:
    """What :func:`quarterlight.models.pooling.embed` gives of the same inputs, ``[B, D]``, computed without padding.

    Positions start again with each row, and an explicit mask keeps attention within a row, of which it is a block on
    the diagonal.  All of the N x N scores are worked out: this pays where rows differ a lot in length and are so short
    that their attention costs little beside the rest of a layer.  Needs the ``sdpa`` or the ``eager`` implementation.
    """
    attention_mask, instruction_mask = inputs["attention_mask"], inputs["instruction_mask"]
    real_BL = attention_mask.bool()
    if (position_ids := inputs.get("position_ids")) is None:
        position_ids = torch.arange(real_BL.shape[1], device=real_BL.device).expand_as(real_BL)
    hidden_1ND = model(
        input_ids=inputs["input_ids"][real_BL][None],
        position_ids=position_ids[..., real_BL].unsqueeze(-2),
        attention_mask=block_mask(real_BL, attention, model),
        use_cache=False,
        **seen(model, inputs),
    ).last_hidden_state
    hidden_BLD = hidden_1ND.new_zeros(*real_BL.shape, hidden_1ND.shape[-1])
    hidden_BLD[real_BL] = hidden_1ND[0]
    return nn.functional.normalize(pool(hidden_BLD, attention_mask, instruction_mask, pooling), dim=-1)


def block_mask(real_BL: Tensor, attention: Attention, model: Any) -> Tensor:
    """Which of N tokens a token may look at, ``[1, 1, N, N]``: those of its row, or those of them before it."""
    row_N = real_BL.nonzero()[:, 0]
    allowed_NN = row_N[:, None] == row_N
    if attention is Attention.CAUSAL:
        allowed_NN = allowed_NN.tril()
    if model.config.text_config._attn_implementation != "eager":
        return allowed_NN[None, None]
    forbidden = torch.finfo(model.dtype).min
    return torch.zeros_like(allowed_NN, dtype=model.dtype).masked_fill(~allowed_NN, forbidden)[None, None]
