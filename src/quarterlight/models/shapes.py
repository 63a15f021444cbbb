"""The sizes of published models, buildable with random weights and without a network, for plans and benchmarks.

Sizes as in the ``config.json`` of OpenGVLab/InternVL3-{1B,2B,8B,14B}-hf: InternViT-300M and a Qwen2.5 language model;
and of Qwen/Qwen2-VL-{2B,7B}-Instruct, Qwen/Qwen2.5-VL-7B-Instruct and Qwen/Qwen3-VL-{4B,8B}-Instruct.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from quarterlight.errors import InputError, did_you_mean
from quarterlight.models.backbones import FAMILIES
from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig


@dataclass(frozen=True, kw_only=True)
class LanguageShape:
    """A Qwen2.5 language model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


SHAPES = MappingProxyType(
    {
        "1B": LanguageShape(  # Qwen2.5-0.5B
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
        ),
        "2B": LanguageShape(  # Qwen2.5-1.5B
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
        ),
        "8B": LanguageShape(  # Qwen2.5-7B
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
        ),
        "14B": LanguageShape(  # Qwen2.5-14B
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=48,
            num_attention_heads=40,
            num_key_value_heads=8,
        ),
    }
)
"""Name of an InternVL3 -> its language model; the vision tower is the same in all."""


_QWEN2_EYES = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14}
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_MROPE3 = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}


@dataclass(frozen=True, kw_only=True)
class QwenShape:
    """A Qwen-VL. model_type: ours.  vision: of its tower's configuration.  text: of its language model's."""

    model_type: str
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    tied: bool = False
    """whether the language head has the weights of the embeddings"""


QWEN_SHAPES = MappingProxyType(
    {
        "Qwen2-VL-2B": QwenShape(
            model_type="qwen2_vl_vtc",
            vision={**_QWEN2_EYES, "hidden_size": 1536},
            text={**vars(SHAPES["2B"]), "vocab_size": 151_936, "rope_parameters": _MROPE},
            tied=True,
        ),
        "Qwen2-VL-7B": QwenShape(
            model_type="qwen2_vl_vtc",
            vision={**_QWEN2_EYES, "hidden_size": 3584},
            text={**vars(SHAPES["8B"]), "vocab_size": 152_064, "rope_parameters": _MROPE},
        ),
        "Qwen2.5-VL-7B": QwenShape(
            model_type="qwen2_5_vl_vtc",
            vision={
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
                "patch_size": 14,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
            text={**vars(SHAPES["8B"]), "vocab_size": 152_064, "rope_parameters": _MROPE},
        ),
        "Qwen3-VL-4B": QwenShape(
            model_type="qwen3_vl_vtc",
            vision={
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_heads": 16,
                "out_hidden_size": 2560,
                "patch_size": 16,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [5, 11, 17],
            },
            text={
                "hidden_size": 2560,
                "intermediate_size": 9728,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 151_936,
                "rope_parameters": _MROPE3,
            },
            tied=True,
        ),
        "Qwen3-VL-8B": QwenShape(
            model_type="qwen3_vl_vtc",
            vision={
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "out_hidden_size": 4096,
                "patch_size": 16,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [8, 16, 24],
            },
            text={
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 151_936,
                "rope_parameters": _MROPE3,
            },
        ),
    }
)
"""Name of a Qwen-VL -> its sizes."""

_NOISE = 1 << 20  # numbers drawn for one weight


def internvl3_config(shape: str, *, visual_token_compression: int = 1) -> InternVLVTCConfig:
    """The configuration of an InternVL3 by name. Raises InputError for an unknown name."""
    if shape not in SHAPES:
        raise InputError(f"There is no InternVL3 shape {shape!r}. {did_you_mean(shape, SHAPES)}")
    return InternVLVTCConfig(
        vision_config={
            "model_type": "internvl_vision",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "attention_bias": True,
            "image_size": [448, 448],
            "patch_size": [14, 14],
        },
        text_config={
            "model_type": "qwen2",
            **vars(SHAPES[shape]),
            "vocab_size": 151_674,
            "max_position_embeddings": 32_768,
            "rope_theta": 1_000_000.0,
            "tie_word_embeddings": False,
        },
        tie_word_embeddings=False,
        image_token_id=151_667,
        visual_token_compression=visual_token_compression,
    )


def shape_config(shape: str, *, visual_token_compression: int = 1) -> Any:
    """The configuration of a published model by name: ``2B`` of InternVL3, ``Qwen2-VL-2B``.

    Raises InputError for an unknown name.
    """
    if shape not in QWEN_SHAPES:
        if shape in SHAPES or "VL" not in shape:
            return internvl3_config(shape, visual_token_compression=visual_token_compression)
        raise InputError(f"There is no Qwen-VL shape {shape!r}. {did_you_mean(shape, QWEN_SHAPES)}")
    sizes = QWEN_SHAPES[shape]
    family = FAMILIES[sizes.model_type]
    return family.load(family.config)(
        vision_config=dict(sizes.vision),
        text_config={**sizes.text, "max_position_embeddings": 32_768, "tie_word_embeddings": sizes.tied},
        tie_word_embeddings=sizes.tied,
        visual_token_compression=visual_token_compression,
    )


def build_random(
    shape: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    visual_token_compression: int = 1,
    device: str | torch.device = "cpu",
    language_head: bool = False,
    max_layers: int | None = None,
    seed: int = 0,
) -> Any:
    """A model of a published one's size with random weights, in ``eval`` mode.

    The weights are made in ``dtype`` and filled in place, so that no more memory is needed than they take.
    language_head: adds the head that writes words, which embedding does without.
    max_layers: cuts vision tower and language model off after so many layers; ``None`` keeps all.
    """
    config = shape_config(shape, visual_token_compression=visual_token_compression)
    if max_layers is not None:
        parts: tuple[Any, ...] = (config.vision_config, config.text_config)
        for part in parts:
            part.num_hidden_layers = min(max_layers, part.num_hidden_layers)
        parts[1].layer_types = parts[1].layer_types[:max_layers]
    auto = AutoModelForImageTextToText if language_head else AutoModel
    with no_init_weights(), torch.device(device):
        model = auto.from_config(config, dtype=dtype)
    _fill(model, torch.Generator(device).manual_seed(seed))
    return model.eval()


@torch.no_grad()
def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Norms and layer scales become 1, biases 0, all else N(0, 0.02^2), from one block of noise that is used again and
    again: drawing billions of numbers would take longer than the benchmark."""
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        elif weight.ndim == 1:
            weight.fill_(1.0)
        else:
            flat = weight.view(-1)
            noise = 0.02 * torch.randn(min(flat.numel(), _NOISE), generator=generator, device=weight.device)
            for chunk in flat.split(_NOISE):
                chunk.copy_(noise[: chunk.numel()])
