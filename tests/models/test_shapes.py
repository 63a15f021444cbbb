"""InternVL3's sizes, by their published number of parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from quarterlight.errors import InputError
from quarterlight.models import shapes
from quarterlight.models.internvl_vtc import InternVLVTCConfig
from quarterlight.models.shapes import QWEN_SHAPES, SHAPES, build_random, internvl3_config, shape_config

PARAMETERS = {"1B": 0.938e9, "2B": 2.09e9, "8B": 7.94e9, "14B": 15.1e9}  # as the model cards of InternVL3 say


QWEN_PARAMETERS = {  # of the files on the hub
    "Qwen2-VL-2B": 2_208_985_600,
    "Qwen2-VL-7B": 8_291_375_616,
    "Qwen2.5-VL-7B": 8_292_166_656,
    "Qwen3-VL-4B": 4_437_815_808,
    "Qwen3-VL-8B": 8_767_123_696,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_number_of_parameters(shape: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(internvl3_config(shape))
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(PARAMETERS[shape], rel=2e-3)


@pytest.mark.parametrize("shape", QWEN_SHAPES)
def test_number_of_parameters_of_qwen(shape: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shape_config(shape, visual_token_compression=2))
    assert sum(weight.numel() for weight in model.parameters()) == QWEN_PARAMETERS[shape]
    assert model.config.visual_token_compression == 2


def test_unknown_qwen_shapes_name_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no Qwen-VL shape 'Qwen2-VL-3B'.*Qwen2-VL-2B"):
        shape_config("Qwen2-VL-3B")


def test_tokens_of_a_tile() -> None:
    assert [internvl3_config("2B", visual_token_compression=s).image_seq_length for s in (1, 2, 4)] == [256, 64, 16]
    with pytest.raises(InputError, match="no InternVL3 shape '3B'"):
        internvl3_config("3B")


def test_build_random(monkeypatch: pytest.MonkeyPatch, tiny_values: dict[str, Any]) -> None:
    monkeypatch.setattr(shapes, "internvl3_config", lambda _, **more: InternVLVTCConfig(**tiny_values, **more))
    one, same, other = (build_random("tiny", dtype=torch.bfloat16, seed=seed) for seed in (0, 0, 1))
    assert not one.training
    assert {weight.dtype for weight in one.parameters()} == {torch.bfloat16}
    assert one.language_model.rotary_emb.inv_freq.dtype == torch.float32
    for (name, first), second in zip(one.named_parameters(), same.parameters(), strict=True):
        assert torch.isfinite(first).all(), name
        assert torch.equal(first, second), name
    assert not torch.equal(one.language_model.embed_tokens.weight, other.language_model.embed_tokens.weight)
    with torch.inference_mode():
        hidden = one(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state
    assert torch.isfinite(hidden).all()
    assert hidden.float().std() > 0.1


def test_fewer_layers(monkeypatch: pytest.MonkeyPatch, tiny_values: dict[str, Any]) -> None:
    monkeypatch.setattr(shapes, "internvl3_config", lambda _, **more: InternVLVTCConfig(**tiny_values, **more))
    model = build_random("tiny", dtype=torch.float32, max_layers=1)
    assert len(model.vision_tower.encoder.layer) == len(model.language_model.layers) == 1
    model(torch.zeros(1, 4, dtype=torch.int64))
