"""Distillation by the contrastive trainer: chunks, processes and stops change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.training.runs import embedder, mixed_task, optimizer, step
from tests.training.test_distributed import in_two_processes

from quarterlight.data.contrastive import TaskMixture
from quarterlight.data.distill import DistillSampler, ScoredList
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError, InputError, RecipeError
from quarterlight.losses.distill import distill
from quarterlight.records import Item
from quarterlight.training.collate import ContrastiveSteps
from quarterlight.training.distill import DistillRecipe, DistillTrainer, train_distill

LOSS = {"batch_size": 4, "temperature": 0.1, "learn_temperature": True, "eval_every": 0}


def lists_of(task: RetrievalTask) -> dict[str, ScoredList]:
    """Three to five candidates for all queries but the first."""
    draw = np.random.default_rng(0)
    found = {}
    for number, query in enumerate(task.queries[1:]):
        some = draw.choice(len(task.candidates), 3 + number % 3, replace=False)
        recall, rerank = draw.uniform(-1, 1, len(some)), draw.uniform(0, 1, len(some))
        found[query.qid] = ScoredList(
            dids=tuple(task.candidates[n].did for n in some),
            recall=recall.astype(np.float32),
            rerank=rerank.astype(np.float32),
        )
    return found


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> RetrievalTask:
    return mixed_task(tmp_path_factory.mktemp("pictures"))


def one_step(checkpoint: Path, task: RetrievalTask, folder: Path, **loss: Any) -> Any:
    model, encode = embedder(checkpoint)
    encode.pictures.recipe = None
    recipe = DistillRecipe(**({**LOSS, "batch_size": 6} | loss))
    sampler = DistillSampler(TaskMixture(tasks=[task]), [lists_of(task)], batch_size=recipe.batch_size)
    one = DistillTrainer(
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


def test_instructions_are_drawn_anew_in_every_pass(task: RetrievalTask) -> None:
    """Any of the task's, the same for the same step, whatever the lists say; a query with another keeps it."""
    own = replace(task.queries[1], item=replace(task.queries[1].item, instruction="own"))
    several = replace(task, queries=[task.queries[0], own, *task.queries[2:]], instructions=("a", "b", "c"))

    def drawn(mode: Any) -> list[tuple[str, str | None]]:
        sampler = DistillSampler(
            TaskMixture(tasks=[several]), [lists_of(task)], batch_size=4, seed=3, instructions=mode
        )
        queries = [query for number in range(15) for query in sampler.batch(number).queries]
        return [(query.qid, query.item.instruction) for query in queries]

    found = drawn("random")
    assert found == drawn("random")
    assert [qid for qid, _ in found] == [qid for qid, _ in drawn("first")]
    assert {one for qid, one in found if qid == own.qid} == {"own"}
    others = {(qid, one) for qid, one in found if qid != own.qid}
    assert {one for _, one in others} == {"a", "b", "c"} and len(others) > 11 * 1.5
    assert {one for _, one in drawn("first")} == {"own", None}
    with pytest.raises(InputError, match="instructions is one of first, random; got 'any'"):
        drawn("any")


def test_every_query_with_a_list_is_drawn_once_a_pass(task: RetrievalTask) -> None:
    lists = lists_of(task)
    sampler = DistillSampler(TaskMixture(tasks=[task]), [lists], batch_size=4, seed=3)
    assert sampler.num_queries == 12 and sampler.steps_per_epoch == 3
    drawn = [query.qid for number in range(3) for query in sampler.batch(number).queries]
    assert sorted(drawn) == sorted(lists)
    batch = sampler.batch(1)
    for row, query in enumerate(batch.queries):
        wanted = lists[query.qid]
        some = batch.listed[row]
        assert tuple(batch.candidates[n].did for n in batch.column[row][some]) == wanted.dids
        assert batch.recall[row][some].tolist() == wanted.recall.tolist()
        assert batch.rerank[row][some].tolist() == wanted.rerank.tolist()
    assert all(query.item.instruction is None for query in batch.queries)
    with pytest.raises(DatasetError, match="not in the pool"):
        other = {"q3": ScoredList(dids=("d0", "x"), recall=np.zeros(2, np.float32), rerank=np.zeros(2, np.float32))}
        DistillSampler(TaskMixture(tasks=[task]), [other], batch_size=1)
    with pytest.raises(DatasetError, match="a list of two"):
        DistillSampler(TaskMixture(tasks=[task]), [{}], batch_size=1)


