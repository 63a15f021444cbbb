"""Rows that begin alike are read alike: their common beginning goes through the language model once.

A batch of one task shares its system prompt, instruction and labels, most of a short text's tokens.  Under causal
attention the hidden states of a beginning do not depend on what follows, so one row's keys and values serve all.

B rows, L tokens, D columns; P tokens in common.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from quarterlight.models.pooling import PoolingMode, pool


def common_prefix(input_ids_BL: Tensor, attention_mask_BL: Tensor, image_token_id: int) -> int:
    """How many leading tokens all rows share, up to the first picture and short of every row's last token."""
    alike_L = (input_ids_BL == input_ids_BL[:1]).all(dim=0) & (input_ids_BL[0] != image_token_id)
    limit = int(attention_mask_BL.sum(dim=1).min()) - 1
    return min(limit, int(alike_L.long().cumprod(dim=0).sum()))


def repeated(cache: DynamicCache, rows: int) -> DynamicCache:
    """A cache that begins, in each of so many rows, as one of a single row; what it takes up, that one does not see."""
    branch = copy.copy(cache)
    layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
    branch.layers = layers
    for layer in layers:
        layer.keys, layer.values = (one.expand(rows, -1, -1, -1) for one in (layer.keys, layer.values))
    return branch


def embed_shared_prefix(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """What :func:`quarterlight.models.pooling.embed` gives for the last token under causal attention, ``[B, D]``.

    inputs: right-padded ``input_ids``, ``attention_mask`` and, where there are pictures, ``pixel_values`` or
        ``mm_encoder_outputs``.
    Gradients reach the shared beginning from every row.
    """
    input_ids, mask = inputs["input_ids"], inputs["attention_mask"]
    image_token_id = model.config.image_token_id
    embeds = model.get_input_embeddings()(input_ids)
    features: Tensor | None = None
    if (seen := inputs.get("mm_encoder_outputs")) is not None:
        features = seen["image"].pooler_output
    elif (pixel_values := inputs.get("pixel_values")) is not None:
        features = model.get_image_features(pixel_values).pooler_output
    if features is not None:
        slots = model.get_placeholder_mask(input_ids, embeds, features)  # checks that they are as many
        embeds = embeds.masked_scatter(slots, features.to(embeds.dtype))
    P = common_prefix(input_ids, mask, image_token_id)
    cache: Any = None
    if P:
        alone: Any = DynamicCache(config=model.config.text_config)
        model.language_model(inputs_embeds=embeds[:1, :P], past_key_values=alone, use_cache=True)
        cache = repeated(alone, len(embeds))
    hidden_BLD = model.language_model(
        inputs_embeds=embeds[:, P:], past_key_values=cache, use_cache=P > 0
    ).last_hidden_state
    pooled = pool(hidden_BLD, mask[:, P:], torch.zeros_like(mask[:, P:]), PoolingMode.LAST_TOKEN)
    return nn.functional.normalize(pooled, dim=-1)
