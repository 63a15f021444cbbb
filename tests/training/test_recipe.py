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
        [
            "contrast.loss.temperature=0.02",
            "mixture.1.weight=7",
            "augment.rotation=0.5",
            "tower.optimizer.learning_rate=1e-3",
        ],
    )
    assert recipe.contrast.loss.temperature == 0.02
    assert recipe.mixture[1].weight == 7.0
    assert recipe.augment is not None and recipe.augment.rotation == 0.5
    assert recipe.tower is not None and recipe.tower.optimizer.learning_rate == 0.001


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("contrast.loss.temprature=0.1", "temprature.*Did you mean 'temperature'"),
        ("contrst.loss.temperature=0.1", "contrst.*Did you mean 'contrast'"),
        ("contrast.loss.batch_size=big", "batch_size must be of type int, got 'big'"),
        ("contrast.loss.symmetric=1", "symmetric must be of type bool"),
        ("contrast.optimizer.num_steps=true", "num_steps must be of type int"),
        ("contrast.optimizer.num_steps=0", "num_steps must be at least 1"),
        ("mixture.99.weight=1", "'99' is not a position in a list of"),
        ("mixture.0=5", "must be a mapping"),
        ("mixture=5", "must be a list"),
        ("contrast.weights={a: b}", "weights.a must be of type float"),
        ("seed.x=5", "nothing can be set below it"),
        ("model={}", "lacks the key"),
        ("contrast", "--set takes"),
        ("contrast.loss.temperature=[", "not valid YAML"),
        ("contrast.loss.temperature=0.0", "temperature must be above 0"),
        ("contrast.loss.eval_queries=0", "eval_queries must be at least 1"),
        ("contrast.optimizer.warmup_steps=5000", "warmup_steps must be less than num_steps"),
        ("contrast.optimizer.save_every=0", "save_every must be at least 1"),
        ("contrast.weights={emoji/t2t2: 1.0}", "does not name. Did you mean 'emoji/t2t'"),
        ("contrast.weights={emoji/t2i: 1.0}", "names more than once"),
        ("model.vision.hiden_size=128", "hiden_size.*Did you mean 'hidden_size'"),
        ("model.text.vocab_size=128", "unknown key 'vocab_size'"),
        ("teacher=null", "no teacher stage"),
    ],
)
def test_a_bad_override_says_what_and_where(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(NANO, [override])


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(broken)
    broken.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(RecipeError, match="'seed' is given twice"):
        load_recipe(broken)
    broken.write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="no UTF-8 text"):
        load_recipe(broken)
    broken.write_text("- a\n")
    with pytest.raises(RecipeError, match="must be a mapping"):
        load_recipe(broken)
