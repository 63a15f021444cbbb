"""The divisor of the scores as a parameter that is trained with the weights (U-MARVEL, section on temperature)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quarterlight.errors import RecipeError

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 0.5
"""What a learnt temperature is kept within, unless told otherwise."""

NAME = "log_temperature"
"""Of the parameter in the model that is trained."""


class Temperature:
    """A temperature that is learnt: the logarithm is the parameter, so that no step makes it negative.

    It belongs to ``model`` while that is trained, so that it is saved, resumed and clipped with the other weights; it
    is out of reach of DistributedDataParallel, since every process has the gradient of the whole loss already.

    start: before the first step.  lowest, highest: it is brought back between these before every step.
    """

    def __init__(self, model: nn.Module, start: float, lowest: float, highest: float) -> None:
        self.lowest, self.highest = lowest, highest
        device = next(model.parameters()).device
        # float64 would not survive a GPU's fused optimiser beside float32, and 1-d is what sharding can hold
        self.parameter = nn.Parameter(torch.tensor([math.log(start)], dtype=torch.float32, device=device))
        model.register_parameter(NAME, self.parameter)
        ignored = [*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), NAME]
        model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]

    def clamp(self) -> None:
        """Brings it back between its bounds. A bound in the loss instead would let no gradient bring it back."""
        with torch.no_grad():
            self.parameter.clamp_(math.log(self.lowest), math.log(self.highest))

    def tensor(self) -> Tensor:
        """The temperature, ``[]``, with its graph."""
        return self.parameter.exp()[0]

    def add_gradient(self, gradient: Tensor) -> None:
        """gradient: of the loss, with respect to the parameter."""
        self.parameter.grad = gradient if self.parameter.grad is None else self.parameter.grad + gradient

    @property
    def value(self) -> float:
        """The temperature as it is saved."""
        return min(self.highest, max(self.lowest, math.exp(self.parameter.item())))


def remove_temperature(model: nn.Module) -> None:
    """Takes the parameter out of a model that has been trained."""
    if NAME in model._parameters:
        del model._parameters[NAME]


def check_temperature(temperature: float, lowest: float, highest: float, learnt: bool) -> None:
    """Raises RecipeError for a temperature that cannot be, or that begins outside the bounds it is kept within."""
    if temperature <= 0:
        raise RecipeError(f"temperature must be above 0, got {temperature}.")
    if not 0 < lowest < highest:
        raise RecipeError(f"min_temperature must be above 0 and below max_temperature, got {lowest} and {highest}.")
    if learnt and not lowest <= temperature <= highest:
        raise RecipeError(
            f"A learnt temperature must begin between min_temperature ({lowest}) and max_temperature ({highest}), got "
            f"{temperature}."
        )
