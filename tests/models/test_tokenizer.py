"""A tokenizer learned from texts, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from quarterlight.models.tokenizer import ANSWERS, NAMED_TOKENS, SPECIAL_TOKENS, train_tokenizer, with_words

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
