"""A multimodal language model as training sees it: inputs of sides of a batch in, embeddings out.

B rows, D columns of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quarterlight.models.backbones import backbone_of
from quarterlight.models.pooling import Attention, PoolingMode, embed
from quarterlight.models.shared_prefix import embed_shared_prefix
from quarterlight.training.distributed import world_size
from quarterlight.training.eyes import FrozenEyes, PictureKey


class PromptEmbedder(nn.Module):
    """A backbone as training sees it: inputs of sides of a batch in, embeddings of norm 1 of all rows out, ``[B, D]``.

    shared_prefix: reads what the rows of a side have in common once.  Not possible under gradient checkpointing, which
        allows no cache of keys and values, nor where weights are sharded: they are gathered for the backward pass of
        what a layer returns, and a cache is nothing that it returns.  Only the last token under causal attention has a
        beginning in common.
    pooling, attention: how hidden states become an embedding, as in the settings of the model that is made.
    eyes: tower and connector that are frozen, and what they have seen; the inputs then name pictures.

    ``Trainer`` saves a transformers model under the names of its published weights, but resumes it without translating
    them back: the language model of an InternVL would start anew without a word.  In here it keeps its names.
    """

    def __init__(
        self,
        backbone: nn.Module,
        shared_prefix: bool = True,
        *,
        pooling: PoolingMode = PoolingMode.LAST_TOKEN,
        attention: Attention = Attention.CAUSAL,
        eyes: FrozenEyes | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.attention = attention
        self.eyes = eyes
        self.shared_prefix = shared_prefix and (pooling, attention) == (PoolingMode.LAST_TOKEN, Attention.CAUSAL)
        self._no_split_modules = getattr(backbone, "_no_split_modules", None)  # where FSDP cuts

    def train(self, mode: bool = True) -> PromptEmbedder:
        """Of what is trained: frozen eyes stay as they are."""
        super().train(mode)
        if self.eyes is not None:
            self.eyes.rest()
        return self

    def forward(self, *sides: Mapping[str, Any]) -> Tensor:
        seen: dict[PictureKey, Tensor] = {}
        if self.eyes is not None:
            fresh = {key: one for inputs in sides for key, one in inputs.get("fresh", {}).items()}
            cut = {key: one for inputs in sides for key, one in inputs.get("cut", {}).items()}
            seen = self.eyes.look(fresh, cut)
        return torch.cat([self._embed(inputs, seen) for inputs in sides])

    def _embed(self, inputs: Mapping[str, Any], seen: Mapping[PictureKey, Tensor]) -> Tensor:
        blind = world_size() > 1 and self.eyes is None and "pixel_values" not in inputs
        nothing = backbone_of(self.backbone.config).blank(self.backbone) if blind else None
        names = ("input_ids", "attention_mask", "instruction_mask", "position_ids", "pixel_values", "grids")
        plain = {name: inputs[name] for name in names if name in inputs}
        if self.eyes is not None and "picture_keys" in inputs:
            like = next(self.backbone.parameters())
            plain["visual_tokens"] = self.eyes.tokens(inputs["picture_keys"], seen, like)
        if self.shared_prefix:
            embedding_BD = embed_shared_prefix(self.backbone, plain)
        else:
            embedding_BD = embed(self.backbone, plain, pooling=self.pooling, attention=self.attention)
        return embedding_BD if nothing is None else embedding_BD + nothing
