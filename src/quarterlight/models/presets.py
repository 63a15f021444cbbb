"""Weights that others released: how they were trained to read and pool, which their folders do not say.

The embedders of U-MARVEL (arXiv:2507.14902; code at github.com/chaxjli/U-MARVEL) are published as folders of a plain
Qwen-VL.  What makes embedders of them is in the code that trained them: attention, pooling, prompts, and three special
tokens that it adds whenever it loads a model, with embeddings drawn anew each time.  Here they are drawn from a seed,
so that a query has the same embedding tomorrow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quarterlight.errors import CheckpointError, did_you_mean
from quarterlight.models.checkpoint import read_description
from quarterlight.models.pooling import Attention, PoolingMode
from quarterlight.models.positions import Positions
from quarterlight.models.settings import EmbedderSettings, default_instructions
from quarterlight.prompts import PromptStyle


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a folder of released weights leaves out."""

    hub_id: str
    """where they are published"""
    model_type: str
    """that the folder's config.json must name"""
    settings: EmbedderSettings
    """how the model reads and pools"""
    marker_seed: int = 0
    """of the embeddings of the markers, which are added where they are missing"""
    tower: Mapping[str, Any] = field(default_factory=dict)
    """settings of the vision tower that replace those of the folder"""
    temperature: str | None = None
    """name of the weight that is the temperature of the last training, by which cosines were divided; a model does
    without it, another stage may begin with it"""


def _u_marvel(hub_id: str, model_type: str, *, system_prompt: str = "", **changes: Any) -> Preset:
    return Preset(
        hub_id=hub_id,
        model_type=model_type,
        temperature="sim.temp",
        settings=EmbedderSettings(
            method="u-marvel",
            pooling=PoolingMode.MEAN,
            attention=Attention.BIDIRECTIONAL,
            prompt_style=PromptStyle.U_MARVEL,
            system_prompt=system_prompt,
            text_max_tokens=480,
            max_pixels=300 * 28 * 28,
            positions=Positions.SEQUENTIAL,
            # The first of M-BEIR's, with which the weights were trained: MSCOCO, NIGHTS and CIRR, where pictures are
            # searched for. A candidate has none.
            instructions=default_instructions()
            | {
                "query": {
                    "text": "Find me an everyday image that matches the given caption.",
                    "image": "Find a day-to-day image that looks similar to the provided image.",
                    "image,text": (
                        "Retrieve a day-to-day image that aligns with the modification instructions of the provided "
                        "image."
                    ),
                }
            },
        ),
        **changes,
    )


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "u-marvel-qwen2vl-7b": _u_marvel(
            "TencentBAC/U-MARVEL-Qwen2VL-7B-Instruct", "qwen2_vl", system_prompt="You are a helpful assistant."
        ),
        # The chat template of Qwen3-VL has no system turn of its own. The code that trained these weights works out the
        # features of DeepStack and drops them, so the language model has never seen any.
        "u-marvel-qwen3vl-4b": _u_marvel(
            "TencentBAC/U-MARVEL-Qwen3VL-4B-Instruct", "qwen3_vl", tower={"deepstack_visual_indexes": []}
        ),
    }
)
"""Name -> preset."""


def preset_of(model: str | os.PathLike[str], folder: Path, name: str | None = None) -> Preset | None:
    """The preset of a model: the one of that name, or the one whose hub id ends as the model's name does.

    model: as it was asked for, a hub id or a folder.  folder: where it is.  Any other model has none, nor has one that
    this package saved, under whatever name, because its folder says all.
    Raises CheckpointError for an unknown name, for one given with such a folder, and for a folder of another kind.
    """
    ours = bool(read_description(folder))
    if name is None:
        called = Path(model).name
        found = [one for one in PRESETS.values() if called == one.hub_id.rpartition("/")[2]]
        if ours or not found:
            return None
        preset = found[0]
    elif name not in PRESETS:
        raise CheckpointError(f"There is no preset {name!r} of released weights. {did_you_mean(name, PRESETS)}")
    elif ours:
        raise CheckpointError(f"{folder} says in quarterlight.json how it embeds: leave out the preset {name!r}.")
    else:
        preset = PRESETS[name]
    model_type = str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    if model_type != preset.model_type:
        raise CheckpointError(
            f"{folder} holds a {model_type!r} model, but the preset for {preset.hub_id} is for {preset.model_type!r}: "
            "leave the preset out, or name another."
        )
    return preset
