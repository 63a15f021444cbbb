"""What an embedder is, besides its weights: the part of ``quarterlight.json`` that changes embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from quarterlight.errors import CheckpointError, did_you_mean
from quarterlight.models.pooling import Attention, PoolingMode
from quarterlight.prompts import TARGET_INSTRUCTIONS, UNKNOWN_TARGET, Role, query_instruction


def default_instructions() -> dict[Role, dict[str, str]]:
    """Role -> modality (or ``page``, of documents) -> instruction of items for which nobody gives one."""
    return {
        "query": {modality: query_instruction(None, modality) for modality in UNKNOWN_TARGET},
        "document": dict(TARGET_INSTRUCTIONS),
    }


@dataclass(frozen=True, kw_only=True)
class EmbedderSettings:
    """How items are written, tiled, attended to and pooled. Saved with the weights, and part of the model's hash."""

    method: str = "magic-mm-embedding"
    """name of the recipe; for people"""
    pooling: PoolingMode = PoolingMode.LAST_TOKEN
    """which hidden states become the embedding"""
    attention: Attention = Attention.CAUSAL
    """what a token sees"""
    max_tiles: int = 1
    """the most tiles of a picture whose item does not say; a thumbnail is added to more than one"""
    text_max_tokens: int = 512
    """tokens of an item's text above which its end is cut off; the template and the pictures are never cut"""
    system_prompt: str = ""
    """a system turn before the user's; none when empty, as in InternVL3's -hf checkpoints"""
    instructions: Mapping[Role, Mapping[str, str]] = field(default_factory=default_instructions)
    """role -> modality -> instruction of items without one"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pooling", PoolingMode(self.pooling))
        object.__setattr__(self, "attention", Attention(self.attention))
        for name in ("max_tiles", "text_max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EmbedderSettings:
        """The inverse of :meth:`to_dict`. Raises CheckpointError for an unknown key or an impossible value."""
        known = [one.name for one in fields(cls)]
        for key in values:
            if key not in known:
                raise CheckpointError(f"quarterlight.json has an unknown setting {key!r}. {did_you_mean(key, known)}")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"quarterlight.json has an impossible setting: {error}") from error
