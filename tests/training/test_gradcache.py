"""A batch in chunks gives the loss and the gradients of the batch in one piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.training.runs import mixed_task, step, trainer
from torch import nn

from quarterlight.data.retrieval import RetrievalTask
from quarterlight.training.gradcache import GradCache


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> RetrievalTask:
    return mixed_task(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize(("chunk_tokens", "longest_chunk"), [(1, 1), (150, 4), (600, 13)])
def test_chunks_of_any_size_give_the_loss_and_gradients_of_the_whole(
    tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path, chunk_tokens: int, longest_chunk: int
) -> None:
    whole = trainer(tiny_checkpoint, task, tmp_path)
    chunked = trainer(tiny_checkpoint, task, tmp_path, chunk_tokens=chunk_tokens)
    plan = chunked.steps.plan(0)
    assert max(len(part.items) for chunk in plan.chunks for part in chunk) == longest_chunk
    assert sorted(row for chunk in plan.chunks for part in chunk for row in part.rows) == list(range(plan.num_rows))
    expected, gradients = step(whole)
    loss, chunked_gradients = step(chunked)
    assert loss == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(chunked_gradients, gradients, atol=1e-5, rtol=1e-4)


def test_a_chunk_keeps_to_its_budget(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    steps = trainer(tiny_checkpoint, task, tmp_path, chunk_tokens=150).steps
    for chunk in steps.plan(0).chunks:
        (inputs,) = steps.encoded(chunk).inputs
        rows, length = inputs["input_ids"].shape
        assert rows * length <= 150 or rows == 1
    generous = trainer(tiny_checkpoint, task, tmp_path, chunk_tokens=100_000).steps
    assert len(generous.plan(0).chunks) == 1


def test_dropout_falls_the_second_time_as_it_did_the_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    chunks = [torch.randn(size, 4) for size in (3, 1, 2)]

    def loss_of(embedding_BD: torch.Tensor) -> torch.Tensor:
        return (embedding_BD @ embedding_BD.T).exp().sum().log()

    torch.manual_seed(1)
    expected = loss_of(torch.cat([model(chunk) for chunk in chunks]))
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    after = torch.rand(1)
    torch.manual_seed(1)
    cache = GradCache(model, torch.Tensor.backward, num_chunks=len(chunks), device=torch.device("cpu"))
    embedding_BD = torch.cat([cache.embed(chunk) for chunk in chunks]).requires_grad_()
    loss = loss_of(embedding_BD)
    (gradient_BD,) = torch.autograd.grad(loss, embedding_BD)
    for chunk, part in zip(chunks, gradient_BD.split([3, 1, 2]), strict=True):
        cache.backward(chunk, part)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for weight, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=1e-5)
    assert torch.rand(1) == after  # and what comes later falls as if nothing had been done twice
