"""Embedder and reranker over one set of weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from quarterlight.errors import CheckpointError
from quarterlight.models.checkpoint import load_backbone, load_settings, save_checkpoint, save_reranker, saved_tensors
from quarterlight.models.embedder import Embedder
from quarterlight.models.pair import load_pair, same_eyes, save_pair
from quarterlight.models.reranker import Reranker, has_reranker
from quarterlight.models.settings import RerankerSettings

CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def add_adapter(model: Any, seed: int) -> None:
    model.requires_grad_(False)
    model.base_model.add_adapter(LoraConfig(r=4, target_modules=r"language_model\..*\.(q_proj|down_proj)"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.2, generator=generator)


@pytest.fixture(scope="module", params=["adapters", "weights"])
def folders(request: Any, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(embedder, reranker): two adapters on one trunk, or another language model for the reranker."""
    root, settings = tmp_path_factory.mktemp(request.param), load_settings(tiny_checkpoint)
    model, processor = load_backbone(tiny_checkpoint, language_head=True)
    adapters = request.param == "adapters"
    if adapters:
        add_adapter(model, seed=0)
    save_checkpoint(root / "embedder", model, processor, settings, language_head=adapters, adapter=adapters)
    model, processor = load_backbone(tiny_checkpoint, language_head=True)
    if adapters:
        add_adapter(model, seed=1)
    else:
        with torch.no_grad():
            for weight in model.model.language_model.layers.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
    save_reranker(root / "reranker", model, processor, RerankerSettings(text_max_tokens=64), adapter=adapters)
    return root / "embedder", root / "reranker"


@pytest.fixture(scope="module")
def pair_folder(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Moved after it was written: nothing in it says where it lay."""
    root = tmp_path_factory.mktemp("pair")
    save_pair(root / "draft", *folders)
    return (root / "draft").rename(root / "moved")


def test_one_trunk_equals_two_models(
    folders: tuple[Path, Path], pair_folder: Path, picture: Callable[..., Image.Image]
) -> None:
    items: list[Any] = ["a red apple", picture(0), {"text": "sliced", "image": picture(1)}]
    embedder, reranker = load_pair(pair_folder, **CPU)
    apart = Embedder(folders[0], **CPU), Reranker(folders[1], **CPU)
    np.testing.assert_allclose(embedder.encode_query(items), apart[0].encode_query(items), atol=1e-5)
    np.testing.assert_allclose(reranker.score(items[0], items), apart[1].score(items[0], items), atol=1e-5)
    # neither has changed the other
    np.testing.assert_allclose(embedder.encode_query(items), apart[0].encode_query(items), atol=1e-5)
    assert embedder.model_hash == apart[0].model_hash
    assert reranker.model_hash == apart[1].model_hash
    assert embedder.vision_hash == reranker.vision_hash


def test_each_opens_alone(folders: tuple[Path, Path], pair_folder: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    expected = Reranker(folders[1], **CPU).predict([("a", "b"), ("c", "d")])
    np.testing.assert_allclose(Reranker(pair_folder, **CPU).predict([("a", "b"), ("c", "d")]), expected, atol=1e-5)
    options: dict[str, Any] = {"device": "cpu", "model_kwargs": {"dtype": torch.float32}}
    encoder = sentence_transformers.CrossEncoder(str(pair_folder / "reranker"), **options)
    np.testing.assert_allclose(encoder.predict([("a", "b"), ("c", "d")]), expected, atol=1e-5)
    vectors = Embedder(folders[0], **CPU).encode_document(["a"])
    np.testing.assert_allclose(Embedder(pair_folder, **CPU).encode_document(["a"]), vectors, atol=1e-6)
    sentence_transformer = sentence_transformers.SentenceTransformer(str(pair_folder), **options)
    np.testing.assert_allclose(sentence_transformer.encode_document(["a"]), vectors, atol=1e-5)
    assert has_reranker(pair_folder)
    assert not has_reranker(folders[0])


def test_weights_that_both_have_are_in_memory_and_on_disk_once(folders: tuple[Path, Path], pair_folder: Path) -> None:
    embedder, reranker = load_pair(pair_folder, **CPU)
    theirs = {weight.data_ptr() for weight in embedder.model.parameters()}
    own = [name for name, weight in reranker.model.named_parameters() if weight.data_ptr() not in theirs]
    if (folders[0] / "embedder").is_dir():
        assert own and all(".lora_" in name for name in own)
    else:
        assert own and all("language_model.layers" in name for name in own)
    size = sum(file.stat().st_size for file in (pair_folder / "reranker").rglob("*.safetensors"))
    alone = sum(file.stat().st_size for file in folders[1].rglob("*.safetensors"))
    assert size < 0.7 * alone


def test_a_pair_is_made_in_place(folders: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "model")
    for _ in range(2):  # also over the pair that is there
        save_pair(tmp_path / "model", tmp_path / "model", folders[1])
    assert has_reranker(tmp_path / "model")
    assert sorted(dict(saved_tensors(tmp_path / "model" / "reranker"))) == sorted(dict(saved_tensors(folders[1])))


def test_other_eyes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, processor = load_backbone(folders[1], language_head=True)
    with torch.no_grad():
        model.model.vision_tower.embeddings.cls_token.add_(1)
    save_reranker(tmp_path / "other", model, processor, RerankerSettings())
    assert same_eyes(*folders)
    assert not same_eyes(folders[0], tmp_path / "other")
    with pytest.raises(CheckpointError, match="differ in vision tower or connector"):
        save_pair(tmp_path / "pair", folders[0], tmp_path / "other")
    assert not (tmp_path / "pair").exists()


def test_no_reranker_inside(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no reranker inside"):
        load_pair(folders[0])
    with pytest.raises(CheckpointError, match="holds no reranker"):
        save_pair(tmp_path / "pair", folders[0], folders[0])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("")
    with pytest.raises(CheckpointError, match="something else than a model"):
        save_pair(tmp_path / "thesis", *folders)


def test_language_models_of_other_sizes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, processor = load_backbone(folders[1], language_head=True)
    model.model.language_model.layers = model.model.language_model.layers[:1]
    model.config.text_config.num_hidden_layers = 1
    save_reranker(tmp_path / "short", model, processor, RerankerSettings())
    with pytest.raises(CheckpointError, match="language models of different sizes"):
        save_pair(tmp_path / "pair", folders[0], tmp_path / "short")
