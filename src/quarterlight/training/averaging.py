"""The average of a model before and after training, which often finds more than either."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def average(model: nn.Module, initial: nn.Module, initial_weight: float) -> None:
    """Moves a trained model's weights, in place, part of the way back to those that its training began with.

    Each becomes ``(1 - initial_weight) * trained + initial_weight * initial`` (WiSE-FT, arXiv:2109.01903, eq. 1, whose
    alpha is the other share).
    initial: a model with the same names of weights, in any precision.
    """
    begun = dict(initial.named_parameters())
    for name, weight in model.named_parameters():
        weight.lerp_(begun[name].to(weight), initial_weight)