def test_chunks_give_the_gradients_of_the_loss(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    """Of all lists one by one, through an embedder that knows nothing of chunks and of shared rows."""
    loss, gradients = step(one_step(tiny_checkpoint, task, tmp_path / "chunks", chunk_tokens=200))
    one = one_step(tiny_checkpoint, task, tmp_path / "whole")
    batch, found = one.steps.sampler.batch(0), lists_of(task)
    one.model.zero_grad()
    temperature = one.model.log_temperature.exp()[0]
    item = {candidate.did: candidate.item for candidate in task.candidates}
    total: Any = 0.0
    for query in batch.queries:
        wanted = found[query.qid]
        query_1D = one.model(one.steps.encode([query.item], "query"))
        listed_KD = one.model(one.steps.encode([item[did] for did in wanted.dids], "document"))
        teacher_K = torch.from_numpy(0.5 * wanted.recall + 0.5 * wanted.rerank)
        total = total + distill(query_1D @ listed_KD.T, teacher_K[None], temperature=temperature)
    expected = total / len(batch.queries)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    plain = {name: weight.grad for name, weight in one.model.named_parameters() if weight.grad is not None}
    torch.testing.assert_close(gradients, plain, atol=1e-4, rtol=1e-3)


def test_an_unreadable_picture_is_in_no_list(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    lists = lists_of(task)
    gone = lists["q1"].dids[0]
    broken = [
        replace(one, item=Item(image=tmp_path / "gone.png")) if one.did == gone else one for one in task.candidates
    ]
    one = one_step(tiny_checkpoint, replace(task, candidates=broken), tmp_path / "run", batch_size=12)
    loss, _ = step(one)
    assert np.isfinite(loss) and "gone.png" in (tmp_path / "run" / "unreadable.txt").read_text()


def train(checkpoint: Path, task: RetrievalTask, folder: Path, *, dtype: torch.dtype, **loss: Any) -> Any:
    model, encode = embedder(checkpoint, dtype) if dtype is torch.float64 else embedder(checkpoint, dropout=0.1)
    one = train_distill(
        model,
        encode=encode,
        mixture=TaskMixture(tasks=[task]),
        lists=[lists_of(task)],
        validation=[],
        recipe=DistillRecipe(**(LOSS | loss)),
        optimizer=optimizer(learning_rate=1e-2),
        folder=folder,
        seed=0,
    )
    return model, one


def distilled(checkpoint: Path, folder: Path, processes: int) -> None:
    """In float64, in which Adam does not blow rounding errors up; leaves weights and temperature."""
    model, one = train(
        checkpoint,
        mixed_task(folder / "pictures"),
        folder / f"run{processes}",
        dtype=torch.float64,
        batch_size=4 // processes,
        chunk_tokens=200,
    )
    if one.is_world_process_zero():
        state: Mapping[str, torch.Tensor] = model.state_dict()
        save_file({**state, "temperature": torch.tensor(one.temperature)}, folder / f"{processes}.safetensors")


def test_two_processes_are_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    mixed_task(tmp_path / "pictures")  # or both would write them
    distilled(tiny_checkpoint, tmp_path, 1)
    in_two_processes(distilled, tiny_checkpoint, tmp_path, 2)
    one, two = (load_file(tmp_path / f"{processes}.safetensors") for processes in (1, 2))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)


def test_a_stopped_run_ends_as_if_never_stopped(
    tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = train(tiny_checkpoint, task, tmp_path / "whole", dtype=torch.float32)

    def stop(self: Any, model: Any, inputs: dict[str, int], *more: Any) -> Any:
        if inputs["step"] == 3:
            raise KeyboardInterrupt
        return training_step(self, model, inputs, *more)

    training_step = DistillTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_checkpoint, task, tmp_path / "stopped", dtype=torch.float32)
    other, resumed = train(tiny_checkpoint, task, tmp_path / "stopped", dtype=torch.float32)
    assert resumed.temperature == whole.temperature != 0.1
    expected = model.state_dict()
    assert all(torch.equal(expected[name], one) for name, one in other.state_dict().items())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RecipeError, match="recall_weight must be a share from 0 to 1"):
        DistillRecipe(recall_weight=1.5)
