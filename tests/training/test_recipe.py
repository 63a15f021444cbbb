"""A recipe is read strictly: what is misspelt or misplaced is an error that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from quarterlight.errors import RecipeError
from quarterlight.training.recipe import load_recipe

NANO = Path(__file__).parents[2] / "recipes" / "nano.yaml"


def test_the_nano_recipe_parses_and_names_its_numbers() -> None:
    recipe = load_recipe(NANO)
    assert recipe.model.visual_token_compression == 2
    assert recipe.mixture[0].where == {"lang": "en"}
    assert recipe.teacher is not None and recipe.teacher.loss.temperature == 0.05


def test_overrides_reach_nested_keys_lists_and_missing_sections() -> None:
    recipe = load_recipe(
        NANO,
        ["contrast.loss.temperature=0.02", "mixture.1.weight=7", "augment.rotation=0.5", "teacher=null", "tower=null"],
    )
    assert recipe.contrast.loss.temperature == 0.02
    assert recipe.mixture[1].weight == 7.0
    assert recipe.augment is not None and recipe.augment.rotation == 0.5
    assert recipe.teacher is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("contrast.loss.temprature=0.1", "temprature.*Did you mean 'temperature'"),
        ("contrst.loss.temperature=0.1", "contrst.*Did you mean 'contrast'"),
        ("contrast.loss.batch_size=big", "batch_size must be of type int, got 'big'"),
        ("contrast.loss.symmetric=1", "symmetric must be of type bool"),
        ("contrast.optimizer.num_steps=true", "num_steps must be of type int"),
        ("contrast.optimizer.num_steps=0", "num_steps of at least 1"),
        ("mixture.99.weight=1", "'99' is not a position in a list of"),
        ("mixture.0=5", "must be a mapping"),
        ("mixture=5", "must be a list"),
        ("contrast.weights={a: b}", "weights.a must be of type float"),
        ("seed.x=5", "nothing can be set below it"),
        ("model={}", "lacks the key"),
        ("contrast", "--set takes"),
    ],
)
def test_a_bad_override_says_what_and_where(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(NANO, [override])


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="There is no recipe"):
        load_recipe(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(broken)
    broken.write_text("- a\n")
    with pytest.raises(RecipeError, match="must be a mapping"):
        load_recipe(broken)
