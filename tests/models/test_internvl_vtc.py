"""The backbone against plain InternVL: the same numbers at s = 1, an independent pooling at s = 2 and 4."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from quarterlight.errors import CheckpointError
from quarterlight.models.checkpoint import load_backbone, load_config
from quarterlight.models.embedder import Embedder
from quarterlight.models.internvl_vtc import (
    InternVLVTCConfig,
    InternVLVTCForConditionalGeneration,
    InternVLVTCImageProcessor,
    InternVLVTCModel,
    InternVLVTCProcessor,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any], tokenizer: Any) -> Path:
    """A folder as ``OpenGVLab/InternVL3-*-hf`` are: plain classes, GOT-OCR2 image processor, an InternVLProcessor."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("plain")
    model = InternVLForConditionalGeneration(InternVLConfig(**tiny_values, image_seq_length=16))
    model.save_pretrained(folder)
    assert "language_model.model.embed_tokens.weight" in load_file(folder / "model.safetensors")  # the older names
    tokenizer.save_pretrained(folder)
    mean_std = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    GotOcr2ImageProcessorPil(size={"height": 64, "width": 64}, **mean_std).save_pretrained(folder)
    (folder / "processor_config.json").write_text('{"image_seq_length": 16, "processor_class": "InternVLProcessor"}')
    return folder


def inputs(config: Any, tokens_per_tile: int, tiles: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = [7, 8, *[config.image_token_id] * (tokens_per_tile * tiles), 9, 10]
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.randn(tiles, 3, 64, 64, generator=generator),
    }


@torch.inference_mode()
def test_s1_is_bit_identical_to_plain_internvl(plain: Path) -> None:
    theirs = InternVLForConditionalGeneration.from_pretrained(plain).eval()
    ours, processor = load_backbone(plain, visual_token_compression=1, language_head=True)
    assert isinstance(ours, InternVLVTCForConditionalGeneration)
    assert processor.image_seq_length == ours.config.image_seq_length == 16
    batch = inputs(theirs.config, 16)
    assert torch.equal(ours(**batch).logits, theirs(**batch).logits)


