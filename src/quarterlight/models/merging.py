"""Fewer hidden states inside a vision tower, without a single new parameter: patches that are alike become one.

After a layer, patches are dealt out into two halves; each of the first half finds the most similar one of the second,
and the most similar pairs become their mean, weighted by how many patches each of the two already stands for (Token
Merging, arXiv:2210.09461, section 3).  That is for classification, where what is merged stays merged.  Here a grid of
patches must come out again, so two things are different.  At the end every patch is given its place back, and is what
it was itself plus *what the layers added* to the token that it was merged into: a layer's output is its input plus
something, so that only the something is shared.  And halves are dealt out along rows that turn at their ends, first
left to right, then right to left, so that at first all neighbours of a patch are in the other half.

The choice of pairs is discrete: where two pairs are equally similar up to rounding, rounding decides which is merged.

T tiles; N patches, M of them left, A and B in the two halves; R leave, K stay; C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

MERGING = "vision_token_merging"
"""Name of the setting in the configuration of a model."""

MASKED_ATTENTION = ("eager", "sdpa")
"""Implementations of attention that can be given how many patches a hidden state stands for."""


def merges(num_patches: int, num_layers: int, share: float) -> list[int]:
    """How many patches of a tile disappear after each layer, ``[num_layers]``, evenly; none after the last.

    share: of the patches that are gone before the last layer, from 0 to below 1.
    Raises ValueError when there are too few layers for so many: none can take more than half of what is left.

    >>> merges(64, 6, 0.5)
    [6, 7, 6, 7, 6, 0]
    """
    if not 0 <= share < 1:
        raise ValueError(f"vision_token_merging must be a share from 0 to below 1, got {share}.")
    gone = [round(share * num_patches * layer / max(1, num_layers - 1)) for layer in range(num_layers)]
    found = [after - before for before, after in pairwise(gone)]
    feasible = all(2 * more <= num_patches - before for before, more in zip(gone[:-1], found, strict=True))
    if share and not (found and feasible):
        raise ValueError(
            f"vision_token_merging={share} is too much for a tower of {num_layers} layers and {num_patches} patches: "
            "after a layer, at most half of the patches that are left can be merged. Give a smaller share."
        )
    return [*found, 0]


@dataclass(frozen=True)
class Merged:
    """Hidden states of tiles, of which some stand for several patches.

    hidden_TMC: those that are left.
    size_TM: how many patches each stands for; float32, sums to N.
    place_TN: which of them each patch is in; int64.
    offset_TNC: how far each patch was from what it was merged into; ``None`` while nothing is merged.
    """

    hidden_TMC: Tensor
    size_TM: Tensor
    place_TN: Tensor
    offset_TNC: Tensor | None = None

    @classmethod
    def of(cls, hidden_TNC: Tensor) -> Merged:
        """Patches of a square grid, row by row, none of them merged."""
        T, N, _ = hidden_TNC.shape
        order_N = turning_order(N, hidden_TNC.device)
        place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(N, device=order_N.device))
        ones_TN = torch.ones(T, N, device=hidden_TNC.device)
        return cls(hidden_TNC[:, order_N], ones_TN, place_N.expand(T, N))

    def merge(self, count: int) -> Merged:
        """The same with ``count`` fewer of them in every tile.

        The choice has no gradient, the mean has.  Raises ValueError when there are too few.
        """
        M, C = self.hidden_TMC.shape[1:]
        if not 0 <= count <= M // 2:
            raise ValueError(f"From 0 to {M // 2} of {M} hidden states can be merged at once, got {count}.")
        if not count:
            return self
        gone_TR, into_TR = most_similar(self.hidden_TMC, count)
        leaves_TM = torch.zeros_like(self.size_TM, dtype=torch.bool).scatter_(1, gone_TR, True)
        stays_TK = leaves_TM.to(torch.uint8).argsort(dim=1, stable=True)[:, : M - count]
        # counting those that stay gives them their new places; then those that leave take that of their partner
        new_TM = (~leaves_TM).cumsum(dim=1) - 1
        new_TR = new_TM.gather(1, into_TR)
        new_TM = new_TM.scatter(1, gone_TR, new_TR)
        size_TK = self.size_TM.gather(1, stays_TK).scatter_add(1, new_TR, self.size_TM.gather(1, gone_TR))
        # a + (b - a) * its share: a token that nothing is merged into stays exactly as it is
        kept_TKC = rows(self.hidden_TMC, stays_TK)
        share_TR = self.size_TM.gather(1, gone_TR) / size_TK.gather(1, new_TR)
        apart_TRC = rows(self.hidden_TMC, gone_TR) - rows(self.hidden_TMC, into_TR)
        added_TRC = share_TR[..., None].to(apart_TRC.dtype) * apart_TRC
        hidden_TKC = kept_TKC.scatter_add(1, new_TR[..., None].expand(-1, -1, C), added_TRC)
        place_TN = new_TM.gather(1, self.place_TN)
        offset_TNC = rows(self.hidden_TMC, self.place_TN) - rows(hidden_TKC, place_TN)
        if self.offset_TNC is not None:
            offset_TNC = offset_TNC + self.offset_TNC
        return Merged(hidden_TKC, size_TK, place_TN, offset_TNC)

    def with_hidden(self, hidden_TMC: Tensor) -> Merged:
        """The same after a layer."""
        return Merged(hidden_TMC, self.size_TM, self.place_TN, self.offset_TNC)

    def unmerge(self) -> Tensor:
        """Every patch in its place again, ``[T, N, C]``."""
        hidden_TNC = rows(self.hidden_TMC, self.place_TN)
        return hidden_TNC if self.offset_TNC is None else hidden_TNC + self.offset_TNC


def rows(hidden_TMC: Tensor, index_TK: Tensor) -> Tensor:
    """Some rows of each tile, ``[T, K, C]``."""
    return hidden_TMC.gather(1, index_TK[..., None].expand(-1, -1, hidden_TMC.shape[2]))


def turning_order(num_patches: int, device: torch.device | None = None) -> Tensor:
    """Patches of a square grid in rows that turn at the end, int64 ``[N]``; in the order of rows where N is no square.

    Of a grid with an even side, every second one of them makes a chequerboard.

    >>> turning_order(16).tolist()
    [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11, 15, 14, 13, 12]
    """
    side = round(num_patches**0.5)
    order_N = torch.arange(num_patches, device=device)
    if side * side == num_patches:
        order_N.view(side, side)[1::2] = order_N.view(side, side)[1::2].flip(1)
    return order_N


@torch.no_grad()
def most_similar(hidden_TMC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` rows of even number in each tile, and the row of odd number that each is most like by cosine.

    Both int64 ``[T, count]``: those with the greatest cosines, in ascending order; of equals, the first.  In float32.
    """
    with torch.autocast(hidden_TMC.device.type, enabled=False):
        unit_TMC = F.normalize(hidden_TMC.float() if hidden_TMC.dtype != torch.float64 else hidden_TMC, dim=2)
        best_TA, partner_TA = (unit_TMC[:, ::2] @ unit_TMC[:, 1::2].transpose(1, 2)).max(dim=2)
    chosen_TR = best_TA.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
    return 2 * chosen_TR, 2 * partner_TA.gather(1, chosen_TR) + 1


def lengths(num_patches: int, removed: Sequence[int]) -> list[int]:
    """Patches of a tile that each layer sees; removed: of :func:`merges`.

    >>> lengths(64, merges(64, 6, 0.5))
    [64, 58, 51, 45, 38, 32]
    """
    left = [num_patches]
    for count in removed[:-1]:
        left.append(left[-1] - count)
    return left
