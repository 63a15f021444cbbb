"""A frozen tower looks at each picture once, and nothing else changes; a query alone with its own negatives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.runs import NUM_QUERIES, mixed_task, optimizer, step

from quarterlight.data.contrastive import BatchSampler, TaskMixture
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.losses.info_nce import info_nce
from quarterlight.models.checkpoint import load_backbone, load_settings
from quarterlight.models.embedder import Embedder
from quarterlight.models.inputs import InputFormatter
from quarterlight.models.pooling import Attention, PoolingMode
from quarterlight.models.tokenizer import with_markers
from quarterlight.training.collate import ContrastiveSteps, Pictures, PromptEncoder
from quarterlight.training.contrast import ContrastiveTrainer, ContrastRecipe, train_contrastive
from quarterlight.training.eyes import FrozenEyes, VisualTokens
from quarterlight.training.prompt_embedder import PromptEmbedder


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> RetrievalTask:
    return mixed_task(tmp_path_factory.mktemp("pictures"))


def model_of(
    checkpoint: Path,
    *,
    kept_bytes: int | None = 1 << 30,
    pooling: PoolingMode = PoolingMode.LAST_TOKEN,
    attention: Attention = Attention.CAUSAL,
) -> tuple[PromptEmbedder, PromptEncoder, list[int]]:
    """A model with frozen eyes that keep so much, or none; its inputs; an entry for each time that its tower looked."""
    backbone, processor = load_backbone(checkpoint)
    backbone.set_attn_implementation("eager")
    pictures = Pictures(processor.image_processor, max_bytes=0)
    eyes = None
    if kept_bytes is None:
        for part in (backbone.vision_tower, backbone.multi_modal_projector):
            part.requires_grad_(False)
    else:
        eyes = FrozenEyes(backbone, processor.image_processor, VisualTokens(kept_bytes))
    seen: list[int] = []
    backbone.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    settings = replace(load_settings(checkpoint), pooling=pooling, attention=attention)
    if settings.marked:
        with_markers(backbone, processor.tokenizer, seed=0)
    known = None if eyes is None else eyes.known
    model = PromptEmbedder(backbone, pooling=pooling, attention=attention, eyes=eyes)
    return model, PromptEncoder(InputFormatter(processor, settings), pictures, known=known), seen


def trainer(model: PromptEmbedder, encode: PromptEncoder, task: RetrievalTask, folder: Path, **loss: Any) -> Any:
    values = {"batch_size": NUM_QUERIES, "num_negatives": 1, "temperature": 0.1}
    recipe = ContrastRecipe(**(values | loss))
    sampler = BatchSampler(TaskMixture(tasks=[task]), batch_size=NUM_QUERIES, num_negatives=1)
    one = ContrastiveTrainer(
        model=model,
        args=optimizer().arguments(folder, seed=0),
        train_dataset=[{"step": n} for n in range(8)],
        steps=ContrastiveSteps(sampler, encode, seed=0, chunk_tokens=recipe.chunk_tokens),
        recipe=recipe,
        validation=[],
    )
    one.current_gradient_accumulation_steps = 1
    one.state.max_steps = 8
    return one


@pytest.mark.parametrize("chunk_tokens", [None, 200])
@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
def test_gradients_are_those_of_eyes_that_look_every_time(
    tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path, chunk_tokens: int | None, kept_bytes: int
) -> None:
    found = {}
    for name, kept in {"plain": None, "kept": kept_bytes}.items():
        model, encode, seen = model_of(tiny_checkpoint, kept_bytes=kept)
        one = trainer(model, encode, task, tmp_path / name, chunk_tokens=chunk_tokens)
        found[name] = step(one)
        assert not any("vision" in weight or "multi_modal" in weight for weight in found[name][1])
        looked = len(seen)
        step(one, 1)  # the same pictures in another order
        if kept_bytes and name == "kept":
            assert len(seen) == looked and not model.backbone.vision_tower.training
        else:
            assert len(seen) > looked
    assert found["kept"][0] == pytest.approx(found["plain"][0], abs=1e-5)
    torch.testing.assert_close(found["kept"][1], found["plain"][1], atol=1e-5, rtol=1e-3)


def test_a_stopped_run_ends_as_if_never_stopped(
    tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(folder: Path) -> dict[str, torch.Tensor]:
        model, encode, _ = model_of(tiny_checkpoint)
        train_contrastive(
            model,
            encode=encode,
            mixture=TaskMixture(tasks=[task]),
            validation=[task],
            recipe=ContrastRecipe(batch_size=6, num_negatives=1, temperature=0.1, chunk_tokens=400, eval_every=2),
            optimizer=optimizer(num_workers=2),
            folder=folder,
            seed=0,
        )
        return model.state_dict()

    def stop(self: Any, model: Any, inputs: dict[str, int], *more: Any) -> Any:
        if inputs["step"] == 3:
            raise KeyboardInterrupt
        return training_step(self, model, inputs, *more)

    expected = train(tmp_path / "whole")
    training_step = ContrastiveTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped")
    got = train(tmp_path / "stopped")
    assert all(torch.equal(expected[name], one) for name, one in got.items())


@pytest.mark.parametrize("pooling", list(PoolingMode))
@pytest.mark.parametrize("attention", list(Attention))
def test_training_embeds_as_use_does(
    tiny_checkpoint: Path, task: RetrievalTask, pooling: PoolingMode, attention: Attention
) -> None:
    """Whatever pooling and attention: what is trained is what the embedder of these settings gives, one by one."""
    model, encode, _ = model_of(tiny_checkpoint, pooling=pooling, attention=attention)
    model.eval()
    items = [query.item for query in task.queries[:6]]
    with torch.no_grad():
        trained = model(encode(items, "query")).numpy()
    settings = encode.formatter.settings
    embedder = Embedder.from_model(model.backbone, encode.formatter.processor, settings)
    used = np.concatenate([embedder.encode_query([item]) for item in items])
    assert trained == pytest.approx(used, abs=1e-5)


def test_a_query_alone_with_its_own_negatives(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    model, encode, _ = model_of(tiny_checkpoint)
    one = trainer(model, encode, task, tmp_path, in_batch=False)
    loss, _ = step(one)
    batch = one.steps.sampler.batch(0)
    Q = len(batch.queries)
    assert batch.owner.tolist() == [*range(Q), *range(Q)]  # one negative each
    with torch.no_grad():
        query_QD = model(encode([query.item for query in batch.queries], "query"))
        candidate_CD = model(encode([one.item for one in batch.candidates], "document"))
    rows = [
        info_nce(query_QD[n : n + 1], candidate_CD[[n, Q + n]], temperature=0.1).item()
        for n in range(Q)
        if not batch.known_positive[n, Q + n]
    ]
    assert len(rows) == Q and loss == pytest.approx(sum(rows) / Q, abs=1e-5)
