"""Compression against torch's own interpolation and against average pooling."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from quarterlight.models.compression import compress


def features(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 8, 16, 5, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_bilinear_interpolation(factor: int, dtype: torch.dtype) -> None:
    maps = features(dtype)
    size = (8 // factor, 16 // factor)
    expected = functional.interpolate(maps.permute(0, 3, 1, 2).float(), size=size, mode="bilinear", align_corners=False)
    compressed = compress(maps, factor)
    assert compressed.dtype == dtype
    torch.testing.assert_close(compressed, expected.permute(0, 2, 3, 1).to(dtype), rtol=0, atol=1e-6)


def test_two_is_average_pooling() -> None:
    maps = features()
    expected = functional.avg_pool2d(maps.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    torch.testing.assert_close(compress(maps, 2), expected, rtol=0, atol=1e-6)


def test_one_is_the_input_itself() -> None:
    maps = features()
    assert compress(maps, 1) is maps


@pytest.mark.parametrize(
    ("factor", "shape"), [(3, (1, 6, 6, 1)), (2, (1, 6, 5, 1)), (4, (1, 6, 8, 1)), (0, (1, 2, 2, 1))]
)
def test_refuses_what_does_not_divide(factor: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be compressed"):
        compress(torch.zeros(shape), factor)


def test_gradient() -> None:
    maps = torch.randn(1, 4, 4, 2, dtype=torch.float64, requires_grad=True)
    compress(maps, 2).sum().backward()
    assert maps.grad is not None
    torch.testing.assert_close(maps.grad, torch.full_like(maps, 0.25), check_dtype=False)
