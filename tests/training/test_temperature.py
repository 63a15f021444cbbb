"""A temperature that is learnt: in chunks as in one, kept within bounds, resumed to the bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.runs import embedder, mixed_task, optimizer, step, trainer

from quarterlight.data.contrastive import TaskMixture
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import RecipeError
from quarterlight.losses.info_nce import info_nce
from quarterlight.models.checkpoint import load_backbone, load_settings, load_temperature, save_checkpoint
from quarterlight.training.contrast import ContrastiveTrainer, ContrastRecipe, train_contrastive
from quarterlight.training.lora import LoraRecipe, add_lora, merge_lora
from quarterlight.training.prompt_embedder import PromptEmbedder
from quarterlight.training.temperature import NAME


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> RetrievalTask:
    return mixed_task(tmp_path_factory.mktemp("pictures"))


def train(
    checkpoint: Path, task: RetrievalTask, folder: Path, *, lora: bool = False, **loss: Any
) -> tuple[Any, ContrastiveTrainer]:
    model, encode = embedder(checkpoint, dropout=0.1)
    if lora:
        add_lora(model.backbone, LoraRecipe(rank=2, alpha=4), seed=0)
    values = {"batch_size": 6, "temperature": 0.1, "learn_temperature": True, "chunk_tokens": 400, "eval_every": 0}
    one = train_contrastive(
        model,
        encode=encode,
        mixture=TaskMixture(tasks=[task]),
        validation=[],
        recipe=ContrastRecipe(**(values | loss)),
        optimizer=optimizer(weight_decay=1.0),
        folder=folder,
        seed=0,
    )
    return model, one


def test_chunks_give_the_gradient_of_the_whole(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    """And it is that of the loss itself, with embeddings that stand still."""
    found = {}
    for name, chunk_tokens in {"whole": None, "chunks": 200}.items():
        one = trainer(tiny_checkpoint, task, tmp_path / name, chunk_tokens=chunk_tokens, learn_temperature=True)
        one.steps.encode.pictures.recipe = None
        loss, gradients = step(one)
        found[name] = gradients[NAME]
    torch.testing.assert_close(found["whole"], found["chunks"], atol=1e-5, rtol=1e-4)
    plan = one.steps.plan(0)
    with torch.no_grad():
        rows = [(chunk.rows, one.model(*chunk.inputs)) for chunk in map(one.steps.encoded, plan.chunks)]
    embedding_RD = torch.empty(plan.num_rows, rows[0][1].shape[1])
    for where, some in rows:
        embedding_RD[where] = some
    Q = len(plan.batch.queries)
    logarithm = torch.tensor(math.log(0.1), requires_grad=True)
    expected = info_nce(
        embedding_RD[:Q],
        embedding_RD[Q:][plan.candidate_index],
        temperature=logarithm.exp(),
        known_positive_QC=torch.from_numpy(plan.batch.known_positive),
        symmetric=True,
    )
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert logarithm.grad is not None
    assert found["chunks"].item() == pytest.approx(logarithm.grad.item(), abs=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_a_stopped_run_ends_with_the_same_temperature(
    tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    model, whole = train(tiny_checkpoint, task, tmp_path / "whole", lora=lora, temperature_learning_rate=0.1)
    said = [one["temperature"] for one in whole.state.log_history if "temperature" in one]
    assert len(said) == 4 and len(set(said)) > 2 and said[-1] == whole.temperature != 0.1
    assert not any(NAME in name for name in model.state_dict())

    def stop(self: Any, model: Any, inputs: dict[str, int], *more: Any) -> Any:
        if inputs["step"] == 3:
            raise KeyboardInterrupt
        return training_step(self, model, inputs, *more)

    training_step = ContrastiveTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_checkpoint, task, tmp_path / "stopped", lora=lora, temperature_learning_rate=0.1)
    other, resumed = train(tiny_checkpoint, task, tmp_path / "stopped", lora=lora, temperature_learning_rate=0.1)
    assert resumed.temperature == whole.temperature
    expected = model.state_dict()
    assert all(torch.equal(expected[name], one) for name, one in other.state_dict().items())


def test_it_neither_decays_nor_leaves_its_bounds(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    one = trainer(tiny_checkpoint, task, tmp_path, learn_temperature=True, temperature_learning_rate=0.5)
    groups = one.create_optimizer().param_groups
    assert [len(group["params"]) for group in groups][-1] == 1
    assert groups[-1]["lr"] == 0.5 and groups[-1]["weight_decay"] == 0
    assert groups[-1]["params"][0] is one.model.log_temperature
    assert NAME not in one.get_decay_parameter_names(one.model)
    for far, near in ((-20.0, 0.01), (20.0, 0.5)):
        with torch.no_grad():
            one.model.log_temperature.fill_(far)
        assert one.temperature == pytest.approx(near)  # also before the next step brings it back
        step(one)
        assert one.model.log_temperature.exp().item() == pytest.approx(near)
        one._stream.close()
        one._stream = None


def test_it_is_saved_with_the_model_and_survives_merging(
    tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path
) -> None:
    model, one = train(tiny_checkpoint, task, tmp_path / "run", lora=True)
    model.eval()
    (inputs,) = one.steps.encoded(one.steps.plan(0).chunks[0]).inputs
    with torch.no_grad():
        adapted_BD = model(inputs)
        merge_lora(model.backbone)
        merged_BD = model(inputs)
    _, processor = load_backbone(tiny_checkpoint)
    settings = load_settings(tiny_checkpoint)
    folder = save_checkpoint(tmp_path / "saved", model.backbone, processor, settings, temperature=one.temperature)
    with torch.no_grad():
        saved_BD, untrained_BD = (PromptEmbedder(load_backbone(one)[0])(inputs) for one in (folder, tiny_checkpoint))
    torch.testing.assert_close(merged_BD, adapted_BD, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(saved_BD, adapted_BD, atol=1e-5, rtol=1e-4)
    assert (adapted_BD - untrained_BD).abs().max() > 1e-3  # what was learnt is large enough to be missed
    assert not any("lora" in name or NAME in name for name in load_file(folder / "model.safetensors"))
    assert load_temperature(folder) == one.temperature != 0.1
    assert load_temperature(tiny_checkpoint) is None


def test_what_cannot_be_is_refused() -> None:
    for wrong, message in (
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": 0.9, "learn_temperature": True}, "must begin between"),
        ({"min_temperature": 0.5, "max_temperature": 0.1}, "below max_temperature"),
        ({"temperature_learning_rate": 0.1}, "of no use without learn_temperature"),
        ({"symmetric": True, "backward_weight": 1.0}, "give one of them"),
        ({"in_batch": False}, "needs num_negatives"),
        ({"in_batch": False, "num_negatives": 1, "symmetric": True}, "no loss from targets"),
    ):
        with pytest.raises(RecipeError, match=message):
            ContrastRecipe(**wrong)
