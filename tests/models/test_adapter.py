"""Folders with a language head or a kept adapter: the same vectors through every door, wherever the folder lies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from quarterlight.errors import CheckpointError
from quarterlight.models import checkpoint
from quarterlight.models.adapter import has_adapter, merge_lora
from quarterlight.models.checkpoint import load_backbone, load_settings, save_checkpoint, saved_tensors, weights_hash
from quarterlight.models.embedder import Embedder
from quarterlight.models.internvl_vtc import (
    InternVLVTCConfig,
    InternVLVTCForConditionalGeneration,
    InternVLVTCModel,
    InternVLVTCProcessor,
)
from quarterlight.models.settings import EmbedderSettings

IDS = torch.tensor([[7, 8, 9, 10]])


def open_cpu(folder: Path, **kwargs: Any) -> Embedder:
    return Embedder(folder, dtype=torch.float32, device="cpu", **kwargs)


def open_sentence_transformer(folder: Path) -> Any:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})


@pytest.fixture(scope="module")
def items(picture: Callable[..., Image.Image]) -> list[Any]:
    return ["a red apple", picture(0), {"text": "the same, sliced", "image": picture(1, 200, 60)}]


def adapted(folder: Path, *, language_head: bool = False) -> tuple[Any, InternVLVTCProcessor]:
    """The model of a folder with an adapter that does something."""
    model, processor = load_backbone(folder, language_head=language_head)
    model.requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r"language_model\..*\.(q_proj|down_proj)")
    model.base_model.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.1, generator=generator)
    return model, processor


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, items: list[Any]) -> dict[str, Any]:
    """An adapter kept in ``here/kept``, merged in ``here/merged``, and the embeddings before either was saved."""
    here = tmp_path_factory.mktemp("made")
    settings = load_settings(tiny_checkpoint)
    model, processor = adapted(tiny_checkpoint)
    expected = Embedder.from_model(model, processor, settings).encode_query(items)
    kept = save_checkpoint(here / "kept", model, processor, settings, adapter=True)
    merge_lora(model)
    merged = save_checkpoint(here / "merged", model, processor, settings)
    return {"kept": kept, "merged": merged, "expected": expected}


@pytest.fixture
def kept(made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy elsewhere, opened from a third place."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return Path(shutil.copytree(made["kept"], tmp_path / "moved"))


# peft 0.21 asks transformers 5.23 by a name that will go
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_kept_equals_merged_through_every_door(
    made: dict[str, Any], kept: Path, tiny_embedder: Embedder, items: list[Any]
) -> None:
    expected = made["expected"]
    assert np.abs(expected - tiny_embedder.encode_query(items)).max() > 0.05
    bare = AutoModel.from_pretrained(kept, adapter_kwargs={"subfolder": "embedder"}, dtype=torch.float32).eval()
    with_peft = PeftModel.from_pretrained(AutoModel.from_pretrained(kept), kept, subfolder="embedder").eval()
    doors = {
        "merged": open_cpu(made["merged"]),
        "kept": open_cpu(kept),
        "merged, sentence-transformers": open_sentence_transformer(made["merged"]),
        "kept, sentence-transformers": open_sentence_transformer(kept),
        "kept, transformers": Embedder.from_model(bare, tiny_embedder.processor, tiny_embedder.settings),
        "kept, peft": Embedder.from_model(with_peft.base_model.model, tiny_embedder.processor, tiny_embedder.settings),
    }
    for name, one in doors.items():
        np.testing.assert_allclose(one.encode_query(items), expected, rtol=0, atol=1e-5, err_msg=name)


def test_nothing_in_the_folder_says_where_it_was_made(made: dict[str, Any], tiny_checkpoint: Path) -> None:
    for file in made["kept"].rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert str(made["kept"].parent).encode() not in content, file
            assert str(tiny_checkpoint.parent).encode() not in content, file


def test_the_weights_beside_the_adapter_are_the_base(made: dict[str, Any], tiny_checkpoint: Path) -> None:
    base, kept = (load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, made["kept"]))
    assert base.keys() == kept.keys()
    assert all(torch.equal(weight, kept[name]) for name, weight in base.items())
    assert json.loads((made["kept"] / "quarterlight.json").read_text())["adapter"] == "embedder"
    assert json.loads((made["merged"] / "quarterlight.json").read_text())["adapter"] is None


def test_a_loaded_adapter_is_merged(made: dict[str, Any], tmp_path: Path, items: list[Any]) -> None:
    model, processor = load_backbone(made["kept"])
    assert type(model) is InternVLVTCModel
    assert not has_adapter(model)
    assert all(weight.requires_grad for weight in model.parameters())
    folder = save_checkpoint(tmp_path / "again", model, processor, load_settings(made["kept"]))
    np.testing.assert_allclose(open_cpu(folder).encode_query(items), made["expected"], rtol=0, atol=1e-5)


def test_model_hash_covers_the_adapter(made: dict[str, Any], kept: Path, tiny_embedder: Embedder) -> None:
    hashes = {tiny_embedder.model_hash, open_cpu(made["merged"]).model_hash, open_cpu(made["kept"]).model_hash}
    assert len(hashes) == 3
    assert open_cpu(kept).model_hash in hashes

    config = json.loads((kept / "embedder/adapter_config.json").read_text())
    (kept / "embedder/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7}))
    hashes.add(open_cpu(kept).model_hash)
    weights = load_file(kept / "embedder/adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] += 1e-3
    save_file(weights, kept / "embedder/adapter_model.safetensors", metadata={"format": "pt"})
    hashes.add(open_cpu(kept).model_hash)
    assert len(hashes) == 5


def test_adapter_in_bfloat16(tiny_checkpoint: Path, tmp_path: Path, made: dict[str, Any], items: list[Any]) -> None:
    model, processor = adapted(tiny_checkpoint)
    folder = save_checkpoint(
        tmp_path / "half", model, processor, load_settings(tiny_checkpoint), adapter=True, dtype=torch.bfloat16
    )
    assert {tensor.dtype for _, tensor in saved_tensors(folder)} == {torch.bfloat16}
    for door in (open_cpu(folder), open_sentence_transformer(folder)):
        assert (door.encode_query(items) * made["expected"]).sum(axis=1).min() > 0.99


def test_half_precision_base_with_a_full_precision_adapter(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As training leaves it where frozen weights are bfloat16."""
    model, processor = load_backbone(tiny_checkpoint, dtype=torch.bfloat16)
    model.add_adapter(LoraConfig(r=4, target_modules=r"language_model\..*\.q_proj"))
    for name, weight in model.named_parameters():
        weight.data = weight.data.float() if ".lora_" in name else weight.data
    folder = save_checkpoint(tmp_path / "mixed", model, processor, load_settings(tiny_checkpoint), adapter=True)
    dtypes = {(".lora_" in name, tensor.dtype) for name, tensor in saved_tensors(folder)}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {weight.dtype for weight in load_backbone(folder, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def lose_adapter(folder: Path) -> None:
    shutil.rmtree(folder / "embedder")


def lose_adapter_weights(folder: Path) -> None:
    (folder / "embedder/adapter_model.safetensors").unlink()


def cut_adapter_weights(folder: Path) -> None:
    file = folder / "embedder/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def lose_one_weight(folder: Path) -> None:
    file = folder / "embedder/adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(min(weights))
    save_file(weights, file, metadata={"format": "pt"})


def claim_another_rank(folder: Path) -> None:
    file = folder / "embedder/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 8}))


def cut_base_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_adapter, "cannot be loaded: .*adapter_config"),
        (lose_adapter_weights, r"cannot be loaded: .*adapter_model\.safetensors"),
        (cut_adapter_weights, "cannot be loaded"),
        (lose_one_weight, r"lacks 1 of the model's weights, .*lora_A"),
        (claim_another_rank, "cannot be loaded"),
        (cut_base_weights, "cannot be loaded"),
    ],
)
def test_damaged_folders_are_errors(kept: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(kept)
    with pytest.raises(CheckpointError, match=message):
        open_cpu(kept)


def test_without_peft(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "is_peft_available", lambda: False)
    with pytest.raises(CheckpointError, match=r"needs peft: pip install -e '\.\[train\]'"):
        open_cpu(kept)


def test_saving_asks_for_what_there_is(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = load_settings(tiny_checkpoint)
    plain, processor = load_backbone(tiny_checkpoint)
    with pytest.raises(CheckpointError, match="no language head to save"):
        save_checkpoint(tmp_path / "a", plain, processor, settings, language_head=True)
    with pytest.raises(CheckpointError, match="no LoRA adapter to save"):
        save_checkpoint(tmp_path / "a", plain, processor, settings, adapter=True)
    with pytest.raises(CheckpointError, match="has a LoRA adapter inside"):
        save_checkpoint(tmp_path / "a", adapted(tiny_checkpoint)[0], processor, settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_language_head(
    tiny_values: dict[str, Any],
    tokenizer: Any,
    image_processor: Any,
    tmp_path: Path,
    items: list[Any],
    tied: bool,
    dtype: torch.dtype | None,
) -> None:
    torch.manual_seed(4)
    text = tiny_values["text_config"] | {"tie_word_embeddings": tied}
    config = InternVLVTCConfig(
        **(tiny_values | {"text_config": text}), tie_word_embeddings=tied, visual_token_compression=2
    )
    model = InternVLVTCForConditionalGeneration(config).eval()
    processor = InternVLVTCProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
    settings = EmbedderSettings(text_max_tokens=64)
    folder = save_checkpoint(tmp_path / "trunk", model, processor, settings, dtype=dtype, language_head=True)

    heads = [name for name, _ in saved_tensors(folder) if "lm_head" in name]
    assert len(heads) == (0 if tied else 1)
    content = json.loads((folder / "quarterlight.json").read_text())
    assert content["language_head"] is True
    assert content["weights_hash"] == weights_hash(saved_tensors(folder))

    again, _ = load_backbone(folder, language_head=True)
    for (name, weight), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(weight.to(dtype or weight.dtype).float(), other), name
    if dtype is None:
        expected = Embedder.from_model(model, processor, settings).encode_query(items)
        np.testing.assert_allclose(open_cpu(folder).encode_query(items), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(open_sentence_transformer(folder).encode_query(items), expected, rtol=0, atol=1e-5)


def test_head_is_left_out_unless_asked_for(
    tiny_values: dict[str, Any], tiny_embedder: Embedder, tmp_path: Path
) -> None:
    text = tiny_values["text_config"] | {"tie_word_embeddings": False}
    config = InternVLVTCConfig(
        **(tiny_values | {"text_config": text}), tie_word_embeddings=False, visual_token_compression=2
    )
    model = InternVLVTCForConditionalGeneration(config)
    folder = save_checkpoint(tmp_path / "headless", model, tiny_embedder.processor, tiny_embedder.settings)
    assert json.loads((folder / "quarterlight.json").read_text())["language_head"] is False
    with pytest.raises(CheckpointError, match=r"lacks 1 of the model's weights, lm_head\.weight among them"):
        load_backbone(folder, language_head=True)


@torch.inference_mode()
def test_trunk_with_head_and_adapter(
    tiny_checkpoint: Path, tmp_path: Path, made: dict[str, Any], items: list[Any]
) -> None:
    """The head belongs to the trunk: what it writes does not change when an embedder's adapter lies beside it."""
    before, _ = load_backbone(tiny_checkpoint, language_head=True)
    model, processor = adapted(tiny_checkpoint, language_head=True)
    settings = load_settings(tiny_checkpoint)
    folder = save_checkpoint(tmp_path / "both", model, processor, settings, language_head=True, adapter=True)
    again, _ = load_backbone(folder, language_head=True)
    assert torch.equal(again(input_ids=IDS).logits, before(input_ids=IDS).logits)
    np.testing.assert_allclose(open_cpu(folder).encode_query(items), made["expected"], rtol=0, atol=1e-5)
    theirs = open_sentence_transformer(folder).encode_query(items)
    np.testing.assert_allclose(theirs, made["expected"], rtol=0, atol=1e-5)
