"""The whole pipeline on the fixture: stages run, finished ones are skipped, a stopped run ends as if never stopped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from quarterlight.data.contrastive import BatchSampler, TaskMixture
from quarterlight.data.retrieval import RetrievalDataset, with_instructions
from quarterlight.errors import DatasetError, RecipeError
from quarterlight.models.embedder import Embedder
from quarterlight.models.inputs import InputFormatter
from quarterlight.models.internvl_vtc.processing import InternVLVTCProcessor
from quarterlight.models.settings import EmbedderSettings
from quarterlight.pipeline import STAGES, _Pipeline, run
from quarterlight.prompts import QUERY_INSTRUCTIONS
from quarterlight.training.collate import ContrastiveCollator, Pictures, PromptEncoder
from quarterlight.training.contrast import ContrastiveTrainer
from quarterlight.training.optimizer import last_checkpoint
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
            "loss": {"batch_size": 8, "eval_every": 2, "symmetric": True},
            "teacher_weight": 1.0,
        },
    }
    return parse(Recipe, values | changes, where="test")


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


def test_a_checkpoint_that_was_cut_short_is_not_resumed(finished: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()
    assert last_checkpoint(tmp_path / "nothing") is None


def changed(before: Recipe, **loss: float) -> Recipe:
    return replace(before, contrast=replace(before.contrast, loss=replace(before.contrast.loss, **loss)))


def test_a_stage_is_due_again_when_what_it_depends_on_changes(finished: Path, tmp_path: Path) -> None:
    def due(new: Recipe, data: Path = DATA) -> list[str]:
        pipeline = _Pipeline(new, data, finished)
        return [stage for stage in STAGES if not pipeline.finished(stage)]

    assert due(recipe()) == []
    assert due(changed(recipe(), temperature=0.1)) == ["contrast"]
    assert due(changed(recipe(), eval_every=1)) == []
    assert due(recipe(seed=1)) == list(STAGES)
    other = tmp_path / "data"
    shutil.copytree(DATA, other)
    queries = other / "emoji" / "queries" / "t2i.train.jsonl"
    queries.write_bytes(queries.read_bytes() + b"\n")
    assert due(recipe(), other) == list(STAGES)


def test_workers_change_nothing(finished: Path, tmp_path: Path) -> None:
    with_worker = recipe()
    optimizer = replace(with_worker.contrast.optimizer, num_workers=1)
    with_worker = replace(with_worker, contrast=replace(with_worker.contrast, optimizer=optimizer))
    for stage in ("start", "teacher", "tower"):
        shutil.copytree(finished / stage, tmp_path / stage)
    run(with_worker, DATA, tmp_path, report=lambda _: None)
    expected, got = (load_file(one / "contrast" / "model.safetensors") for one in (finished, tmp_path))
    assert all((expected[name] == got[name]).all() for name in expected)


def test_what_cannot_be_run_is_said(finished: Path, tmp_path: Path) -> None:
    def fails(error: type[Exception], match: str, new: Recipe, only: str | None = None, out: Path = tmp_path) -> None:
        with pytest.raises(error, match=match):
            run(new, DATA, out, only=only, report=lambda _: None)

    fails(RecipeError, "no stage 'towr'", recipe(), only="towr")
    fails(RecipeError, "needs the stage start, which is not finished", recipe(), only="teacher")
    fails(RecipeError, "needs the stage contrast|needs the stage start", recipe(seed=1), only="contrast", out=finished)
    nobody = [{"dataset": "emoji", "task": "t2i", "weight": 1.0, "where": {"lang": "tlh"}}]
    fails(DatasetError, "no query with", recipe(mixture=nobody))
    (tmp_path / "start.running" / "fingerprint").write_text("of another")
    fails(RecipeError, "half a run of another recipe", recipe())
    foreign = tmp_path / "foreign"
    (foreign / "start").mkdir(parents=True)
    fails(RecipeError, "not made by training", recipe(), out=foreign)


def test_the_collator_embeds_each_distinct_candidate_once(finished: Path) -> None:
    processor, settings = InternVLVTCProcessor.from_pretrained(finished / "contrast"), EmbedderSettings()
    formatter = InputFormatter(processor, settings)
    task = with_instructions(RetrievalDataset(DATA / "easy_vqa").load("it2t", "train"))
    batch = BatchSampler(TaskMixture(tasks=[task]), batch_size=12, seed=0).batch(0)
    inputs = ContrastiveCollator(PromptEncoder(formatter, Pictures(processor.image_processor)), seed=0)([(0, batch)])
    distinct = {candidate.item.text for candidate in batch.candidates}
    assert len(inputs["candidate"]["input_ids"]) == len(distinct) < len(batch.candidates)
    tokenizer = processor.tokenizer
    for candidate, row in zip(batch.candidates, inputs["candidate_index"].tolist(), strict=True):
        assert f"Text: {candidate.item.text}" in tokenizer.decode(inputs["candidate"]["input_ids"][row])
    query = tokenizer.decode(inputs["query"]["input_ids"][0])
    assert f"Query: {batch.queries[0].item.text}" in query
    assert QUERY_INSTRUCTIONS["it2t"] in query
    plain = formatter([query.item for query in batch.queries], "query")
    torch.testing.assert_close(inputs["query"]["pixel_values"], plain["pixel_values"])
