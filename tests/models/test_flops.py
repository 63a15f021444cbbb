"""The formulas against what PyTorch counts, on real shapes without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.qwen import QWEN, plain_qwen
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel
from transformers.initialization import no_init_weights

from quarterlight.models.backbones import backbone_of
from quarterlight.models.checkpoint import load_backbone
from quarterlight.models.flops import attention_flop, text_flop, tower_tokens, vision_flop
from quarterlight.models.shapes import internvl3_config


@pytest.mark.parametrize(("shape", "compression"), [("1B", 2), ("2B", 1), ("8B", 2)])
def test_flops_are_those_that_pytorch_counts(shape: str, compression: int) -> None:
    config = internvl3_config(shape, visual_token_compression=compression)
    config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers = 3, 2  # sums over equal layers
    with no_init_weights(), torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
        pixels = torch.empty(2, 3, 448, 448, dtype=torch.bfloat16)
        embedded = torch.empty(1, 100, config.text_config.hidden_size, dtype=torch.bfloat16)
        with torch.no_grad(), FlopCounterMode(display=False) as vision:
            model.get_image_features(pixels)
        with torch.no_grad(), FlopCounterMode(display=False) as text:
            model.language_model(inputs_embeds=embedded, attention_mask=torch.ones(1, 100, dtype=torch.int64))
    assert vision.get_total_flops() == pytest.approx(vision_flop(config, 2), rel=1e-3)
    # eager attention works out both halves of the square
    assert text.get_total_flops() == pytest.approx(text_flop(config, 100) + attention_flop(config, 100), rel=1e-3)


def test_a_tile_has_its_patches_and_a_cls_token() -> None:
    assert tower_tokens(internvl3_config("2B")) == 32 * 32 + 1


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("grid", [(4, 6), (8, 8)])
def test_flops_of_qwen_are_those_that_pytorch_counts(
    family: str, grid: tuple[int, int], tmp_path: Path, tokenizer: Any
) -> None:
    """On a small model, whose pictures and windows need real numbers."""
    model, _ = load_backbone(plain_qwen(family, tmp_path, tokenizer), visual_token_compression=2)
    model.set_attn_implementation("eager")
    tiles = grid[0] * grid[1]
    pixels = torch.zeros(4 * tiles, 3 * 2 * 4 * 4)
    embedded = torch.zeros(1, 50, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as vision:
        backbone_of(model.config).see(model, pixels, [grid])
    with torch.no_grad(), FlopCounterMode(display=False) as text:
        model.language_model(inputs_embeds=embedded)
    counted = vision.get_total_flops()
    assert counted == pytest.approx(vision_flop(model.config, tiles), rel=1e-2)
    rotary = 2 * 50 * 4  # the angles of positions are a product too
    expected = text_flop(model.config, 50) + attention_flop(model.config, 50)
    assert text.get_total_flops() == pytest.approx(expected, rel=5e-3, abs=3 * rotary)
    with torch.no_grad(), FlopCounterMode(display=False) as apart:
        backbone_of(model.config).see(model, torch.cat([pixels, pixels]), [grid, grid])
    assert apart.get_total_flops() == pytest.approx(vision_flop(model.config, 2 * tiles, tiles), rel=1e-2)
