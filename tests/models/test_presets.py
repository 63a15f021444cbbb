"""Weights in the layout in which others released them, as their preset reads them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.qwen import plain_qwen, qwen_tokenizer
from transformers import AutoModelForImageTextToText

from quarterlight import Item
from quarterlight.data.registry import find
from quarterlight.errors import CheckpointError
from quarterlight.models import presets
from quarterlight.models.checkpoint import save_checkpoint
from quarterlight.models.embedder import Embedder
from quarterlight.models.inputs import InputFormatter
from quarterlight.models.pooling import Attention, PoolingMode
from quarterlight.models.presets import PRESETS, Preset
from quarterlight.prompts import MARKERS, PromptStyle

NAME = "u-marvel-tiny"


@pytest.fixture
def released(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without a word of ours, and a preset for it."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "U-MARVEL-Tiny"))
    for name in ("quarterlight.json", "modules.json", "chat_template.jinja"):
        (folder / name).unlink()
    usual = PRESETS["u-marvel-qwen2vl-7b"]
    preset = replace(usual, hub_id="TencentBAC/U-MARVEL-Tiny", model_type="internvl_vtc")
    monkeypatch.setattr(presets, "PRESETS", {**PRESETS, NAME: preset})
    return folder


def open_cpu(folder: Path, **kwargs: Any) -> Embedder:
    return Embedder(folder, dtype=torch.float32, device="cpu", **kwargs)


@pytest.fixture(scope="module", params=PRESETS)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Random weights of a tiny shape in the layout of the real ones: as the authors' classes were saved by the
    transformers of their day, in bfloat16, the learned temperature among them, and nothing of ours."""
    preset = PRESETS[request.param]
    root = tmp_path_factory.mktemp("published")
    plain = plain_qwen(preset.model_type, root / "plain", tokenizer)
    folder = root / preset.hub_id.rpartition("/")[2]
    folder.mkdir()
    config = json.loads((plain / "config.json").read_text())
    weights = {name: weight.bfloat16() for name, weight in load_file(plain / "model.safetensors").items()}
    rows = config["text_config"]["vocab_size"] + 20  # of the matrix, more than the tokenizer's
    if preset.model_type == "qwen2_vl":
        config = flat(config) | {"architectures": ["Qwen2VLRetFinetuneDistillRerankForConditionalGeneration"]}
        config["vocab_size"] = rows
        weights = {old_name(name): weight for name, weight in weights.items()}
        padded = ("model.embed_tokens.weight", "lm_head.weight")
    else:
        config["architectures"] = ["Qwen3VLRetFinetuneDistillRerankForConditionalGeneration"]
        config["text_config"]["vocab_size"] = rows
        padded = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    for name in padded:
        weights[name] = torch.cat([weights[name], 0.01 * torch.ones(20, 32, dtype=torch.bfloat16)])
    weights["sim.temp"] = torch.tensor(0.03, dtype=torch.bfloat16)
    config |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    config |= {"emb_token_id": 1, "instruction_start_token_id": 2, "instruction_end_token_id": 3}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(plain / file, folder / file)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return folder


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Qwen2-VL's configuration before its language model had one of its own."""
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope = text.pop("rope_parameters")
    kept = {name: value for name, value in text.items() if name not in ("model_type", "dtype", "layer_types")}
    return {
        **config,
        **kept,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "vision_config": vision,
    }


def old_name(name: str) -> str:
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def test_published_weights_open_by_name(published: Path, tokenizer: Any, picture: Any) -> None:
    """They give what their own model, masked and pooled by hand, gives."""
    embedder = open_cpu(published)
    preset = next(one for one in PRESETS.values() if one.hub_id.endswith(published.name))
    assert embedder.settings == preset.settings
    words = len(qwen_tokenizer(tokenizer))
    assert embedder.processor.tokenizer.convert_tokens_to_ids(list(MARKERS)) == [words, words + 1, words + 2]
    matrix = embedder.model.get_input_embeddings().weight
    assert len(matrix) == words + 20
    saved = load_file(published / "model.safetensors")
    (name,) = (one for one in saved if one.endswith("embed_tokens.weight"))
    assert torch.equal(matrix[:words], saved[name][:words].float())
    assert torch.equal(matrix[words + 3 :], saved[name][words + 3 :].float())
    items = ["a cat", Item(image=picture(0, 40, 24), text="sliced"), Item(image=picture(1, 32, 48))]
    rows = embedder.encode_query(items, instruction="Find it.")
    alone = np.concatenate([embedder.encode_query(one, instruction="Find it.") for one in items])
    np.testing.assert_allclose(alone, rows, rtol=0, atol=1e-5)

    # by hand, with transformers' own model: an explicit mask, positions counted through
    theirs = AutoModelForImageTextToText.from_pretrained(published, dtype=torch.float32).model.eval()
    theirs.get_input_embeddings().weight.data.copy_(matrix)
    if preset.tower:  # as their code: worked out and dropped
        see = theirs.get_image_features

        def without_deepstack(*args: Any, **kwargs: Any) -> Any:
            found = see(*args, **kwargs)
            found.deepstack_features = []
            return found

        theirs.get_image_features = without_deepstack
    inputs = InputFormatter(embedder.processor, preset.settings)(items, "query", "Find it.")
    real, out = inputs["attention_mask"], inputs["instruction_mask"]
    length = real.shape[1]
    grids = torch.cat([torch.ones(2, 1, dtype=torch.int64), 2 * inputs["grids"]], dim=1)
    with torch.inference_mode():
        hidden = theirs(
            input_ids=inputs["input_ids"],
            pixel_values=inputs["pixel_values"],
            image_grid_thw=grids,
            position_ids=torch.arange(length).expand(3, 3, length),
            attention_mask=real[:, None, None].bool().expand(3, 1, length, length),
        ).last_hidden_state
    keep = (real * (1 - out)).unsqueeze(-1)
    expected = torch.nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=-1)
    np.testing.assert_allclose(rows, expected.numpy(), rtol=0, atol=1e-5)


