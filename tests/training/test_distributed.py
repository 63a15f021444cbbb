"""Processes that train together end where one process ends that trains on the same batches."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.training.runs import embedder, mixed_task, optimizer, step, trainer
from torch.distributed.fsdp import fully_shard

from quarterlight.data.contrastive import TaskMixture
from quarterlight.training.contrast import ContrastRecipe, train_contrastive
from quarterlight.training.distributed import gather, gather_objects, largest, processes, rank, share, share_of


def train(checkpoint: Path, folder: Path, result: Path, batch_size: int, **loss: Any) -> None:
    """Three steps in float64, in which Adam does not blow rounding errors up; leaves weights, losses and metrics."""
    model, encode = embedder(checkpoint, torch.float64)
    one = train_contrastive(
        model,
        encode=encode,
        mixture=TaskMixture(tasks=[mixed_task(folder.parent / "pictures")]),
        validation=[mixed_task(folder.parent / "pictures")],
        recipe=ContrastRecipe(
            batch_size=batch_size,
            num_negatives=1,
            temperature=0.1,
            learn_temperature=True,
            symmetric=True,
            eval_every=3,
            **loss,
        ),
        optimizer=optimizer(num_steps=3, learning_rate=1e-2, save_every=3),
        folder=folder,
        seed=0,
    )
    if one.is_world_process_zero():
        keys = ("loss", "grad_norm", "temperature", "eval_p1_mean")
        said = [log[key] for log in one.state.log_history for key in keys if key in log]
        save_file(model.state_dict() | {"said": torch.tensor(said)}, result)


def train_twice(checkpoint: Path, folder: Path, processes: int) -> None:
    for name, chunk_tokens in {"whole": None, "chunks": 200}.items():
        run = folder / f"{name}.{processes}"
        train(checkpoint, run, run.with_suffix(f".{processes}.safetensors"), 12 // processes, chunk_tokens=chunk_tokens)


def sharded_step(checkpoint: Path, folder: Path) -> None:
    """One step of a model whose layers' weights are spread over the processes, in batches of text alone too."""
    one = trainer(checkpoint, mixed_task(folder / "pictures"), folder / "fsdp", chunk_tokens=200)
    one.model.shared_prefix = False
    backbone = one.model.backbone
    for layer in (*backbone.language_model.layers, *backbone.vision_tower.encoder.layer):
        fully_shard(layer)
    fully_shard(one.model)
    loss, gradients = step(one)
    whole = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    assert {type(weight).__name__ for weight in one.model.parameters()} == {"DTensor"}
    if rank() == 0:
        save_file(whole | {"loss": torch.tensor(loss)}, folder / "fsdp.safetensors")


def share_and_gather() -> None:
    """Rows come back in their order, whatever their number."""
    for total in (0, 1, 2, 7):
        rows_BD = torch.arange(2.0 * total).reshape(total, 2)
        assert torch.equal(gather(share_of(rows_BD), total), rows_BD)
        assert gather_objects(list(share(range(total)))) == list(range(total))
    assert largest(rank(), torch.device("cpu")) == processes().num_processes - 1


def _process(rank: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    assert processes().num_processes == 2
    function(*arguments)
    torch.distributed.destroy_process_group()


def in_two_processes(function: Callable[..., None], *arguments: Any) -> None:
    """As torchrun starts them, but from a process that has loaded what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_distributed"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [context.Process(target=_process, args=(rank, port, function, arguments)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=240)
        child.kill()
    assert [child.exitcode for child in children] == [0, 0]


def test_two_processes_are_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    mixed_task(tmp_path / "pictures")  # or both would write them
    train_twice(tiny_checkpoint, tmp_path, 1)
    in_two_processes(train_twice, tiny_checkpoint, tmp_path, 2)
    for name in ("whole", "chunks"):
        one, two = (load_file(tmp_path / f"{name}.{processes}.safetensors") for processes in (1, 2))
        assert len(one["said"]) == 10
        torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)
        assert (tmp_path / f"{name}.2" / "checkpoint-3" / "trainer_state.json").is_file()


def test_sharded_weights_get_the_gradients_of_whole_ones(tiny_checkpoint: Path, tmp_path: Path) -> None:
    one = trainer(tiny_checkpoint, mixed_task(tmp_path / "pictures"), tmp_path / "one", chunk_tokens=200)
    plan = one.steps.plan(0)
    assert any(all(not item.images for part in chunk for item in part.items) for chunk in plan.chunks)
    loss, gradients = step(one)
    in_two_processes(sharded_step, tiny_checkpoint, tmp_path)
    sharded = load_file(tmp_path / "fsdp.safetensors")
    assert sharded.pop("loss").item() == pytest.approx(loss, abs=1e-5)
    torch.testing.assert_close(sharded, gradients, atol=1e-5, rtol=1e-3)


def test_rows_are_shared_out_and_gathered(tmp_path: Path) -> None:
    in_two_processes(share_and_gather)
    assert list(share([1, 2, 3])) == [1, 2, 3]  # alone
