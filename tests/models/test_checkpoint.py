"""Saved, reloaded, opened by sentence-transformers: the same vectors; and hashes that notice what matters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from quarterlight import Item
from quarterlight.errors import CheckpointError
from quarterlight.models.checkpoint import (
    load_backbone,
    load_settings,
    resolve_checkpoint,
    save_checkpoint,
    saved_tensors,
    weights_hash,
)
from quarterlight.models.embedder import Embedder
from quarterlight.models.internvl_vtc.modeling import InternVLVTCForConditionalGeneration
from quarterlight.models.settings import EmbedderSettings

Pictures = Callable[..., Image.Image]


@pytest.fixture
def items(picture: Pictures) -> list[Any]:
    return [
        "a red apple",
        picture(0),
        {"text": "the same, sliced", "image": picture(1, 200, 60)},
        {"image": [picture(2), picture(3)]},
        {"image": picture(4), "text": "<|im_end|> x <IMG_CONTEXT>"},
        "<|im_start|>assistant",
        "  blanks\n around  ",
        picture(5).convert("RGBA"),
    ]


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def open_cpu(folder: Path, **kwargs: Any) -> Embedder:
    return Embedder(folder, dtype=torch.float32, device="cpu", **kwargs)


@pytest.fixture(scope="module")
def sentence_transformer(tiny_checkpoint: Path) -> Any:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    return sentence_transformers.SentenceTransformer(
        str(tiny_checkpoint), device="cpu", model_kwargs={"dtype": torch.float32}
    )


@pytest.mark.parametrize("batch_size", [1, 32])
def test_sentence_transformers_gives_the_same_vectors(
    sentence_transformer: Any, tiny_embedder: Embedder, items: list[Any], batch_size: int
) -> None:
    for theirs, ours in (
        (sentence_transformer.encode_query, tiny_embedder.encode_query),
        (sentence_transformer.encode_document, tiny_embedder.encode_document),
    ):
        np.testing.assert_allclose(theirs(items, batch_size=batch_size), ours(items), rtol=0, atol=1e-5)


def test_sentence_transformers_prompts(sentence_transformer: Any, tiny_embedder: Embedder, items: list[Any]) -> None:
    encode = sentence_transformer.encode
    query, document = tiny_embedder.encode_query(items), tiny_embedder.encode_document(items)
    np.testing.assert_allclose(encode(items, prompt_name="query"), query, rtol=0, atol=1e-5)
    np.testing.assert_allclose(encode(items, prompt_name="document"), document, rtol=0, atol=1e-5)
    np.testing.assert_allclose(encode(items), document, rtol=0, atol=1e-5)

    shoes = "Find shoes like these."
    ours = tiny_embedder.encode_query(items, instruction=shoes)
    np.testing.assert_allclose(sentence_transformer.encode_query(items, prompt=shoes), ours, rtol=0, atol=1e-5)
    np.testing.assert_allclose(encode(items, prompt=f"query: {shoes}"), ours, rtol=0, atol=1e-5)
    ours = tiny_embedder.encode_document(items, instruction=shoes)
    np.testing.assert_allclose(sentence_transformer.encode_document(items, prompt=shoes), ours, rtol=0, atol=1e-5)


def test_sentence_transformers_turns_pictures_once(
    sentence_transformer: Any, tiny_embedder: Embedder, picture: Pictures, tmp_path: Path
) -> None:
    sideways = picture(6)
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "sideways.png", exif=exif)
    expected = tiny_embedder.encode_document([sideways.rotate(-90, expand=True), tmp_path / "sideways.png"])
    assert np.array_equal(expected[0], expected[1])
    theirs = sentence_transformer.encode_document(
        [Image.open(tmp_path / "sideways.png"), str(tmp_path / "sideways.png")]
    )
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=1e-5)


def test_sentence_transformers_tiles(sentence_transformer: Any, tiny_embedder: Embedder, picture: Pictures) -> None:
    page = picture(0, 256, 64)
    theirs = sentence_transformer.encode_document(
        [page], prompt="Represent the given visual documents.", processing_kwargs={"image": {"max_patches": 4}}
    )
    np.testing.assert_allclose(theirs, tiny_embedder.encode_document(Item(image=page, max_tiles=4)), rtol=0, atol=1e-5)


def test_sentence_transformers_with_system_prompt(tiny_embedder: Embedder, items: list[Any], tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    settings = EmbedderSettings(system_prompt="You are a 'search' engine.", max_tiles=2)
    folder = save_checkpoint(tmp_path / "m", tiny_embedder.model, tiny_embedder.processor, settings)
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    ours = open_cpu(folder)
    np.testing.assert_allclose(theirs.encode_query(items), ours.encode_query(items), rtol=0, atol=1e-5)
    assert np.abs(ours.encode_query(items) - tiny_embedder.encode_query(items)).max() > 1e-3
    tiny_embedder.processor.image_processor.max_patches = tiny_embedder.settings.max_tiles


def test_save_and_reload(tiny_checkpoint: Path, tmp_path: Path, items: list[Any]) -> None:
    original = open_cpu(tiny_checkpoint)
    folder = save_checkpoint(
        tmp_path / "deep/er", original.model, original.processor, original.settings, manifest={"seed": 7}
    )
    again = open_cpu(folder)
    assert np.array_equal(again.encode_query(items), original.encode_query(items))
    assert again.model_hash == original.model_hash
    assert again.settings == original.settings
    content = json.loads((folder / "quarterlight.json").read_text())
    assert content["manifest"] == {"seed": 7}
    assert content["weights_hash"] == weights_hash(saved_tensors(folder))
    assert content["visual_token_compression"] == 2
    assert content["dimension"] == 32
    assert not list((tmp_path / "deep").glob(".*"))


def test_save_in_bfloat16(tiny_checkpoint: Path, tmp_path: Path, items: list[Any]) -> None:
    original = open_cpu(tiny_checkpoint)
    folder = save_checkpoint(
        tmp_path / "half", original.model, original.processor, original.settings, dtype=torch.bfloat16
    )
    assert {tensor.dtype for _, tensor in saved_tensors(folder)} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert next(original.model.parameters()).dtype == torch.float32
    near = (open_cpu(folder).encode_query(items) * original.encode_query(items)).sum(axis=1)
    assert near.min() > 0.99


def test_save_replaces_an_embedder_and_nothing_else(copy: Path, tmp_path: Path) -> None:
    embedder = open_cpu(copy)
    (copy / "stale.txt").write_text("")
    save_checkpoint(copy, embedder.model, embedder.processor, embedder.settings)
    assert not (copy / "stale.txt").exists()
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.txt").write_text("")
    with pytest.raises(CheckpointError, match="something else than a model"):
        save_checkpoint(other, embedder.model, embedder.processor, embedder.settings)
    assert (other / "chapter1.txt").exists()


def test_bidirectional_is_written_where_others_read_it(marked: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = marked
    settings = EmbedderSettings(attention="bidirectional", pooling="mean")  # type: ignore[arg-type]
    before = model.config.to_dict()
    folder = save_checkpoint(tmp_path / "u", model, processor, settings)
    assert model.config.to_dict() == before  # a model in memory may be saved as several things
    config = json.loads((folder / "config.json").read_text())
    assert config["is_causal"] is config["text_config"]["is_causal"] is False
    assert config["masked_instruction"] == processor.tokenizer.convert_tokens_to_ids(
        ["<instruction_start>", "<instruction_end>"]
    )
    writer, _ = load_backbone(save_checkpoint(tmp_path / "h", *with_head(folder), settings, language_head=True))
    assert writer.config.text_config.is_causal is False
    writer, _ = load_backbone(tmp_path / "h", language_head=True)
    assert writer.config.text_config.is_causal is writer.config.is_causal is True
    assert writer.config.masked_instruction is None


def with_head(folder: Path) -> tuple[Any, Any]:
    """The model of a folder without a head, with one that its embeddings serve as."""
    model, processor = load_backbone(folder)
    head = InternVLVTCForConditionalGeneration(model.config)
    head.model.load_state_dict(model.state_dict())
    return head.eval(), processor


def test_model_hash_changes_with_what_changes_embeddings(copy: Path) -> None:
    hashes = {open_cpu(copy).model_hash, open_cpu(copy, truncate_dim=8).model_hash}
    assert open_cpu(copy).model_hash in hashes
    assert Embedder(copy, dtype=torch.bfloat16, device="cpu").model_hash in hashes

    weights = load_file(copy / "model.safetensors")
    weights["language_model.model.norm.weight"][0] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    hashes.add(open_cpu(copy).model_hash)

    for file, edit in {
        "quarterlight.json": lambda content: content["settings"].update(text_max_tokens=63),
        "processor_config.json": lambda content: content["image_processor"].update(image_mean=[0.5, 0.5, 0.5]),
        "config.json": lambda content: content.update(visual_token_compression=1),
    }.items():
        content = json.loads((copy / file).read_text())
        edit(content)
        (copy / file).write_text(json.dumps(content))
        hashes.add(open_cpu(copy).model_hash)
    assert len(hashes) == 6


def test_weights_hash_sees_names_and_shapes() -> None:
    one = torch.arange(4.0)
    hashes = {
        weights_hash([("a", one)]),
        weights_hash([("b", one)]),
        weights_hash([("a", one.reshape(2, 2))]),
        weights_hash([("a", one.to(torch.bfloat16))]),
        weights_hash([("a", one.flip(0))]),
    }
    assert len(hashes) == 5


def test_resolve_checkpoint_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"not a model folder: it has no config\.json"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="There is no model 'nanoo'"):
        resolve_checkpoint("nanoo")
    with pytest.raises(CheckpointError, match="There is no model"):
        resolve_checkpoint("./absent/folder")

    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="'owner/name' is not a folder here and cannot be fetched"):
        resolve_checkpoint("owner/name")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"format": 99}', "has format 99, not 1"),
        ('{"format": 1, "settings": {"max_tils": 1}}', r"unknown setting 'max_tils'\. Did you mean 'max_tiles'"),
        ('{"format": 1, "settings": {"pooling": "max"}}', "impossible setting"),
        ('{"format": 1, "settings": {"max_tiles": 0}}', "max_tiles must be at least 1"),
    ],
)
def test_damaged_settings_are_errors(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "quarterlight.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_settings(tmp_path)


def test_folder_without_settings_gets_the_defaults(copy: Path) -> None:
    (copy / "quarterlight.json").unlink()
    assert open_cpu(copy).settings == EmbedderSettings()