def test_published_weights_need_no_preset_once_saved(published: Path, picture: Any, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    first = open_cpu(published)
    items = ["a cat", {"image": picture(0, 40, 24), "text": "sliced"}]
    folder = save_checkpoint(tmp_path / "m", first.model, first.processor, first.settings)
    assert np.array_equal(open_cpu(folder).encode_query(items), first.encode_query(items))
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    np.testing.assert_allclose(theirs.encode_query(items), first.encode_query(items), rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=str)
def test_presets_are_those_of_the_paper(preset: Preset) -> None:
    settings = preset.settings
    assert settings.pooling is PoolingMode.MEAN and settings.attention is Attention.BIDIRECTIONAL
    assert settings.prompt_style is PromptStyle.U_MARVEL and settings.pool_frame
    assert settings.text_max_tokens == 480
    trained_with = {one.query_instructions[0] for name in SEARCHED for one in find(f"M-BEIR/{name}")}
    assert set(settings.instructions["query"].values()) == trained_with


SEARCHED = ("MSCOCO task0", "NIGHTS task4", "CIRR task7")


def test_the_same_by_name_and_by_preset(released: Path, tmp_path: Path) -> None:
    """And on every day: the markers' embeddings, which the weights do not have, come from a seed."""
    torch.manual_seed(1)
    by_name = open_cpu(released)
    torch.manual_seed(2)
    elsewhere = shutil.copytree(released, tmp_path / "elsewhere")
    by_preset = open_cpu(elsewhere, preset=NAME)
    vectors = by_name.encode_query(["a red apple", "x"])
    assert np.array_equal(by_preset.encode_query(["a red apple", "x"]), vectors)
    assert by_name.settings == by_preset.settings == presets.PRESETS[NAME].settings
    assert by_name.model_hash == by_preset.model_hash != open_cpu(elsewhere).model_hash
    assert set(MARKERS) <= set(by_name.processor.tokenizer.get_added_vocab())
    assert not set(MARKERS) & set(open_cpu(elsewhere).processor.tokenizer.get_added_vocab())  # loading adds nothing


def test_saved_it_needs_no_preset(released: Path, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    first = open_cpu(released)
    items = ["a red apple", "x"]
    folder = save_checkpoint(tmp_path / released.name / released.name, first.model, first.processor, first.settings)
    again = open_cpu(folder)
    assert np.array_equal(again.encode_query(items), first.encode_query(items))
    assert again.settings == first.settings
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    np.testing.assert_allclose(theirs.encode_query(items), first.encode_query(items), rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"says in quarterlight\.json how it embeds: leave out the preset"):
        open_cpu(folder, preset=NAME)


def test_unknown_preset_and_wrong_model(released: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no preset 'u-marvel-qwen2vl-7'.*Did you mean 'u-marvel-qwen2vl-7b'"):
        open_cpu(released, preset="u-marvel-qwen2vl-7")
    with pytest.raises(CheckpointError, match="holds a 'internvl_vtc' model, but the preset for TencentBAC"):
        open_cpu(released, preset="u-marvel-qwen3vl-4b")


def test_markers_without_rows_get_them(released: Path) -> None:
    """A tokenizer that was saved with the markers, beside weights that were not."""
    usual = open_cpu(released)
    usual.processor.tokenizer.save_pretrained(released)
    again = open_cpu(released)
    assert json.loads((released / "config.json").read_text())["text_config"]["vocab_size"] == len(
        usual.processor.tokenizer
    ) - len(MARKERS)
    assert np.array_equal(again.encode_query("x"), usual.encode_query("x"))