@torch.inference_mode()
@pytest.mark.parametrize("factor", [2, 4])
def test_compression_equals_independent_pooling(plain: Path, factor: int) -> None:
    theirs = InternVLForConditionalGeneration.from_pretrained(plain).eval()
    ours, processor = load_backbone(plain, visual_token_compression=factor)
    assert processor.image_seq_length == 16 // factor**2
    pixels = inputs(theirs.config, 16)["pixel_values"]

    # Feature map [T, 8, 8, C] -> bilinear samples -> pixel shuffle, all by hand; only the projector is theirs.
    maps = theirs.model.vision_tower(pixels).last_hidden_state[:, 1:].reshape(2, 8, 8, -1).numpy()
    centres = (np.arange(8 // factor) + 0.5) * factor - 0.5
    low = np.floor(centres).astype(int)
    share = (centres - low)[:, None]
    rows = maps[:, low] * (1 - share[:, :, None]) + maps[:, low + 1] * share[:, :, None]
    pooled = rows[:, :, low] * (1 - share) + rows[:, :, low + 1] * share
    side = 8 // factor // 2
    shuffled = np.concatenate([pooled[:, dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)], axis=-1).reshape(
        2, side * side, -1
    )
    expected = theirs.model.multi_modal_projector(torch.from_numpy(shuffled.astype(np.float32)))

    features = ours.get_image_features(pixels, return_dict=True).pooler_output
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_base_model_and_language_head_share_hidden_states(plain: Path) -> None:
    base, _ = load_backbone(plain, visual_token_compression=2)
    full, _ = load_backbone(plain, visual_token_compression=2, language_head=True)
    batch = inputs(base.config, 4)
    torch.testing.assert_close(full.lm_head(base(**batch).last_hidden_state), full(**batch).logits)


def test_embedder_opens_a_plain_folder(plain: Path) -> None:
    embedder = Embedder(plain, visual_token_compression=2, dtype=torch.float32, device="cpu")
    assert embedder.max_tiles == 1
    assert embedder.encode_document(["x", Image.new("RGB", (90, 70))]).shape == (2, 32)


def test_qwen3_language_models_load_as_well(tiny_values: dict[str, Any], tmp_path: Path) -> None:
    """InternVL3.5."""
    text = tiny_values["text_config"] | {"model_type": "qwen3", "head_dim": 8}
    theirs = InternVLForConditionalGeneration(InternVLConfig(**(tiny_values | {"text_config": text}))).eval()
    theirs.save_pretrained(tmp_path)
    ours = InternVLVTCForConditionalGeneration.from_pretrained(tmp_path, config=load_config(tmp_path, 1)).eval()
    batch = inputs(theirs.config, 16)
    with torch.inference_mode():
        assert torch.equal(ours(**batch).logits, theirs(**batch).logits)


def test_wrong_number_of_placeholders_is_an_error(plain: Path) -> None:
    model, _ = load_backbone(plain, visual_token_compression=2)
    with pytest.raises((ValueError, RuntimeError), match="tokens: 32, features: 8"):
        model(**inputs(model.config, 16))


@pytest.mark.parametrize("language_head", [False, True])
def test_save_and_load(plain: Path, tmp_path: Path, language_head: bool) -> None:
    model, processor = load_backbone(plain, visual_token_compression=2, language_head=language_head)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = (AutoModelForImageTextToText if language_head else AutoModel).from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config.visual_token_compression == 2
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_auto_classes(tiny_checkpoint: Path) -> None:
    assert type(AutoConfig.from_pretrained(tiny_checkpoint)) is InternVLVTCConfig
    assert type(AutoModel.from_pretrained(tiny_checkpoint)) is InternVLVTCModel
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    assert type(processor) is InternVLVTCProcessor
    assert type(processor.image_processor) is InternVLVTCImageProcessor
    assert type(AutoImageProcessor.from_pretrained(tiny_checkpoint)) is InternVLVTCImageProcessor
    config = AutoConfig.from_pretrained(tiny_checkpoint)
    assert type(AutoModelForMultimodalLM.from_config(config)) is InternVLVTCForConditionalGeneration


IMPORTS = {
    "before": "import quarterlight; from transformers import AutoProcessor, AutoModel, AutoConfig",
    "after": "from transformers import AutoProcessor, AutoModel, AutoConfig; import quarterlight",
    "indirectly": "import quarterlight; from transformers import Trainer, AutoProcessor, AutoConfig, AutoModel",
}


@pytest.mark.parametrize("order", IMPORTS)
def test_import_registers_in_any_order(order: str, tiny_checkpoint: Path) -> None:
    program = (
        f"{IMPORTS[order]}\n"
        f"path = {str(tiny_checkpoint)!r}\n"
        "assert type(AutoConfig.from_pretrained(path)).__name__ == 'InternVLVTCConfig'\n"
        "assert type(AutoModel.from_pretrained(path)).__name__ == 'InternVLVTCModel'\n"
        "assert type(AutoProcessor.from_pretrained(path)).__name__ == 'InternVLVTCProcessor'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, capture_output=True)


def test_import_is_cheap() -> None:
    program = (
        "import sys, quarterlight, quarterlight.errors, quarterlight.prompts\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'pandas', 'lancedb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_config_counts_tokens(tiny_values: dict[str, Any]) -> None:
    for factor, tokens in {1: 16, 2: 4, 4: 1}.items():
        assert InternVLVTCConfig(**tiny_values, visual_token_compression=factor).image_seq_length == tokens
    full = InternVLVTCConfig(visual_token_compression=2, image_seq_length=256)
    assert full.image_seq_length == 64


@pytest.mark.parametrize(("vision", "factor"), [({}, 3), ({"image_size": [48, 48]}, 4), ({"image_size": [64, 128]}, 2)])
def test_config_refuses_impossible_grids(tiny_values: dict[str, Any], vision: dict[str, Any], factor: int) -> None:
    values = tiny_values | {"vision_config": tiny_values["vision_config"] | vision}
    with pytest.raises(ValueError, match="visual_token_compression"):
        InternVLVTCConfig(**values, visual_token_compression=factor)


def test_load_config_errors(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be one of"):
        load_config(plain, 3)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="'bert' model: expected an InternVL"):
        load_config(tmp_path)


def test_missing_weights_are_an_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("multi_modal_projector.linear_1.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's weights, multi_modal_projector\.linear_1"):
        load_backbone(folder)
