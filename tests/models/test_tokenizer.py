"""A tokenizer learned from texts, saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from quarterlight.errors import CheckpointError
from quarterlight.models.checkpoint import load_backbone, save_checkpoint
from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig
from quarterlight.models.internvl_vtc.modeling import InternVLVTCForConditionalGeneration, InternVLVTCModel
from quarterlight.models.settings import EmbedderSettings
from quarterlight.models.tokenizer import (
    ANSWERS,
    NAMED_TOKENS,
    SPECIAL_TOKENS,
    train_tokenizer,
    with_markers,
    with_words,
)
from quarterlight.prompts import MARKERS

TEXTS = ["a red apple", "<|im_start|>user\nhi<|im_end|>", "naïve 北京 🍎 \x00\r\n  tail ", "don't 1234"]


def test_spells_everything(tokenizer: Any) -> None:
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens(tokenizer: Any) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    for attribute, token in NAMED_TOKENS.items():
        assert getattr(tokenizer, attribute) == token
        assert getattr(tokenizer, f"{attribute}_id") == SPECIAL_TOKENS.index(token)


def test_save_and_load(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    assert len(again) == len(tokenizer)
    assert again.context_image_token_id == tokenizer.context_image_token_id
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_size() -> None:
    tokenizer = train_tokenizer(["hello hello hello"] * 5, 270)
    assert 263 < len(tokenizer) <= 270 + len("Yes") - 1 + len("No") - 1
    assert len(tokenizer(" hello")["input_ids"]) < 6
    with pytest.raises(ValueError, match="at least 263, got 262"):
        train_tokenizer([], 262)


def test_answers_are_single_tokens(tokenizer: Any) -> None:
    """Also for a tokenizer that has never seen them; nothing else is spelt otherwise."""
    blind = train_tokenizer(["hello world, the quick brown fox"] * 20, 300)
    for one in (tokenizer, blind):
        for word in ANSWERS:
            (token,) = one(word)["input_ids"]
            assert one.decode([token]) == word
    more = with_words(blind.backend_tokenizer, ["quokka"])
    assert more.encode("quokka").tokens == ["quokka"]
    for text in TEXTS:
        assert more.encode(text).ids == blind.backend_tokenizer.encode(text).ids
    assert more.get_vocab_size() == len(blind) + len(blind.tokenize("quokka")) - 1


@pytest.mark.parametrize("padding", [0, 2, 40])
@pytest.mark.parametrize("head", ["none", "tied", "untied"])
def test_markers_are_added_once(tokenizer: Any, tiny_values: dict[str, Any], padding: int, head: str) -> None:
    """Rows beyond the tokenizer's are used before the matrix grows, and no other row changes."""
    words = len(tokenizer)
    text = tiny_values["text_config"] | {"vocab_size": words + padding, "tie_word_embeddings": head == "tied"}
    kind: Any = InternVLVTCModel if head == "none" else InternVLVTCForConditionalGeneration
    config = {**tiny_values, "text_config": text, "tie_word_embeddings": head == "tied"}

    def made(seed: int) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model, own = kind(InternVLVTCConfig(**config)), copy.deepcopy(tokenizer)
        torch.manual_seed(seed)  # which must not matter
        with_markers(model, own, seed=3)
        return model, own

    torch.manual_seed(0)
    before = kind(InternVLVTCConfig(**config)).state_dict()
    model, own = made(1)
    assert own.convert_tokens_to_ids(list(MARKERS)) == [words, words + 1, words + 2]
    rows = max(words + padding, words + 3)
    assert model.config.text_config.vocab_size == model.get_input_embeddings().num_embeddings == rows
    after, again = model.state_dict(), made(2)[0].state_dict()
    for name, weight in after.items():
        assert torch.equal(weight, again[name]), name
        old = before[name]
        if weight.shape != old.shape or "embed_tokens" in name or "lm_head" in name:
            assert torch.equal(weight[:words], old[:words])
            assert torch.equal(weight[words + 3 :], old[words + 3 :])
            assert 0.1 < weight[words : words + 3].std() < 0.3  # initializer_range is 0.2
        else:
            assert torch.equal(weight, old)
    with_markers(model, own, seed=4)
    assert all(torch.equal(weight, after[name]) for name, weight in model.state_dict().items())
    assert len(own) == words + 3


def test_markers_are_saved_with_the_model(marked: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = marked
    settings = EmbedderSettings(pooling="mean")  # type: ignore[arg-type]
    again, other = load_backbone(save_checkpoint(tmp_path / "m", model, processor, settings))
    assert other.tokenizer.get_added_vocab() == processor.tokenizer.get_added_vocab()
    assert all(other.tokenizer.added_tokens_decoder[i].special for i in other.tokenizer.convert_tokens_to_ids(MARKERS))
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_half_of_the_markers_is_an_error(tiny_checkpoint: Path) -> None:
    model, processor = load_backbone(tiny_checkpoint)
    processor.tokenizer.add_tokens(["<emb>"], special_tokens=True)
    with pytest.raises(CheckpointError, match="The tokenizer has <emb> but not all of"):
        with_markers(model, processor.tokenizer, seed=0)
