"""A tiny random InternVL3-VTC, made once per session: 64 px tiles in 8 px patches, two layers, 32 columns."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_ASSETS_CACHE", str(Path(tempfile.gettempdir()) / f"quarterlight-tests-{os.getuid()}"))

import numpy as np
import pytest
import torch
from PIL import Image

from quarterlight.models.checkpoint import load_backbone, load_settings, save_checkpoint, save_reranker
from quarterlight.models.embedder import Embedder
from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig
from quarterlight.models.internvl_vtc.modeling import InternVLVTCModel
from quarterlight.models.internvl_vtc.processing import InternVLVTCImageProcessor, InternVLVTCProcessor
from quarterlight.models.pair import save_pair
from quarterlight.models.settings import EmbedderSettings, RerankerSettings
from quarterlight.models.tokenizer import train_tokenizer
from quarterlight.prompts import QUERY_INSTRUCTIONS, TARGET_INSTRUCTIONS

TEXTS = (*QUERY_INSTRUCTIONS.values(), *TARGET_INSTRUCTIONS.values(), "Instruct: Query: Text:", "user\nassistant\n")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer([*TEXTS] * 4, 400)


@pytest.fixture(scope="session")
def tiny_values(tokenizer: Any) -> dict[str, Any]:
    """Fields of a tiny InternVL configuration, plain or with compression."""
    return {
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [64, 64],
            "patch_size": [8, 8],
            "attention_bias": True,
            "initializer_range": 0.2,
            "layer_scale_init_value": 1.0,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 4096,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
        },
        "image_token_id": tokenizer.context_image_token_id,
    }


@pytest.fixture(scope="session")
def image_processor() -> InternVLVTCImageProcessor:
    return InternVLVTCImageProcessor(size={"height": 64, "width": 64}, max_patches=1)


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_values: dict[str, Any], tokenizer: Any, image_processor: Any
) -> Path:
    """An embedder's folder (s = 2, random weights, float32). Copy it before changing it."""
    torch.manual_seed(0)
    config = InternVLVTCConfig(**tiny_values, visual_token_compression=2)
    processor = InternVLVTCProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_checkpoint(folder, InternVLVTCModel(config), processor, EmbedderSettings(text_max_tokens=64))


@pytest.fixture(scope="session")
def tiny_pair(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same embedder with a reranker inside, whose language model is a little different."""
    root = tmp_path_factory.mktemp("pairs")
    model, processor = load_backbone(tiny_checkpoint, language_head=True)
    embedder = save_checkpoint(root / "embedder", model, processor, load_settings(tiny_checkpoint))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.model.language_model.layers.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    reranker = save_reranker(root / "reranker", model, processor, RerankerSettings(text_max_tokens=64))
    return save_pair(root / "tiny", embedder, reranker)


@pytest.fixture(scope="session")
def tiny_embedder(tiny_checkpoint: Path) -> Embedder:
    return Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu", tokens_per_batch=600)


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """picture(seed, width, height): random blocks of colour."""

    def make(seed: int, width: int = 90, height: int = 70) -> Image.Image:
        blocks = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)

    return make
