"""The whole pipeline on the fixture: stages run, finished ones are skipped, a stopped run ends as if never stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from quarterlight.errors import DatasetError, RecipeError
from quarterlight.models.embedder import Embedder
from quarterlight.pipeline import run
from quarterlight.training.contrast import ContrastiveTrainer
from quarterlight.training.recipe import Recipe, parse

DATA = Path(__file__).parents[1] / "fixtures" / "retrieval"
STEPS = {"num_steps": 4, "learning_rate": 1e-3, "warmup_steps": 1, "save_every": 2, "log_every": 2, "num_workers": 0}


def recipe(**changes: object) -> Recipe:
    """Every stage in four steps, on a model of two narrow layers."""
    values = {
        "name": "tiny",
        "model": {
            "vocab_size": 400,
            "position_columns": 16,
            "vision": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "image_size": 64,
                "patch_size": 8,
                "layer_scale_init_value": 1.0,
            },
            "text": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "intermediate_size": 64,
            },
        },
        "augment": {},
        "validation": "test",
        "mixture": [
            {"dataset": "emoji", "task": "t2i", "weight": 1.0, "where": {"lang": "en"}},
            {"dataset": "easy_vqa", "task": "it2t", "weight": 1.0},
        ],
        "teacher": {
            "optimizer": STEPS,
            "loss": {"batch_size": 8, "eval_every": 4},
            "network": {"channels": [8, 8, 8], "embedding_size": 32, "num_ngrams": 64},
        },
        "tower": {"optimizer": STEPS, "imitation": {"batch_size": 4, "middle_layer": 1}},
        "contrast": {
            "optimizer": STEPS,
            "loss": {"batch_size": 8, "eval_every": 2, "guide_weight": 1.0, "symmetric": True},
        },
    }
    return parse(Recipe, values | changes, where="test")


def weighted(weights: dict[str, float]) -> Recipe:
    plain = recipe(teacher=None, tower=None)
    loss = replace(plain.contrast.loss, guide_weight=0.0)
    return replace(plain, contrast=replace(plain.contrast, loss=loss, weights=weights))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(recipe(), DATA, folder, report=lambda _: None)
    return folder


def test_the_result_embeds(finished: Path) -> None:
    embedder = Embedder(finished / "contrast")
    vectors = embedder.encode_query(["a red apple", "a green pear"])
    assert vectors.shape == (2, 32)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1.0, 1.0], abs=1e-5)


def test_finished_stages_are_not_run_again(finished: Path) -> None:
    said: list[str] = []
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*.safetensors")}
    run(recipe(), DATA, finished, report=said.append)
    assert said == [f"{stage}: finished before" for stage in ("start", "teacher", "tower", "contrast")]
    assert before == {file: file.stat().st_mtime_ns for file in finished.rglob("*.safetensors")}


@pytest.mark.parametrize("step", [1, 3])
def test_a_stopped_run_ends_as_if_never_stopped(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole, calls = ContrastiveTrainer.compute_loss, 0

    def stop(self, *arguments, **options):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 4 + step + 1:  # after the teacher's four steps
            raise KeyboardInterrupt
        return whole(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveTrainer, "compute_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(), DATA, tmp_path, report=lambda _: None)
    assert not (tmp_path / "contrast").exists()
    run(recipe(), DATA, tmp_path, report=lambda _: None)
    expected, got = (load_file(one / "contrast" / "model.safetensors") for one in (finished, tmp_path))
    assert all((expected[name] == got[name]).all() for name in expected)


def test_changing_a_stage_runs_it_again_but_not_those_before(finished: Path, tmp_path: Path) -> None:
    changed = recipe()
    changed = replace(changed, contrast=replace(changed.contrast, loss=replace(changed.contrast.loss, temperature=0.1)))
    said: list[str] = []
    run(changed, DATA, finished, only="tower", report=said.append)
    assert said == [f"{stage}: finished before" for stage in ("start", "teacher", "tower")]


def test_what_cannot_be_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"Did you mean .tower."):
        run(recipe(), DATA, tmp_path, only="towr", report=lambda _: None)
    with pytest.raises(DatasetError, match="no query with"):
        nobody = [{"dataset": "emoji", "task": "t2i", "weight": 1.0, "where": {"lang": "tlh"}}]
        run(recipe(mixture=nobody), DATA, tmp_path, report=lambda _: None)
    with pytest.raises(RecipeError, match=r"emoji/t2t.*Did you mean 'emoji/t2i'"):
        run(weighted({"emoji/t2t": 1.0}), DATA, tmp_path, report=lambda _: None)
    with pytest.raises(RecipeError, match="asks for a teacher"):
        run(recipe(teacher=None, tower=None), DATA, tmp_path, report=lambda _: None)
