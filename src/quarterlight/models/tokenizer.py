"""A byte-level BPE tokenizer like Qwen2's, with InternVL's special tokens, learned from texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from quarterlight.errors import CheckpointError
from quarterlight.prompts import MARKERS

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


def with_markers(model: Any, tokenizer: Any, *, seed: int) -> None:
    """Adds :data:`~quarterlight.prompts.MARKERS` to a tokenizer, and their embeddings to its model.

    Both are changed in place, once: what has the markers, and rows for them, stays as it is.  Save the model
    afterwards, and they come with it; loading never adds any.  A published matrix has often more rows than its
    tokenizer has words: the markers take the first of these, and the matrix only grows where it has none left.
    model: with or without a language head, and before LoRA.  seed: decides the rows, which are drawn as those of a new
    model are, from a normal distribution with ``initializer_range`` as its standard deviation, in float32.
    Raises CheckpointError for a tokenizer that has some of the markers only.
    """
    known = tokenizer.get_added_vocab()
    if present := [one for one in MARKERS if one in known]:
        if len(present) < len(MARKERS):
            raise CheckpointError(
                f"The tokenizer has {', '.join(present)} but not all of {', '.join(MARKERS)}: it was made for "
                "something else, and its model cannot be given the others."
            )
    else:
        added = [AddedToken(one, special=True, normalized=False) for one in MARKERS]
        tokenizer.add_tokens(added, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(list(MARKERS))
    rows = model.get_input_embeddings().num_embeddings
    if present and max(ids) < rows:
        return
    if max(ids) >= rows:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    text: Any = model.config.get_text_config()
    matrices = {id(one.weight): one.weight for one in (model.get_input_embeddings(), _head(model)) if one is not None}
    for number, weight in enumerate(matrices.values()):  # one if the head is tied
        generator = torch.Generator().manual_seed(seed + number)
        drawn = torch.randn(len(ids), weight.shape[1], generator=generator) * text.initializer_range
        with torch.no_grad():
            weight[ids] = drawn.to(weight)


def _head(model: Any) -> Any:
    return None if model.base_model is model else model.get_output_embeddings()
