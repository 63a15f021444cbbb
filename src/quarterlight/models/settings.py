"""What embedders and rerankers are, besides their weights: the part of ``quarterlight.json`` that changes results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from quarterlight.errors import CheckpointError, did_you_mean
from quarterlight.models.pooling import Attention, PoolingMode
from quarterlight.models.positions import Positions
from quarterlight.prompts import TARGET_INSTRUCTIONS, UNKNOWN_TARGET, PromptStyle, Role, query_instruction


def default_instructions() -> dict[Role, dict[str, str]]:
    """Role -> modality (or ``page``, of documents) -> instruction of items for which nobody gives one."""
    return {
        "query": {modality: query_instruction(None, modality) for modality in UNKNOWN_TARGET},
        "document": dict(TARGET_INSTRUCTIONS),
    }


MAX_PIXELS = 300 * 28 * 28
"""Of a picture, for Qwen-VL: 300 visual tokens of 28 x 28 pixels before compression (U-MARVEL)."""

TEXT_MAX_TOKENS = 512
"""Of an item's text."""

_S = TypeVar("_S", bound="_Settings")


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What both have in common."""

    method: str = "magic-mm-embedding"
    """name of the recipe; for people"""
    max_tiles: int = 1
    """the most tiles of a picture whose item does not say; a thumbnail is added to more than one"""
    max_pixels: int = MAX_PIXELS
    """for Qwen-VL: the most pixels of a picture, for each of its max_tiles, so that a page of four tiles has four times
    as many; 28 x 28 (Qwen3-VL: 32 x 32) are a visual token before compression"""
    positions: Positions = Positions.MROPE
    """for Qwen-VL: where visual tokens stand"""
    text_max_tokens: int = TEXT_MAX_TOKENS
    """tokens of an item's text above which its end is cut off; the template and the pictures are never cut"""
    system_prompt: str = ""
    """a system turn before the user's; none when empty, as in InternVL3's -hf checkpoints"""

    def __post_init__(self) -> None:
        for name in ("max_tiles", "max_pixels", "text_max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        object.__setattr__(self, "positions", Positions(self.positions))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[_S], values: Mapping[str, Any]) -> _S:
        """The inverse of :meth:`to_dict`. Raises CheckpointError for an unknown key or an impossible value."""
        known = [one.name for one in fields(cls)]
        for key in values:
            if key not in known:
                raise CheckpointError(f"quarterlight.json has an unknown setting {key!r}. {did_you_mean(key, known)}")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"quarterlight.json has an impossible setting: {error}") from error


@dataclass(frozen=True, kw_only=True)
class EmbedderSettings(_Settings):
    """How items are written, tiled, attended to and pooled. Saved with the weights, and part of the model's hash."""

    pooling: PoolingMode = PoolingMode.LAST_TOKEN
    """which hidden states become the embedding"""
    attention: Attention = Attention.CAUSAL
    """what a token sees"""
    instructions: Mapping[Role, Mapping[str, str]] = field(default_factory=default_instructions)
    """role -> modality -> instruction of items without one"""
    prompt_style: PromptStyle = PromptStyle.MAGIC
    """whose template"""
    pool_frame: bool = True
    """whether a mean counts the tokens of the template (system turn, roles, labels, ``<emb>.``) as U-MARVEL's does; one
    that does not is beyond the stock modules of sentence-transformers, for which such a model is not saved"""

    LATER: ClassVar[tuple[str, ...]] = ("prompt_style", "pool_frame", "max_pixels", "positions")
    """settings that models saved by earlier versions do not name"""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "prompt_style", PromptStyle(self.prompt_style))
        object.__setattr__(self, "pooling", PoolingMode(self.pooling))
        object.__setattr__(self, "attention", Attention(self.attention))

    @property
    def marked(self) -> bool:
        """Whether instructions stand between markers, so that the tokenizer must have them: in U-MARVEL's style, and
        wherever a mean leaves the instruction out."""
        return self.prompt_style is PromptStyle.U_MARVEL or self.pooling is PoolingMode.MEAN

    def what_matters(self) -> dict[str, Any]:
        """The settings that change an embedding, for hashes; a later one is among them where it is in use, so that the
        hash of an older model stays what it was."""
        values = self.to_dict()
        defaults = EmbedderSettings().to_dict()
        unused = {name for name in self.LATER if values[name] == defaults[name]}
        return {name: value for name, value in values.items() if name not in {"method", *unused}}


@dataclass(frozen=True, kw_only=True)
class RerankerSettings(_Settings):
    """How queries and candidates are written and tiled for a reranker."""

    instructions: Mapping[str, str] = field(default_factory=lambda: default_instructions()["query"])
    """modality of a query -> its instruction, where nobody gives one"""
    fusion_weight: float = 1.0
    """of the reranker's score in a search, that of the cosine being the rest; 1 ranks by the reranker alone"""
    fusion_weights: Mapping[str, float] = field(default_factory=dict)
    """``dataset/task``, or ``task`` for searches and for the datasets without one -> the same for it, in place of
    ``fusion_weight``"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.fusion_weight <= 1:
            raise ValueError(f"fusion_weight must be from 0 to 1, got {self.fusion_weight}.")
        for name, weight in self.fusion_weights.items():
            if not 0 <= weight <= 1:
                raise ValueError(f"fusion_weights must be from 0 to 1, got {weight} for {name!r}.")

    def weight_of(self, task: str | None, dataset: str | None = None) -> float:
        """The weight for a task, by its name and that of its dataset; ``None`` where they are not known.

        >>> settings = RerankerSettings(fusion_weight=0.5, fusion_weights={"t2i": 0.3, "mscoco/t2i": 0.1})
        >>> [settings.weight_of("t2i", "mscoco"), settings.weight_of("t2i"), settings.weight_of("i2t", "mscoco")]
        [0.1, 0.3, 0.5]
        """
        for name in (f"{dataset}/{task}", str(task)):
            if name in self.fusion_weights:
                return self.fusion_weights[name]
        return self.fusion_weight
