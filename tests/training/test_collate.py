"""Pictures are read once and never stop training; work done ahead is the work that would be done in its turn."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.runs import NUM_QUERIES, mixed_task, trainer

from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError
from quarterlight.records import Item
from quarterlight.training.collate import Pictures, StepStream


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> RetrievalTask:
    return mixed_task(tmp_path_factory.mktemp("pictures"))


def test_tiles_are_the_same_kept_or_read_again(image_processor: Any, task: RetrievalTask) -> None:
    items = [query.item for query in task.queries]
    kept, anew = Pictures(image_processor), Pictures(image_processor, max_bytes=0)
    for _ in range(2):
        expected, counts = kept.tiles(items)
        tiles, again = anew.tiles(items)
        assert counts == again and np.array_equal(tiles, expected)
    assert counts[:3] == [[], [1], [5]]
    assert len(kept._tiles) == sum(map(bool, counts)) and not anew._tiles


def test_what_cannot_be_read_is_white_and_named(image_processor: Any, task: RetrievalTask, tmp_path: Path) -> None:
    pictures = Pictures(image_processor)
    good, gone = task.queries[1].item, Item(image=tmp_path / "gone.png", text="x")
    tiles, counts = pictures.tiles([gone, good])
    assert counts == [[1], [1]] and (tiles[0] == 255).all() and (tiles[1] != 255).any()
    assert pictures.whys(good) == [] and "gone.png" in pictures.whys(gone)[0]


def test_a_picture_is_augmented_alike_in_any_chunk(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    def tiles_by_row(chunk_tokens: int | None) -> dict[int, torch.Tensor]:
        steps = trainer(tiny_checkpoint, task, tmp_path, chunk_tokens=chunk_tokens).steps
        found = {}
        for chunk in steps.plan(3).chunks:
            for part, inputs in zip(chunk, steps.encoded(chunk).inputs, strict=True):
                tiles = iter(inputs.get("pixel_values", ()))
                for row, item in zip(part.rows, part.items, strict=True):
                    count = 5 if item.max_tiles == 4 else len(item.images)
                    found[row] = torch.stack([next(tiles) for _ in range(count)]) if count else torch.empty(0)
        return found

    whole, chunked = tiles_by_row(None), tiles_by_row(150)
    assert len(whole) == 3 * NUM_QUERIES and any(len(one) == 1 for one in whole.values())
    for row, tiles in whole.items():
        torch.testing.assert_close(chunked[row], tiles)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_error_ahead_is_raised_where_its_step_is_taken(
    tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    steps = trainer(tiny_checkpoint, task, tmp_path).steps
    batch = steps.sampler.batch

    def fails(step: int) -> Any:
        if step == 2:
            raise DatasetError("no more")
        return batch(step)

    monkeypatch.setattr(steps.sampler, "batch", fails)
    stream = StepStream(steps, 1, 4, num_threads=num_threads)
    assert stream.plan().step == 1 and len(stream.chunk().rows) == 3 * NUM_QUERIES
    with pytest.raises(DatasetError, match="no more"):
        stream.plan()
    stream.close()
    assert not [one.name for one in threading.enumerate() if one.name.startswith(("inputs", "prefetch"))]


def test_threads_that_work_ahead_leave_the_cores_to_the_model(
    tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = trainer(tiny_checkpoint, task, tmp_path).steps
    plan, cores, before = steps.plan, [], torch.get_num_threads()
    monkeypatch.setattr(steps, "plan", lambda step: cores.append(torch.get_num_threads()) or plan(step))
    torch.set_num_threads(2)
    try:
        stream = StepStream(steps, 0, 2, num_threads=1)
        stream.plan()
        assert cores[0] == 1 and torch.get_num_threads() == 2
        stream.close()
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)
