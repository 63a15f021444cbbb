"""Rows that begin alike are read alike: their common beginning goes through the language model once.

A batch of one task shares its system prompt, instruction and labels, most of a short text's tokens.  Under causal
attention the hidden states of a beginning do not depend on what follows, so one row's keys and values serve all.

B rows, L tokens, D columns; P tokens in common.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from quarterlight.models.backbones import backbone_of
from quarterlight.models.pooling import PoolingMode, pool, visual_tokens


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


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """A common beginning as the layers of a language model know it.

    cache: its keys and values; what is read behind it leaves them as they are.
    """

    num_tokens: int
    cache: DynamicCache

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        layers: list[Any] = self.cache.layers
        return sum(int(one.nbytes) for layer in layers for one in (layer.keys, layer.values))


class _Beginning(DynamicLayer):
    """The keys and values of one row, which stand before those of every row for as long as a layer looks at them.

    An ordinary cache keeps those of all rows until all layers are through, for a next token that does not come.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        rows = len(key_states)
        keys, values = (one.expand(rows, -1, -1, -1) for one in (self.keys, self.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def can_share(model: Any) -> bool:
    """Whether every layer sees all tokens before: behind a window, a beginning would have to be cut."""
    layer_types = getattr(model.config.text_config, "layer_types", None) or ()
    return all(one == "full_attention" for one in layer_types)


def read_prefix(model: Any, inputs: Mapping[str, Any], num_tokens: int) -> Prefix:
    """The first tokens of the first row, of which none may belong to a picture."""
    cache: Any = DynamicCache(config=model.config.text_config)
    position_ids = inputs.get("position_ids")
    model.language_model(
        inputs_embeds=model.get_input_embeddings()(inputs["input_ids"][:1, :num_tokens]),
        position_ids=None if position_ids is None else position_ids[:, :1, :num_tokens],
        past_key_values=cache,
        use_cache=True,
        is_causal=True,
    )
    if can_share(model):
        cache.layers = [_Beginning(layer) for layer in cache.layers]
    return Prefix(num_tokens=num_tokens, cache=cache)


def embed_after(model: Any, inputs: Mapping[str, Any], prefix: Prefix | None) -> Tensor:
    """What :func:`quarterlight.models.pooling.embed` gives for the last token under causal attention, ``[B, D]``, of
    rows that all begin with ``prefix`` and go on after it.

    inputs: right-padded ``input_ids``, ``attention_mask`` and the rest of what that function reads, whole.
    """
    P = 0 if prefix is None else prefix.num_tokens
    input_ids, mask = inputs["input_ids"][:, P:], inputs["attention_mask"][:, P:]
    position_ids = inputs.get("position_ids")
    embeds = model.get_input_embeddings()(input_ids)
    more: dict[str, Any] = {}
    if (tokens := visual_tokens(model, inputs)) is not None:  # all pictures are behind the beginning
        embeds, more = backbone_of(model.config).place(model, input_ids, embeds, tokens)
    cache = None
    if prefix is not None:
        cache = prefix.cache if can_share(model) else repeated(prefix.cache, len(embeds))
    hidden_BLD = model.language_model(
        inputs_embeds=embeds,
        position_ids=None if position_ids is None else position_ids[:, :, P:],
        past_key_values=cache,
        use_cache=P > 0,
        is_causal=True,
        **more,
    ).last_hidden_state
    return nn.functional.normalize(pool(hidden_BLD, mask, torch.zeros_like(mask), PoolingMode.LAST_TOKEN), dim=-1)


def embed_shared_prefix(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """:func:`embed_after` of whatever the rows turn out to have in common.

    Gradients reach the shared beginning from every row.
    """
    P = common_prefix(inputs["input_ids"], inputs["attention_mask"], model.config.image_token_id)
    return embed_after(model, inputs, read_prefix(model, inputs, P) if P else None)
