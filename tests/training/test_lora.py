"""LoRA in a backbone: nothing changes at first, then nothing but the adapter, and merging changes nothing either."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from quarterlight.errors import CheckpointError, RecipeError
from quarterlight.models.adapter import has_adapter
from quarterlight.models.checkpoint import load_backbone, load_settings
from quarterlight.models.embedder import Embedder
from quarterlight.models.internvl_vtc import InternVLVTCModel
from quarterlight.models.shapes import internvl3_config
from quarterlight.training.lora import LoraRecipe, add_lora, merge_lora

Inputs = dict[str, torch.Tensor]


@pytest.fixture
def backbone(tiny_checkpoint: Path) -> Any:
    return load_backbone(tiny_checkpoint)[0]


@pytest.fixture
def inputs(backbone: Any) -> Inputs:
    ids = [7, 8, *[backbone.config.image_token_id] * 8, 9, 10]
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)),
    }


def hidden(backbone: Any, inputs: Inputs) -> torch.Tensor:
    return backbone.eval()(**inputs, use_cache=False).last_hidden_state


def adapter(backbone: Any) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in backbone.named_parameters() if weight.requires_grad}


@torch.no_grad()
def fill(backbone: Any, std: float = 0.1) -> None:
    """Random B, so that the adapter does something."""
    generator = torch.Generator().manual_seed(3)
    for name, weight in adapter(backbone).items():
        if ".lora_B." in name:
            weight.normal_(std=std, generator=generator)


@torch.inference_mode()
def test_a_new_adapter_changes_nothing(backbone: Any, inputs: Inputs) -> None:
    before = hidden(backbone, inputs)
    state = torch.get_rng_state()
    add_lora(backbone, LoraRecipe(), seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(backbone) is InternVLVTCModel
    assert torch.equal(hidden(backbone, inputs), before)
    fill(backbone)
    assert (hidden(backbone, inputs) - before).abs().max() > 0.1


def test_seed(tiny_checkpoint: Path) -> None:
    drawn = []
    for seed in (0, 0, 1):
        backbone, _ = load_backbone(tiny_checkpoint)
        add_lora(backbone, LoraRecipe(), seed=seed)
        drawn.append(torch.cat([weight.flatten() for weight in adapter(backbone).values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# What others report for rank 16 on all linear layers of Qwen2.5-0.5B, -1.5B and -7B.
@pytest.mark.parametrize(("shape", "trained"), [("1B", 8_798_208), ("2B", 18_464_768), ("8B", 40_370_176)])
def test_number_of_trained_parameters(shape: str, trained: int) -> None:
    def count(recipe: LoraRecipe) -> int:
        with torch.device("meta"):
            backbone = InternVLVTCModel(internvl3_config(shape))
        add_lora(backbone, recipe, seed=0)
        assert all(name.startswith("language_model.") for name in adapter(backbone))
        return sum(weight.numel() for weight in adapter(backbone).values())

    assert count(LoraRecipe()) == trained
    if shape == "2B":
        assert count(LoraRecipe(rank=8)) == trained // 2
        assert count(LoraRecipe(targets=["q_proj"])) == 28 * 16 * (1536 + 1536)


def test_training_moves_the_adapter_and_nothing_else(tiny_checkpoint: Path, inputs: Inputs) -> None:
    model, _ = load_backbone(tiny_checkpoint, language_head=True)
    add_lora(model, LoraRecipe(), seed=0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW(adapter(model).values(), lr=0.01)
    model.train()
    for _ in range(2):  # B is zero at first, so that A has no gradient yet
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == set(adapter(model))
    assert len(moved) == 2 * 2 * 7  # A and B of seven linear layers in each of two blocks
    assert not model.lm_head.weight.requires_grad
    assert not any(weight.requires_grad for weight in model.model.vision_tower.parameters())
    assert not any(weight.requires_grad for weight in model.model.multi_modal_projector.parameters())


def test_gradient_checkpointing(backbone: Any, inputs: Inputs) -> None:
    add_lora(backbone, LoraRecipe(dropout=0), seed=0)
    fill(backbone)

    def gradients() -> dict[str, Any]:
        backbone.zero_grad()
        backbone.train()(**inputs).last_hidden_state.square().sum().backward()
        return {name: weight.grad for name, weight in adapter(backbone).items()}

    plain = gradients()
    backbone.activation_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


@torch.inference_mode()
def test_merged_weights_by_hand(backbone: Any, inputs: Inputs) -> None:
    names = list(backbone.state_dict())
    add_lora(backbone, LoraRecipe(rank=4, alpha=6), seed=0)
    fill(backbone)
    layer = backbone.language_model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight.numpy(), layer.lora_B["default"].weight.numpy()
    assert a.shape == (4, 32)
    expected = layer.base_layer.weight.numpy() + 6 / 4 * b @ a
    before = hidden(backbone, inputs)

    merge_lora(backbone)
    assert not has_adapter(backbone)
    assert list(backbone.state_dict()) == names
    assert all(weight.requires_grad for weight in backbone.parameters())
    np.testing.assert_allclose(backbone.language_model.layers[1].mlp.up_proj.weight.numpy(), expected, atol=1e-6)
    torch.testing.assert_close(hidden(backbone, inputs), before, rtol=1e-5, atol=1e-5)

    merged = hidden(backbone, inputs)
    merge_lora(backbone)  # of a model without an adapter: nothing
    add_lora(backbone, LoraRecipe(), seed=1)  # the next stage
    assert torch.equal(hidden(backbone, inputs), merged)


def test_adapters_of_half_precision_weights_are_float32(tiny_checkpoint: Path, inputs: Inputs) -> None:
    backbone, _ = load_backbone(tiny_checkpoint, dtype=torch.bfloat16)
    add_lora(backbone, LoraRecipe(), seed=0)
    assert {weight.dtype for weight in adapter(backbone).values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        output = hidden(backbone, inputs)
    output.float().square().sum().backward()
    assert all(weight.grad is not None for weight in adapter(backbone).values())
    merge_lora(backbone)
    assert {weight.dtype for weight in backbone.parameters()} == {torch.bfloat16}


def test_embedder_around_a_model_in_training(tiny_checkpoint: Path, picture: Callable[..., Image.Image]) -> None:
    """Validation embeds with the adapter inside, the shared prefix of the prompts computed once."""
    backbone, processor = load_backbone(tiny_checkpoint)
    embedder = Embedder.from_model(backbone, processor, load_settings(tiny_checkpoint))
    items: list[Any] = ["a red apple", picture(0), {"text": "sliced", "image": picture(1)}]
    before = embedder.encode_query(items)
    add_lora(backbone, LoraRecipe(), seed=0)
    fill(backbone)
    backbone.eval()
    inside = embedder.encode_query(items)
    merge_lora(backbone)
    np.testing.assert_allclose(embedder.encode_query(items), inside, rtol=0, atol=1e-5)
    assert np.abs(inside - before).max() > 0.01


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"targets": []}, "targets must be a list"),
        ({"targets": "q_proj"}, "targets must be a list"),
    ],
)
def test_impossible_recipes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        LoraRecipe(**values)


def test_errors(backbone: Any) -> None:
    with pytest.raises(RecipeError, match=r"no linear layer 'qproj'\. Did you mean 'q_proj'"):
        add_lora(backbone, LoraRecipe(targets=["v_proj", "qproj"]), seed=0)
    assert not has_adapter(backbone)
    add_lora(backbone, LoraRecipe(), seed=0)
    with torch.no_grad():
        next(iter(adapter(backbone).values()))[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"adapter of .*q_proj cannot be merged: its weights are not numbers"):
        merge_lora(backbone)
