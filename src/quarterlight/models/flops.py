"""Floating-point operations of one forward pass, from a configuration alone.

A product of [n, a] and [a, b] is 2nab operations; elementwise work, under one percent, is left out.
"""

from __future__ import annotations

from typing import Any


def vision_weights(config: Any) -> int:
    """Entries of the matrices that a tile passes: patch embedding, vision tower, and connector."""
    vision = config.vision_config
    return _tower_layers(vision) + _patch_embedding(vision) + _connector(config)


def vision_flop(config: Any, tiles: float) -> float:
    """Of tower and connector, for so many tiles. Compression comes between them and costs nothing to speak of."""
    vision = config.vision_config
    sequence = tower_tokens(config)
    patches = sequence - 1
    attention = vision.num_hidden_layers * 4 * sequence**2 * vision.hidden_size
    tower = 2 * sequence * _tower_layers(vision) + 2 * patches * _patch_embedding(vision) + attention
    return tiles * (tower + 2 * config.image_seq_length * _connector(config))


def tower_tokens(config: Any) -> int:
    """Tokens of a tile in the vision tower: its patches, and the CLS token."""
    vision = config.vision_config
    return 1 + (vision.image_size[0] // vision.patch_size[0]) * (vision.image_size[1] // vision.patch_size[1])


def text_weights(config: Any) -> int:
    """Entries of the matrices of the language model's layers; its embeddings and its head are not among them."""
    text = config.text_config
    d, grouped = text.hidden_size, key_value_columns(config)
    return text.num_hidden_layers * (2 * d * d + 2 * d * grouped + 3 * d * text.intermediate_size)


def text_flop(config: Any, tokens: float) -> float:
    """Of the language model without its head, for one sequence of so many tokens, visual ones included."""
    return 2 * tokens * text_weights(config) + attention_flop(config, tokens)


def attention_flop(config: Any, tokens: float) -> float:
    """Of the scores and the mixing in :func:`text_flop`: half of the square, as attention is causal."""
    text = config.text_config
    return text.num_hidden_layers * 4 * tokens**2 * text.hidden_size / 2


def key_value_columns(config: Any) -> int:
    """Columns of the keys of the language model."""
    text = config.text_config
    return text.hidden_size * text.num_key_value_heads // text.num_attention_heads


def _tower_layers(vision: Any) -> int:
    d = vision.hidden_size
    return vision.num_hidden_layers * (4 * d * d + 2 * d * vision.intermediate_size)


def _patch_embedding(vision: Any) -> int:
    return 3 * vision.patch_size[0] * vision.patch_size[1] * vision.hidden_size


def _connector(config: Any) -> int:
    """Two layers behind the pixel shuffle, which puts four patches side by side."""
    d = config.text_config.hidden_size
    return 4 * config.vision_config.hidden_size * d + d * d
