"""Training resumes to the bit, leaves out what cannot be read, and says why it stops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.runs import NUM_QUERIES, embedder, mixed_task, optimizer, step, trainer

from quarterlight.data.contrastive import TaskMixture
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError, RecipeError
from quarterlight.records import Item
from quarterlight.training import trouble
from quarterlight.training.contrast import ContrastiveTrainer, ContrastRecipe, train_contrastive
from quarterlight.training.optimizer import OptimizerRecipe

LOSS = {"batch_size": 6, "num_negatives": 1, "temperature": 0.1, "chunk_tokens": 400, "eval_every": 2}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> RetrievalTask:
    return mixed_task(tmp_path_factory.mktemp("pictures"))


def train(
    checkpoint: Path, task: RetrievalTask, folder: Path, recipe: OptimizerRecipe, *, lora: bool = False, **loss: Any
) -> tuple[dict[str, torch.Tensor], ContrastiveTrainer]:
    model, encode = embedder(checkpoint, dropout=0.1)
    if lora:  # as adapters do: only a part is trained
        model.requires_grad_(False)
        model.backbone.language_model.layers[0].requires_grad_(True)
    one = train_contrastive(
        model,
        encode=encode,
        mixture=TaskMixture(tasks=[task]),
        validation=[task],
        recipe=ContrastRecipe(**(LOSS | loss)),
        optimizer=recipe,
        folder=folder,
        seed=0,
    )
    return {name: one.detach().clone() for name, one in model.state_dict().items()}, one


@pytest.mark.parametrize("lora", [False, True])
def test_a_stopped_run_ends_as_if_never_stopped_whatever_the_threads(
    tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    inline = optimizer(gradient_accumulation_steps=2)
    expected, whole = train(tiny_checkpoint, task, tmp_path / "whole", inline, lora=lora)
    assert [one["step"] for one in whole.state.log_history if "eval_p1_mean" in one] == [2, 4]
    assert 0 < whole.utilisation <= 1 and all(
        one["utilisation"] <= 1 for one in whole.state.log_history if "loss" in one
    )

    def stop(self: Any, model: Any, inputs: dict[str, int], *more: Any) -> Any:
        if inputs["step"] == 5:
            raise KeyboardInterrupt
        return training_step(self, model, inputs, *more)

    training_step = ContrastiveTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_checkpoint, task, tmp_path / "stopped", replace(inline, num_workers=2), lora=lora)
    saved = load_file(tmp_path / "stopped" / "checkpoint-2" / "model.safetensors")
    assert (
        {name.split(".layers.")[-1].split(".")[0] for name in saved} == {"0"} if lora else len(saved) == len(expected)
    )
    got, _ = train(tiny_checkpoint, task, tmp_path / "stopped", replace(inline, num_workers=3), lora=lora)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert list((tmp_path / "stopped" / "tensorboard").glob("events.*"))


def test_a_checkpoint_of_another_model_is_refused(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    train(tiny_checkpoint, task, tmp_path, optimizer(num_steps=2), lora=True)
    with pytest.raises(RecipeError, match="of another model"):
        train(tiny_checkpoint, task, tmp_path, optimizer())


def test_epochs_are_counted_in_batches(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    epochs = OptimizerRecipe(num_epochs=1, learning_rate=1e-3, gradient_accumulation_steps=2, bf16=False, num_workers=0)
    _, one = train(tiny_checkpoint, task, tmp_path, epochs)
    assert one.state.global_step == 2  # 13 queries in batches of 6, of which 12 are drawn in a pass: 3 batches


def test_an_unreadable_picture_is_left_out_of_the_loss(
    tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    queries, candidates = list(task.queries), list(task.candidates)
    queries[2] = replace(queries[2], item=Item(image=tmp_path / "broken.png", max_tiles=4))
    for did in (5, NUM_QUERIES):  # the target of one query, the negative of another
        candidates[did] = replace(candidates[did], item=Item(text="both", image=tmp_path / "gone.png", max_tiles=1))
    one = trainer(tiny_checkpoint, replace(task, queries=queries, candidates=candidates), tmp_path, chunk_tokens=400)
    one.steps.encode.pictures.recipe = None
    loss, gradients = step(one)
    listed = (tmp_path / "unreadable.txt").read_text().splitlines()
    assert len(listed) == 2 and "broken.png" in "".join(listed) and "gone.png" in "".join(listed)
    # queries 2 and 5 are left out, but what was drawn for them and can be read stays a negative of the others
    rest = [queries[n] for n in range(NUM_QUERIES) if n not in (2, 5)]
    rest[0] = replace(rest[0], negatives=("d2", *queries[2].negatives, *queries[5].negatives))
    other = trainer(
        tiny_checkpoint, replace(task, queries=rest), tmp_path / "other", batch_size=len(rest), num_negatives=3
    )
    other.steps.encode.pictures.recipe = None
    expected, wanted = step(other)
    assert loss == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(gradients, wanted, atol=1e-5, rtol=1e-4)
    step(one, 1)
    assert (tmp_path / "unreadable.txt").read_text().splitlines() == listed


def test_too_many_unreadable_pictures_stop_training(
    tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trouble, "_FIRST", 20)
    queries = [replace(one, item=Item(text="x", image=tmp_path / "gone.png")) for one in task.queries]
    one = trainer(tiny_checkpoint, replace(task, queries=queries), tmp_path / "run", max_unreadable=0.2)
    with pytest.raises(DatasetError, match=r"13 of the .* pictures .*gone\.png"):
        step(one)


def test_a_loss_that_is_not_finite_names_its_batch(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    one = trainer(tiny_checkpoint, task, tmp_path / "run")
    (tmp_path / "run").mkdir(exist_ok=True)
    with torch.no_grad():
        one.model.backbone.language_model.norm.weight.fill_(float("nan"))
    with pytest.raises(RecipeError, match=r"became nan at step 0.*nonfinite\.json"):
        step(one)
    said = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert said["step"] == 0 and sorted(said["qids"]) == sorted(query.qid for query in task.queries)
    assert len(said["dids"]) == 2 * NUM_QUERIES


def test_a_gradient_that_is_not_finite_reaches_no_weight(
    tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path
) -> None:
    one = trainer(tiny_checkpoint, task, tmp_path / "run")
    weight = one.model.backbone.language_model.norm.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    with pytest.raises(RecipeError, match=r"gradient became (nan|inf) at step 0.*nonfinite\.json"):
        one.train()
    said = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert sorted(said["qids"]) == sorted(query.qid for query in task.queries)
    assert all((before[name] == value).all() for name, value in one.model.state_dict().items())


def test_what_cannot_be_is_refused(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    for wrong in ({"chunk_tokens": 0}, {"dimensions": []}, {"fill": "zeros"}, {"max_unreadable": 2}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            ContrastRecipe(**wrong)
    with pytest.raises(RecipeError, match="must not be above the 32 columns"):
        step(trainer(tiny_checkpoint, task, tmp_path, dimensions=[16, 64]))
