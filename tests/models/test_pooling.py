"""Pooled positions, by hand."""

from __future__ import annotations

import pytest
import torch

from quarterlight.models.pooling import PoolingMode, pool

HIDDEN = torch.arange(24.0).reshape(2, 4, 3)
NONE = torch.zeros(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("mask", "last"), [([[1, 1, 1, 1], [1, 1, 0, 0]], (3, 1)), ([[0, 0, 1, 1], [0, 1, 1, 1]], (3, 3))]
)
def test_last_token_on_either_side_of_the_padding(mask: list[list[int]], last: tuple[int, int]) -> None:
    pooled = pool(HIDDEN, torch.tensor(mask), NONE, PoolingMode.LAST_TOKEN)
    assert torch.equal(pooled, torch.stack([HIDDEN[0, last[0]], HIDDEN[1, last[1]]]))


def test_mean_leaves_out_padding_and_instruction() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    instruction = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])
    pooled = pool(HIDDEN.bfloat16(), mask, instruction, PoolingMode.MEAN)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled[0], (HIDDEN[0, 0] + HIDDEN[0, 3]) / 2)
    torch.testing.assert_close(pooled[1], HIDDEN[1, :3].mean(dim=0))
