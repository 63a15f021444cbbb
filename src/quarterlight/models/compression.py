"""Visual token compression: fewer visual tokens without a single new parameter (Magic-MM-Embedding, section 3.2)."""

from __future__ import annotations

from torch import Tensor, float32

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
