"""A byte-level BPE tokenizer like Qwen2's, with InternVL's special tokens, learned from texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
"""Attributes that InternVL's processor reads from its tokenizer."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMED_TOKENS.values())
"""In the order of their ids, 0 and up."""


ANSWERS = ("Yes", "No")
"""Words that are one token each whatever the texts: what a reranker answers."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """A tokenizer with at most ``vocab_size`` entries, special tokens included, that can spell every string.

    It has beside these the few that make one token of each of :data:`ANSWERS`.
    Raises ValueError when there is no room for the 256 bytes and the special tokens.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size must be at least {256 + len(SPECIAL_TOKENS)}, got {vocab_size}.")
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return Qwen2Tokenizer(
        tokenizer_object=with_words(bpe, ANSWERS),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,  # type: ignore[arg-type]  # bytes spell everything
        model_specific_special_tokens=NAMED_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def with_words(bpe: Tokenizer, words: Sequence[str]) -> Tokenizer:
    """The tokenizer with new entries, behind those it has, and merges of least priority: each word becomes one token.

    Other texts are spelt as before, but for those whose spelling holds the pieces of a word side by side.
    """
    state = json.loads(bpe.to_str())
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    for word in words:
        pieces = bpe.encode(word, add_special_tokens=False).tokens
        while len(pieces) > 1:
            first, second, *rest = pieces
            merges.append([first, second])
            vocabulary.setdefault(first + second, len(vocabulary))
            pieces = [first + second, *rest]
    return Tokenizer.from_str(json.dumps(state))
