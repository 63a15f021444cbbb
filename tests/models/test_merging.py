"""Merging inside the vision tower: known answers, and that none of it is the model that was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.models.qwen import QWEN, plain_qwen
from torch.utils.flop_counter import FlopCounterMode
from transformers import InternVLConfig, InternVLModel

from quarterlight.errors import CheckpointError
from quarterlight.losses.info_nce import info_nce
from quarterlight.models.backbones import backbone_of
from quarterlight.models.checkpoint import load_backbone, load_config, load_settings, save_checkpoint
from quarterlight.models.embedder import Embedder
from quarterlight.models.flops import vision_flop
from quarterlight.models.inputs import InputFormatter
from quarterlight.models.internvl_vtc import InternVLVTCConfig, InternVLVTCModel
from quarterlight.models.merging import Merged, lengths, merges, most_similar, turning_order
from quarterlight.records import Item
from quarterlight.training.optimizer import recompute_activations
from quarterlight.training.prompt_embedder import PromptEmbedder

MakePicture = Callable[..., Image.Image]


def features(tiles: int = 3, patches: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tiles, patches, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)


def deep(tiny_values: dict[str, Any], num_layers: int = 4, **vision: Any) -> dict[str, Any]:
    """A tiny configuration with a deeper tower."""
    return tiny_values | {"vision_config": tiny_values["vision_config"] | {"num_hidden_layers": num_layers} | vision}


def model_of(values: dict[str, Any], merging: float, seed: int = 0) -> InternVLVTCModel:
    torch.manual_seed(seed)
    config = InternVLVTCConfig(**values, visual_token_compression=2, vision_token_merging=merging)
    model = InternVLVTCModel(config).eval()
    with torch.no_grad():  # which start at zero
        model.vision_tower.embeddings.position_embeddings.normal_(0, 0.2)
    return model


def pixels(tiles: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tiles, 3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=dtype)


def see(model: InternVLVTCModel, tiles: torch.Tensor) -> torch.Tensor:
    return backbone_of(model.config).see(model, tiles, [len(tiles)])


def by_hand(hidden_MC: np.ndarray, size_M: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """One tile merged with loops: hidden states, sizes, and where each went."""
    unit = hidden_MC / np.linalg.norm(hidden_MC, axis=1, keepdims=True)
    first, second = range(0, len(unit), 2), range(1, len(unit), 2)
    partner = {one: max(second, key=lambda other: unit[one] @ unit[other]) for one in first}
    gone = sorted(first, key=lambda one: -(unit[one] @ unit[partner[one]]))[:count]
    stays = [one for one in range(len(unit)) if one not in gone]
    into = [stays.index(partner[one] if one in gone else one) for one in range(len(unit))]
    size = np.zeros(len(stays))
    hidden = np.zeros((len(stays), hidden_MC.shape[1]))
    for one, place in enumerate(into):
        size[place] += size_M[one]
        hidden[place] += size_M[one] * hidden_MC[one]
    return hidden / size[:, None], size, into


def test_two_merges_equal_loops() -> None:
    hidden = features()
    found = Merged.of(hidden).merge(5).merge(4)
    assert found.hidden_TMC.shape == (3, 7, 5)
    order = turning_order(16).numpy()
    for tile in range(3):
        once, size, into = by_hand(hidden[tile].double().numpy()[order], np.ones(16), 5)
        twice, size, again = by_hand(once, size, 4)
        np.testing.assert_allclose(found.hidden_TMC[tile], twice, atol=1e-6)
        assert found.size_TM[tile].tolist() == size.tolist()
        assert size.sum() == 16
        place = {int(patch): again[into[row]] for row, patch in enumerate(order)}
        assert found.place_TN[tile].tolist() == [place[patch] for patch in range(16)]


def test_unmerging_gives_everything_back() -> None:
    """What nothing was done to in between is what it was; what was added to a token is added to all of its patches."""
    hidden = features(dtype=torch.float64)
    found = Merged.of(hidden).merge(6).merge(5)
    torch.testing.assert_close(found.unmerge(), hidden, rtol=0, atol=1e-12)
    added = torch.randn_like(found.hidden_TMC)
    moved = found.with_hidden(found.hidden_TMC + added).unmerge() - hidden
    for tile in range(3):
        torch.testing.assert_close(moved[tile], added[tile][found.place_TN[tile]], rtol=0, atol=1e-12)
    assert torch.equal(Merged.of(hidden).unmerge(), hidden)
    none = Merged.of(hidden)
    assert none.merge(0) is none


def test_equal_patches_merge_first() -> None:
    hidden = features(tiles=1)
    order = turning_order(16)
    for pair in ((0, 1), (6, 9), (14, 3)):  # in the turning order; even places look for odd ones
        hidden[0, order[pair[0]]] = hidden[0, order[pair[1]]]
    found = Merged.of(hidden).merge(3)
    together = [{patch for patch in range(16) if found.place_TN[0, patch] == place} for place in range(13)]
    expected = [{int(order[one]), int(order[other])} for one, other in ((0, 1), (6, 9), (14, 3))]
    assert sorted(map(sorted, (one for one in together if len(one) > 1))) == sorted(map(sorted, expected))
    torch.testing.assert_close(found.unmerge(), hidden, rtol=0, atol=1e-6)


def test_rows_are_independent() -> None:
    hidden = features(tiles=4)
    whole = Merged.of(hidden).merge(6).merge(3)
    for tile in range(4):
        alone = Merged.of(hidden[tile : tile + 1]).merge(6).merge(3)
        assert torch.equal(alone.place_TN[0], whole.place_TN[tile])
        torch.testing.assert_close(alone.hidden_TMC[0], whole.hidden_TMC[tile])


def test_the_halves_of_an_even_grid_are_a_chequerboard() -> None:
    half = torch.empty(64, dtype=torch.int64)
    half[turning_order(64)] = torch.arange(64) % 2
    board = half.view(8, 8)
    assert (board[:, 1:] != board[:, :-1]).all()
    assert (board[1:] != board[:-1]).all()


def test_ties_go_to_the_first() -> None:
    gone, into = most_similar(torch.ones(2, 8, 3), 2)
    assert gone.tolist() == [[0, 2], [0, 2]]
    assert into.tolist() == [[1, 1], [1, 1]]


def test_schedule() -> None:
    assert merges(64, 6, 0.5) == [6, 7, 6, 7, 6, 0]
    assert lengths(64, merges(64, 6, 0.5))[-1] == 32
    assert merges(64, 1, 0.0) == [0]
    assert sum(merges(1024, 24, 0.75)) == 768
    for layers, share in ((1, 0.1), (2, 0.6), (6, 0.95), (6, 1.0), (6, -0.1)):
        with pytest.raises(ValueError, match="vision_token_merging"):
            merges(64, layers, share)
    with pytest.raises(ValueError, match="From 0 to 8 of 16"):
        Merged.of(features()).merge(9)


@torch.inference_mode()
def test_none_is_bit_identical_to_plain_internvl(tiny_values: dict[str, Any]) -> None:
    """Also the weights: the random numbers that a new model is made of are drawn as before."""
    torch.manual_seed(5)
    theirs = InternVLModel(InternVLConfig(**tiny_values, image_seq_length=16)).eval()
    torch.manual_seed(5)
    ours = InternVLVTCModel(InternVLVTCConfig(**tiny_values)).eval()
    found = theirs.get_image_features(pixels(), return_dict=True).pooler_output
    assert torch.equal(see(ours, pixels()), found)


@torch.inference_mode()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_picture_of_one_colour_is_seen_as_without_merging(tiny_values: dict[str, Any], attention: str) -> None:
    """Where nothing but position tells patches apart, and position is left out, attention by size loses nothing."""
    flat = torch.full((2, 3, 64, 64), 0.7)
    values = deep(tiny_values)
    merged, plain = model_of(values, 0.75), model_of(values, 0.0)
    for model in (merged, plain):
        model.vision_tower.embeddings.position_embeddings.zero_()
        model.vision_tower.embeddings.cls_token.normal_(generator=torch.Generator().manual_seed(1))
        model.set_attn_implementation(attention)
    expected, found = see(plain, flat), see(merged, flat)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    tower = merged.vision_tower(flat).last_hidden_state
    torch.testing.assert_close(tower, plain.vision_tower(flat).last_hidden_state, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_both_attentions_see_the_same_and_no_other_is_allowed(tiny_values: dict[str, Any]) -> None:
    model = model_of(deep(tiny_values), 0.5)
    plain = see(model_of(deep(tiny_values), 0.0), pixels())
    model.set_attn_implementation("sdpa")
    fused = see(model, pixels())
    model.set_attn_implementation("eager")
    torch.testing.assert_close(see(model, pixels()), fused, rtol=0, atol=1e-5)
    assert (fused - plain).abs().max() > 1e-3  # it does something
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="eager and sdpa"):
        see(model, pixels())


@torch.inference_mode()
def test_tiles_of_a_batch_are_independent(tiny_values: dict[str, Any]) -> None:
    model = model_of(deep(tiny_values), 0.5)
    whole = see(model, pixels(4))
    for tile in range(4):
        torch.testing.assert_close(see(model, pixels(4)[tile : tile + 1])[0], whole[tile], rtol=0, atol=1e-5)


def test_the_setting_may_change_between_calls(tiny_values: dict[str, Any]) -> None:
    model, plain = model_of(deep(tiny_values), 0.5), model_of(deep(tiny_values), 0.0)
    with torch.inference_mode():
        merged = see(model, pixels())
        model.config.vision_token_merging = 0.0
        assert torch.equal(see(model, pixels()), see(plain, pixels()))
        model.config.vision_token_merging = 0.5
        assert torch.equal(see(model, pixels()), merged)


def test_gradient_by_finite_differences(tiny_values: dict[str, Any]) -> None:
    values = deep(tiny_values, 3, image_size=[32, 32])
    values["text_config"] = values["text_config"] | {"vocab_size": 64}
    model = model_of(values | {"image_token_id": 3}, 0.5).double()
    model.config.visual_token_compression = 1  # compression works in float32
    tiles = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weight = model.vision_tower.encoder.layer[0].mlp.fc1.weight
    direction = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(4))
    want = torch.randn(2, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss() -> torch.Tensor:
        return (see(model, tiles) * want).sum()

    loss().backward()
    assert weight.grad is not None
    step = 1e-6
    with torch.no_grad():
        weight += step * direction
        above = loss()
        weight -= 2 * step * direction
        below = loss()
    assert ((above - below) / (2 * step)).item() == pytest.approx((weight.grad * direction).sum().item(), rel=1e-5)
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in model.vision_tower.encoder.parameters())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_recomputed_activations_give_the_same_gradient(tiny_values: dict[str, Any], attention: str) -> None:
    gradients = []
    for recompute in (False, True):
        model = model_of(deep(tiny_values), 0.5).train()
        model.set_attn_implementation(attention)
        if recompute:
            recompute_activations(model)
        see(model, pixels()).square().sum().backward()
        gradients.append(model.vision_tower.encoder.layer[1].mlp.fc1.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_runs_under_autocast(tiny_values: dict[str, Any], attention: str) -> None:
    model = model_of(deep(tiny_values), 0.5)
    model.set_attn_implementation(attention)
    exact = see(model, pixels(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = see(model, pixels(1))
    found.float().sum().backward()
    assert torch.nn.functional.cosine_similarity(found.float(), exact, dim=2).min() > 0.98


@pytest.fixture(scope="module")
def merging_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any], tiny_checkpoint: Path
) -> Path:
    """As ``tiny_checkpoint``, with four layers in the tower and half of their patches merged."""
    _, processor = load_backbone(tiny_checkpoint)
    model = model_of(deep(tiny_values), 0.5)
    return save_checkpoint(
        tmp_path_factory.mktemp("merging") / "tiny", model, processor, load_settings(tiny_checkpoint)
    )


def test_a_checkpoint_keeps_the_setting(merging_checkpoint: Path, tiny_checkpoint: Path, picture: MakePicture) -> None:
    assert json.loads((merging_checkpoint / "config.json").read_text())["vision_token_merging"] == 0.5
    assert json.loads((merging_checkpoint / "quarterlight.json").read_text())["vision_token_merging"] == 0.5
    assert "vision_token_merging" not in (tiny_checkpoint / "quarterlight.json").read_text()
    images = [picture(seed) for seed in range(3)]
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "num_workers": 0}
    saved = Embedder(merging_checkpoint, **options)
    off, same = (Embedder(merging_checkpoint, vision_token_merging=one, **options) for one in (0, 0.5))
    assert saved.model.config.vision_token_merging == 0.5
    rows = saved.encode_document(images)
    np.testing.assert_array_equal(same.encode_document(images), rows)
    assert np.abs(off.encode_document(images) - rows).max() > 1e-4
    assert saved.model_hash == same.model_hash != off.model_hash
    assert saved.vision_hash == same.vision_hash != off.vision_hash
    for row, image in zip(rows, images, strict=True):
        np.testing.assert_allclose(saved.encode_document(image)[0], row, atol=1e-5)
    with pytest.raises(CheckpointError, match="vision_token_merging"):
        Embedder(tiny_checkpoint, vision_token_merging=0.9)


def test_sentence_transformers_opens_it(merging_checkpoint: Path, picture: MakePicture) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    image = picture(1)
    theirs = sentence_transformers.SentenceTransformer(
        str(merging_checkpoint), device="cpu", model_kwargs={"dtype": torch.float32}
    )
    ours = Embedder(merging_checkpoint, dtype=torch.float32, device="cpu")
    np.testing.assert_allclose(theirs.encode_document([image]), ours.encode_document([image]), atol=1e-5)


def test_training_uses_it_and_moves_the_tower(merging_checkpoint: Path, picture: MakePicture) -> None:
    model, processor = load_backbone(merging_checkpoint)
    embed, formatter = PromptEmbedder(model.train()), InputFormatter(processor, load_settings(merging_checkpoint))
    images, texts = [picture(seed) for seed in range(3)], [Item(text=f"number {number}") for number in range(3)]
    query_QD = embed(formatter([Item(image=one) for one in images], "query"))
    served = Embedder(merging_checkpoint, dtype=torch.float32, device="cpu").encode_query(images)
    np.testing.assert_allclose(query_QD.detach(), served, atol=1e-5)
    info_nce(query_QD, embed(formatter(texts, "document")), temperature=0.05).backward()
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in model.vision_tower.encoder.parameters())


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_flops_are_those_that_pytorch_counts(tiny_values: dict[str, Any], share: float) -> None:
    model = model_of(deep(tiny_values), share)
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        see(model, pixels(2))
    assert counted.get_total_flops() == pytest.approx(vision_flop(model.config, 2), rel=1e-3)
    assert vision_flop(model.config, 2) < vision_flop(model_of(deep(tiny_values), 0.0).config, 2)


@pytest.mark.parametrize("family", QWEN)
def test_qwen_refuses_it(family: str, tmp_path: Path, tokenizer: Any) -> None:
    folder = plain_qwen(family, tmp_path, tokenizer)
    assert load_config(folder, vision_token_merging=0.0) is not None
    with pytest.raises(CheckpointError, match="for InternVL"):
        load_config(folder, vision_token_merging=0.5)


def test_only_the_last_layer_is_put_back(tiny_values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="vision_feature_layer=-1"):
        InternVLVTCConfig(**deep(tiny_values), vision_feature_layer=-2, vision_token_merging=0.5)
