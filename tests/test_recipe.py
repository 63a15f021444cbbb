"""A recipe is read strictly: what is misspelt or misplaced is an error that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from quarterlight.errors import RecipeError
from quarterlight.recipe import STAGES, TaskRecipe, load_recipe

NANO = Path(__file__).parents[1] / "recipes" / "nano.yaml"


def test_the_nano_recipe_parses_and_names_its_numbers() -> None:
    recipe = load_recipe(NANO)
    assert recipe.model.visual_token_compression == 2
    assert recipe.mixture[0].where == {"lang": "en"}
    assert recipe.teacher is not None and recipe.teacher.loss.temperature == 0.05


def test_overrides_reach_nested_keys_lists_and_missing_sections() -> None:
    recipe = load_recipe(
        NANO,
        [
            "warmup.loss.temperature=0.02",
            "mixture.1.weight=7",
            "augment.rotation=0.5",
            "tower.optimizer.learning_rate=1e-3",
        ],
    )
    assert recipe.warmup.loss.temperature == 0.02
    assert recipe.mixture[1].weight == 7.0
    assert recipe.augment is not None and recipe.augment.rotation == 0.5
    assert recipe.tower is not None and recipe.tower.optimizer.learning_rate == 0.001


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("warmup.loss.temprature=0.1", "temprature.*Did you mean 'temperature'"),
        ("wramup.loss.temperature=0.1", "wramup.*Did you mean 'warmup'"),
        ("warmup.loss.batch_size=big", "batch_size must be of type int, got 'big'"),
        ("warmup.loss.symmetric=1", "symmetric must be of type bool"),
        ("warmup.optimizer.num_steps=true", "num_steps must be of type int"),
        ("warmup.optimizer.num_steps=0", "num_steps must be at least 1"),
        ("mixture.99.weight=1", "'99' is not a position in a list of"),
        ("mixture.0=5", "must be a mapping"),
        ("mixture=5", "must be a list"),
        ("warmup.weights={a: b}", "weights.a must be of type float"),
        ("seed.x=5", "nothing can be set below it"),
        ("model={}", "it lacks 'vision'"),
        ("model.checkpoint=somewhere", "brings its own sizes, so model.vision cannot be given"),
        ("mine=null", "no stage mine, which its stage hard_negatives asks for"),
        ("retrieve=null", "no stage retrieve, which its stage judge asks for"),
        ("model.vision_token_merging=1.5", "vision_token_merging must be a share from 0 to below 1, got 1.5"),
        ("model.vision_token_merging=-1", "vision_token_merging must be a share from 0 to below 1, got -1"),
        ("model.visual_token_compression=3", r"visual_token_compression must be one of \(1, 2, 4\), got 3"),
        ("teacher.loss.max_pixels=100", "teacher.loss.max_pixels has no effect"),
        ("devices=0", "devices must be at least 1"),
        ("mixture.0.registry=MMEB-train/CIR", "Did you mean.*MMEB-train/CIRR"),
        ("mixture.0.weight=0.0", "must be above 0"),
        ("restore.data.0.file=a.jsonl", "either a file, or a dataset and its task"),
        ("finetune.loss.fill=twice", "fill"),
        ("judge.backend=oracle", "oracle"),
        ("judge.exempt=[emoji/t2j]", "which is not judged. Did you mean"),
        ("warmup.fill_from_mined=true", "warmup.fill_from_mined is for finetune"),
        ("model.pooling=max", "model: pooling must be one of 'last_token', 'mean', got 'max'"),
        ("finetune.loss.in_batch=false", "no loss from targets to queries"),
        ("distill={optimizer: {num_steps: 1, learning_rate: 1.0}}", "no stage teach, which its stage distill asks"),
        ("teach={depth: 5, pool: both}", "teach: pool must be one of 'local', 'global', 'mixed', got 'both'"),
        ("mine.pool=mixed", "mine: pool must be one of 'local', 'global', got 'mixed'"),
        ("rerank.initial=warmup", "must be one of 'restore', 'finetune', got 'warmup'"),
        ("rerank.loss.min_negatives=6", r"max_negatives must be at least min_negatives \(6\)"),
        ("rerank.loss.max_negatives=9", "at most 8"),
        ("rerank.loss.pointwise_weight=-1.0", "pointwise_weight must not be below 0"),
        ("rerank.loss={pointwise_weight: 0, listwise_weight: 0}", "must not both be 0"),
        ("finetune.initial_weight=1.5", "initial_weight must be a share from 0 to 1"),
        ("finetune={optimizer: {num_steps: 1, learning_rate: 1}, lora: {keep: true}, initial_weight: 0.5}", "is kept"),
        ("rerank.fusion_weight=1.5", "fusion_weight must be a share from 0 to 1"),
        ("rerank.weights={emoji/t2t2: 1.0}", "does not name. Did you mean 'emoji/t2t'"),
        ("model.text.tie_word_embeddings=false", "no language head of its own"),
        ("mine.window=[60, 50]", "window"),
        ("warmup", "--set takes"),
        ("warmup.loss.temperature=[", "not valid YAML"),
        ("warmup.loss.temperature=0.0", "temperature must be above 0"),
        ("warmup.loss.eval_queries=0", "eval_queries must be at least 1"),
        ("warmup.optimizer.warmup_steps=5000", "warmup_steps must be less than num_steps"),
        ("warmup.optimizer.save_every=0", "save_every must be at least 1"),
        ("warmup.weights={emoji/t2t2: 1.0}", "does not name. Did you mean 'emoji/t2t'"),
        ("warmup.weights={emoji/t2i: 1.0}", "names more than once"),
        ("model.vision.hiden_size=128", "hiden_size.*Did you mean 'hidden_size'"),
        ("model.text.vocab_size=128", "unknown key 'vocab_size'"),
        (
            "model={vision_token_merging: 0.5, attn_implementation: flash_attention_2, checkpoint: x}",
            "vision_token_merging needs model.attn_implementation eager or sdpa, got 'flash_attention_2'",
        ),
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


def test_a_published_dataset_brings_the_instructions_of_the_paper() -> None:
    def of(task: str, **more: str) -> tuple[str | None, str | None]:
        return TaskRecipe(dataset="some", task=task, **more).instructions

    nights = "Find a day-to-day image that looks similar to the provided image."
    assert of("i2i", registry="MMEB-train/NIGHTS") == (nights, "Represent the given image.")
    assert of("i2i") == (None, None)
    assert of("t2i", registry="mmE5-synthetic") == (None, "Represent the given image.")


def test_the_stages_of_a_recipe_are_those_that_it_has() -> None:
    more = ("text_pairs", "caption_pairs", "teach", "distill", "continue_hard")  # of U-MARVEL
    assert load_recipe(NANO).stages == [one for one in STAGES if one not in more]
    short = load_recipe(NANO, ["teacher=null", "tower=null", "restore=null", "warmup.teacher_weight=0.0"])
    assert short.stages[:2] == ["start", "warmup"]
    two = load_recipe(NANO.with_name("magic_mm_2b.yaml"))
    assert two.stages == ["restore", "warmup", "mine", "hard_negatives", "retrieve", "judge", "finetune", "rerank"]
    assert two.tasks("retrieve") == two.tasks("finetune") != two.tasks("mine") == two.mixture


def test_what_the_reranker_begins_with() -> None:
    assert load_recipe(NANO).first_model("rerank") == "finetune"
    assert load_recipe(NANO, ["rerank.initial=restore"]).first_model("rerank") == "restore"
    new = ["teacher=null", "tower=null", "restore=null", "warmup.teacher_weight=0.0", "rerank.initial=restore"]
    with pytest.raises(RecipeError, match="neither a stage restore nor a checkpoint"):
        load_recipe(NANO, new)
    given = load_recipe(NANO, [*new, "model={checkpoint: somewhere}"])
    assert given.first_model("rerank") is None
    assert given.first_model("hard_negatives") == "warmup"
