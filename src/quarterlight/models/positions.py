"""Where a token stands, for language models that turn queries and keys along three axes (M-RoPE, arXiv:2409.12191).

L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor


class Positions(StrEnum):
    """What the three axes of M-RoPE (time, height, width) say of a visual token; backbones with one axis ignore it."""

    MROPE = "mrope"
    """its row and column in the picture, as the backbone was trained"""
    SEQUENTIAL = "sequential"
    """its place in the row of tokens, on all three axes, as in the weights that U-MARVEL's authors released"""


def rope_positions(
    ids: Sequence[int], grids: Sequence[tuple[int, int]], image_token_id: int, mode: Positions, start: int = 0
) -> Tensor:
    """Positions of tokens on three axes, int64 ``[3, L]``; what follows starts at their maximum plus one.

    A text token is one further than all before it, on all axes.  The tokens of a picture have all the same time; their
    height and width begin where the time is, and the token after the picture follows the largest of them.
    grids: rows and columns of visual tokens, after compression, of each picture in order.
    start: position of the first token.

    >>> rope_positions([7, 9, 9, 7], [(1, 2)], 9, Positions.MROPE).tolist()
    [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
    """
    if mode is Positions.SEQUENTIAL or not grids:
        return torch.arange(start, start + len(ids)).expand(3, -1)
    positions_3L = torch.empty(3, len(ids), dtype=torch.int64)
    place, following = 0, start
    visual = (torch.tensor(ids) == image_token_id).nonzero().flatten().tolist()
    seen = 0
    for rows, columns in grids:
        first = visual[seen]
        seen += rows * columns
        positions_3L[:, place:first] = torch.arange(following, following + first - place)
        following += first - place
        place = first + rows * columns
        positions_3L[0, first:place] = following
        positions_3L[1, first:place] = following + torch.arange(rows).repeat_interleave(columns)
        positions_3L[2, first:place] = following + torch.arange(columns).repeat(rows)
        following += max(rows, columns)
    positions_3L[:, place:] = torch.arange(following, following + len(ids) - place)
    return positions_3L
