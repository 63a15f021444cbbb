"""Small random changes of pictures that keep what they show.

B pictures, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class AugmentRecipe:
    """How far a picture may stray. No mirroring and no change of hue: arrows point and colours are asked for."""

    scale: float = 0.17
    """sides are divided by 1 +- up to this"""
    aspect: float = 0.1
    """width is divided, and height multiplied, by 1 +- up to this"""
    rotation: float = 0.17
    """radians, either way"""
    shift: float = 0.125
    """of the side, either way"""
    contrast: float = 0.15
    """factor around mid-grey, up to 1 +- this"""
    brightness: float = 10.0
    """added to each colour channel, of 255, either way"""


def draw(count: int, *, seed: int, step: int) -> Tensor:
    """The chance in the changes of so many pictures of a step, float32 ``[count, 9]`` in 0..1.

    Drawn apart from the pictures, so that a picture changes alike whatever chunk or process it falls to.
    """
    mixed = int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])
    return torch.rand(count, 9, generator=torch.Generator().manual_seed(mixed))


def augment(pictures_BHW3: Tensor, recipe: AugmentRecipe, chance_B9: Tensor) -> Tensor:
    """Each picture under its own random affine map and colour change, float32 ``[B, H, W, 3]`` in 0..255.

    pictures_BHW3: in 0..255, any dtype.  What moves in from outside is white.  chance_B9: of :func:`draw`.
    """
    one_B9 = chance_B9 * 2 - 1
    scale, aspect, angle = 1 + one_B9[:, 0] * recipe.scale, 1 + one_B9[:, 1] * recipe.aspect, one_B9[:, 2]
    angle = angle * recipe.rotation
    shift_B2 = 2 * one_B9[:, 3:5] * recipe.shift  # the map's unit is half a side
    cos, sin = scale * angle.cos(), scale * angle.sin()
    map_B23 = torch.stack(
        [torch.stack([cos * aspect, -sin, shift_B2[:, 0]], 1), torch.stack([sin, cos / aspect, shift_B2[:, 1]], 1)], 1
    )
    pictures_B3HW = pictures_BHW3.movedim(-1, 1).float() - 255  # zero is white while the frame moves
    grid = F.affine_grid(map_B23, list(pictures_B3HW.shape), align_corners=False)
    pictures_B3HW = F.grid_sample(pictures_B3HW, grid, align_corners=False) + 255
    factor = 1 + one_B9[:, 5, None, None, None] * recipe.contrast
    offset = one_B9[:, 6:, None, None] * recipe.brightness
    return ((pictures_B3HW - 128) * factor + 128 + offset).clamp(0, 255).movedim(1, -1)
