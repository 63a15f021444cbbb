"""Steps, epochs and warm-up come to the numbers that the paper and the recipes mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quarterlight.errors import RecipeError
from quarterlight.training.optimizer import OptimizerRecipe


@pytest.mark.parametrize(
    ("values", "steps", "warmup"),
    [
        ({"num_steps": 900}, 900, 45),
        ({"num_steps": 900, "warmup_steps": 100}, 900, 100),
        ({"num_steps": 900, "warmup_ratio": 0.0}, 900, 0),
        # stage 2 of the paper's 2B: 16 million samples, twice, 128 on each of 48 devices
        ({"num_epochs": 2, "warmup_ratio": 0.03}, 5209, 156),
    ],
)
def test_steps_and_warm_up(tmp_path: Path, values: dict[str, Any], steps: int, warmup: int) -> None:
    recipe = OptimizerRecipe(learning_rate=2e-4, **values)
    assert recipe.steps(num_samples=16_000_000, samples_per_step=128 * 48) == steps
    arguments = recipe.arguments(tmp_path, seed=0, num_steps=steps)
    assert (arguments.max_steps, arguments.warmup_steps) == (steps, warmup)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({}, "either num_steps or num_epochs"),
        ({"num_steps": 3, "num_epochs": 1}, "either num_steps or num_epochs"),
        ({"num_steps": 3, "warmup_steps": 1, "warmup_ratio": 0.1}, "either warmup_steps or warmup_ratio"),
        ({"num_steps": 3, "warmup_steps": 3}, "peak is never reached"),
        ({"num_epochs": 0}, "num_epochs must be above 0"),
        ({"num_steps": 3, "warmup_ratio": 1.0}, "warmup_ratio"),
        ({"num_steps": 3, "gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        OptimizerRecipe(learning_rate=1e-3, **values)


def test_a_warm_up_longer_than_the_epochs_is_refused_when_they_are_counted(tmp_path: Path) -> None:
    recipe = OptimizerRecipe(num_epochs=1, warmup_steps=100, learning_rate=1e-3)
    with pytest.raises(RecipeError, match="peak is never reached"):
        recipe.arguments(tmp_path, seed=0, num_steps=recipe.steps(num_samples=50, samples_per_step=10))
