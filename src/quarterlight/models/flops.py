"""Floating-point operations of one forward pass, from a configuration alone.

A product of [n, a] and [a, b] is 2nab operations; elementwise work, under one percent, is left out.
"""

from __future__ import annotations

from typing import Any

from quarterlight.models.backbones import backbone_of


def vision_weights(config: Any) -> int:
    """Entries of the matrices that a tile passes: patch embedding, vision tower, and connector."""
    tower = backbone_of(config).tower(config)
    return tower.num_layers * tower.layer + tower.embedding + tower.connector


def vision_flop(config: Any, tiles: float, picture_tiles: float | None = None) -> float:
    """Of tower and connector, for so many tiles. Compression, between them or behind, costs nothing to speak of; what
    looking for similar patches costs, where these are merged in the tower, is counted.

    picture_tiles: those of one picture, where they see each other; ``None`` for all of them.
    """
    tower = backbone_of(config).tower(config)
    ends = 2 * tiles * (tower.patches * tower.embedding + tower.outputs * tower.connector)
    if tower.seen:
        every = sum(2 * seen * tower.layer + 4 * seen**2 * tower.width for seen in tower.seen)
        looking = sum(
            2 * (seen // 2) * ((seen - 1) // 2) * tower.width for seen in tower.seen[:-1]
        )  # a half against the other
        return tiles * (every + looking) + ends
    seen = float(tower.sequence) if tower.tiles_are_pictures else tower.sequence * (picture_tiles or tiles)
    whole = tower.num_layers if tower.whole_layers is None else tower.whole_layers
    windowed = (tower.num_layers - whole) * min(seen, tower.window or seen)
    sequence = tiles * tower.sequence
    attention = 4 * sequence * (whole * seen + windowed) * tower.width
    layers = 2 * sequence * tower.num_layers * tower.layer + attention
    return layers + ends


def tower_tokens(config: Any) -> int:
    """Tokens of a tile in the vision tower: its patches and, of an InternVL, the CLS token."""
    return backbone_of(config).tower(config).sequence


def text_weights(config: Any) -> int:
    """Entries of the matrices of the language model's layers; its embeddings and its head are not among them."""
    text = config.text_config
    d = text.hidden_size
    attention = 2 * d * query_columns(config) + 2 * d * key_value_columns(config)
    return int(text.num_hidden_layers * (attention + 3 * d * text.intermediate_size))


def text_flop(config: Any, tokens: float) -> float:
    """Of the language model without its head, for one sequence of so many tokens, visual ones included."""
    return 2 * tokens * text_weights(config) + attention_flop(config, tokens)


def attention_flop(config: Any, tokens: float) -> float:
    """Of the scores and the mixing in :func:`text_flop`: half of the square, as attention is causal."""
    return config.text_config.num_hidden_layers * 4 * tokens**2 * query_columns(config) / 2


def query_columns(config: Any) -> int:
    """Columns of the queries of the language model, which need not be those of its hidden states."""
    text = config.text_config
    return int(text.num_attention_heads * _head_columns(text))


def key_value_columns(config: Any) -> int:
    """Columns of the keys of the language model."""
    text = config.text_config
    return int(text.num_key_value_heads * _head_columns(text))


def _head_columns(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
