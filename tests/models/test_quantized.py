"""Weights as int8: what is quantised and what is not, nearly the same embeddings, and another name for the model."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.qwen import QWEN, plain_qwen

from quarterlight import Item
from quarterlight.errors import CheckpointError, InputError
from quarterlight.models.checkpoint import load_backbone, load_settings, save_checkpoint
from quarterlight.models.embedder import Embedder
from quarterlight.models.quantized import named_tensors, quantization_of, quantize, quiet_torchao


@pytest.fixture(scope="module")
def int8(tiny_checkpoint: Path) -> Embedder:
    pytest.importorskip("torchao", reason="needs the extra int8")
    return Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu", quantization="int8")


def test_layers_and_nothing_else(int8: Embedder, tiny_embedder: Embedder) -> None:
    quantised = {name.rpartition(".")[0] for name, one in int8.model.state_dict().items() if hasattr(one, "qdata")}
    linear = {name for name, one in tiny_embedder.model.named_modules() if isinstance(one, torch.nn.Linear)}
    left = {name for name in linear if name.startswith("multi_modal_projector.")}
    assert left and quantised == linear - left
    weights = dict(int8.model.named_parameters())
    assert sum(one.qdata.nbytes for one in weights.values() if hasattr(one, "qdata")) == sum(
        tiny_embedder.model.get_submodule(name).weight.numel() for name in linear - left
    )
    assert quantization_of(int8.model) == "int8"
    assert quantization_of(tiny_embedder.model) is None


def test_embeddings_are_those_of_the_rounded_weights(
    int8: Embedder, tiny_embedder: Embedder, tiny_checkpoint: Path, picture: Any
) -> None:
    items = ["a red apple", picture(0), Item(image=picture(1, 256, 64), max_tiles=4, text="a page"), "x"]
    rows, whole = int8.encode_document(items), tiny_embedder.encode_document(items)
    assert np.abs(rows - whole).max() > 1e-5
    assert (rows * whole).sum(axis=1).min() > 0.99
    model, processor = load_backbone(tiny_checkpoint)  # float32, with the numbers that int8 stands for
    model.load_state_dict(dict(named_tensors(int8.model)))
    plain = Embedder.from_model(model, processor, load_settings(tiny_checkpoint)).encode_document(items)
    np.testing.assert_allclose(rows, plain, rtol=0, atol=1e-5)
    alone = np.concatenate([int8.encode_document([one]) for one in items])
    np.testing.assert_allclose(alone, rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", QWEN)
def test_other_families(kind: str, tmp_path: Path, tokenizer: Any, picture: Any) -> None:
    pytest.importorskip("torchao", reason="needs the extra int8")
    folder = plain_qwen(kind, tmp_path / kind, tokenizer)
    small, whole = (Embedder(folder, dtype=torch.float32, device="cpu", quantization=one) for one in ("int8", None))
    items = ["a red apple", {"text": "the same, but blue", "image": picture(1, 32, 48)}]
    rows, expected = small.encode_query(items), whole.encode_query(items)
    assert 1e-6 < np.abs(rows - expected).max() < 0.1
    quantised = {name for name, one in small.model.named_parameters() if hasattr(one, "qdata")}
    assert any(name.startswith("visual.blocks.0.") for name in quantised)
    assert any(name.startswith("language_model.layers.0.") for name in quantised)
    assert not any("merger" in name or "embed" in name for name in quantised)


def test_hashes_differ(int8: Embedder, tiny_embedder: Embedder, tiny_checkpoint: Path) -> None:
    assert int8.model_hash != tiny_embedder.model_hash
    assert int8.vision_hash != tiny_embedder.vision_hash
    in_memory = Embedder.from_model(int8.model, int8.processor, int8.settings)
    assert len({in_memory.model_hash, int8.model_hash, tiny_embedder.model_hash}) == 3


def test_what_cannot_be_done(int8: Embedder, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'int8'"):
        Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu", quantization="int4")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="quantise it when loading"):
        save_checkpoint(tmp_path / "saved", int8.model, int8.processor, int8.settings)


def test_without_torchao(tiny_embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(CheckpointError, match=r"pip install -e '\.\[int8\]'"):
        quantize(tiny_embedder.model, "int8")
    assert quantization_of(tiny_embedder.model) is None


def test_only_the_noise_of_torchao_is_set_aside(caplog: pytest.LogCaptureFixture) -> None:
    quiet_torchao()
    quiet_torchao()
    logger = logging.getLogger("torchao")
    with caplog.at_level(logging.DEBUG):
        logger.warning("Failed to load /somewhere/_C.so: no such kernel")
        logger.warning("Something that matters")
    assert [(one.name, one.levelname) for one in caplog.records] == [
        ("quarterlight.models.quantized", "DEBUG"),
        ("torchao", "WARNING"),
    ]
