"""The configurations of Qwen-VL with compression: those of transformers, s, and where visual tokens stand."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig

from quarterlight.models.merging import MERGING
from quarterlight.models.positions import Positions

FACTORS = (1, 2)
"""The values that s may take."""


def _check(config: Any) -> None:
    if config.visual_token_compression not in FACTORS:
        raise ValueError(f"visual_token_compression must be one of {FACTORS}, got {config.visual_token_compression}.")
    if getattr(config, MERGING, 0):
        raise ValueError(
            f"{MERGING} is for InternVL, whose tiles all have the same number of patches: a Qwen-VL cannot merge them "
            f"in its tower yet, got {getattr(config, MERGING)}. Leave it out, or at 0."
        )
    if config.positions not in list(Positions):
        raise ValueError(f"positions must be one of {[*map(str, Positions)]}, got {config.positions!r}.")


@strict
class Qwen2VLVTCConfig(Qwen2VLConfig):
    """Qwen2-VL's configuration with s and :class:`quarterlight.models.positions.Positions`.

    ``visual_token_compression`` shrinks the grid of merged patches, so that a picture costs a quarter of its tokens at
    s = 2; 1 leaves the backbone as it was.  ``masked_instruction``: see
    :mod:`quarterlight.models.masked_instruction`.  Raises ValueError for another s or unknown positions.
    """

    model_type = "qwen2_vl_vtc"

    visual_token_compression: int = 1
    positions: str = "mrope"
    masked_instruction: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check(self)


@strict
class Qwen2_5VLVTCConfig(Qwen2_5_VLConfig):
    """The same of Qwen2.5-VL."""

    model_type = "qwen2_5_vl_vtc"

    visual_token_compression: int = 1
    positions: str = "mrope"
    masked_instruction: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check(self)


@strict
class Qwen3VLVTCConfig(Qwen3VLConfig):
    """The same of Qwen3-VL."""

    model_type = "qwen3_vl_vtc"

    visual_token_compression: int = 1
    positions: str = "mrope"
    masked_instruction: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check(self)
