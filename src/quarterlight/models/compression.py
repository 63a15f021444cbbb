"""Visual token compression: fewer visual tokens without a single new parameter (Magic-MM-Embedding, section 3.2)."""

from __future__ import annotations

from torch import Tensor, float32
from torch.nn import functional as F

FACTORS = (1, 2, 4)
"""The values that s may take; a picture costs 1/s^2 of its tokens."""


def compress(features_THWC: Tensor, factor: int) -> Tensor:
    """The feature map shrunk ``factor`` times along height and width by bilinear interpolation, ``[T, H/s, W/s, C]``.

    F' = Phi(F; H/s, W/s)  (paper, eq. 3), with pixel centres aligned (``align_corners=False``) and no prefilter.  The
    samples then lie midway between the two central rows and columns of each s x s cell, so for even s the interpolation
    is exactly the mean of the four features at the cell's centre (for s = 2: 2 x 2 average pooling).  Computed in
    float32, returned in the dtype of the input; factor 1 returns the input itself.
    Raises ValueError when the factor is not 1, 2 or 4, or does not divide height and width.
    """
    T, H, W, C = features_THWC.shape
    if factor not in FACTORS or H % factor or W % factor:
        raise ValueError(f"A {H} x {W} feature map cannot be compressed by {factor}: s is 1, 2 or 4 and divides both.")
    if factor == 1:
        return features_THWC
    cells = features_THWC.reshape(T, H // factor, factor, W // factor, factor, C)
    centre = slice(factor // 2 - 1, factor // 2 + 1)
    return cells[:, :, centre, :, centre].mean(dim=(2, 4), dtype=float32).to(features_THWC.dtype)


def compressed_grid(rows: int, columns: int, factor: int) -> tuple[int, int]:
    """Rows and columns that are left of a grid of any shape: ``max(1, rows // s)``, ``max(1, columns // s)``.

    What is asked by whoever counts tokens, positions or features, so that they cannot disagree.

    >>> compressed_grid(5, 1, 2)
    (2, 1)
    """
    return max(1, rows // factor), max(1, columns // factor)


def compress_grid(features_HWC: Tensor, factor: int) -> Tensor:
    """A feature map of any height and width shrunk to :func:`compressed_grid` by bilinear interpolation.

    Where the factor divides both sides it is :func:`compress` (for s = 2 the mean of 2 x 2 features, exactly).  An odd
    side is sampled at as many evenly spaced places as it keeps (``align_corners=False``, no prefilter), a side of 1
    stays.  Computed in float32, returned in the dtype of the input; factor 1 returns the input itself.
    """
    H, W, _ = features_HWC.shape
    if factor == 1:
        return features_HWC
    if H % factor == 0 and W % factor == 0:
        return compress(features_HWC[None], factor)[0]
    size = compressed_grid(H, W, factor)
    features_1CHW = features_HWC.movedim(-1, 0)[None].to(float32)
    smaller_1CHW = F.interpolate(features_1CHW, size=size, mode="bilinear", align_corners=False)
    return smaller_1CHW[0].movedim(0, -1).to(features_HWC.dtype)
