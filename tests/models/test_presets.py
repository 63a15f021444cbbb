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

from quarterlight.data.registry import find
from quarterlight.errors import CheckpointError
from quarterlight.models import presets
from quarterlight.models.checkpoint import save_checkpoint
from quarterlight.models.embedder import Embedder
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
