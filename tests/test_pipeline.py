"""The whole pipeline on the fixture: stages run, finished ones are skipped, a stopped run ends as if never stopped."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from quarterlight import pipeline
from quarterlight.errors import DatasetError, RecipeError
from quarterlight.models.checkpoint import load_config, load_temperature
from quarterlight.models.embedder import Embedder
from quarterlight.models.pair import load_pair, same_eyes
from quarterlight.models.reranker import Reranker, has_reranker
from quarterlight.pipeline import _Pipeline, run
from quarterlight.recipe import Recipe, parse
from quarterlight.training.optimizer import last_checkpoint

DATA = Path(__file__).parent / "fixtures" / "retrieval"
STEPS = {"num_steps": 4, "learning_rate": 1e-3, "warmup_steps": 1, "save_every": 2, "log_every": 2, "num_workers": 0}


def values() -> dict[str, Any]:
    """Every stage in four steps, on a model of two narrow layers."""
    contrast = {"optimizer": STEPS, "loss": {"batch_size": 8, "eval_every": 2, "symmetric": True}}
    negatives = {**contrast["loss"], "num_negatives": 2}
    return {
        "name": "tiny",
        "model": {
            "vocab_size": 400,
            "position_columns": 16,
            "attn_implementation": "eager",
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
                "tie_word_embeddings": True,
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
        "restore": {
            "optimizer": STEPS,
            "loss": {"max_tokens": 128, "max_tiles": 1, "eval_every": 2},
            "data": [{"dataset": "emoji", "task": "i2t"}, {"dataset": "easy_vqa", "task": "it2t"}],
        },
        "text_pairs": {**contrast, "loss": {**contrast["loss"], "learn_temperature": True}},
        "caption_pairs": {
            "optimizer": STEPS,
            "loss": {"batch_size": 4, "eval_every": 0, "backward_weight": 1.0, "inherit_temperature": True},
            "lora": {"rank": 2, "alpha": 4},
        },
        "warmup": {**contrast, "teacher_weight": 1.0},
        "mine": {"depth": 20, "window": [2, 10], "sample": 3},
        "hard_negatives": {**contrast, "loss": negatives},
        "retrieve": {"depth": 6, "window": [1, 6], "sample": None},
        "judge": {"backend": "labels"},
        "finetune": {**contrast, "loss": negatives, "lora": {"rank": 4, "alpha": 8}, "fill_from_mined": True},
        "rerank": {
            "optimizer": STEPS,
            "loss": {"batch_size": 4, "eval_every": 2},
            "initial": "finetune",
            "fill_from_mined": True,
            "fusion_weight": 0.5,
        },
        "teach": {"depth": 6, "share": 0.5, "pool": "mixed"},
        "distill": {
            "optimizer": STEPS,
            "loss": {"batch_size": 3, "eval_every": 2, "learn_temperature": True, "chunk_tokens": 600},
            "lora": {"rank": 2, "alpha": 4},
        },
    }


def recipe(**changes: object) -> Recipe:
    return parse(Recipe, values() | changes, where="test")


STAGES = recipe().stages


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(recipe(), DATA, folder, report=lambda _: None)
    return folder


def same_weights(one: Path, other: Path) -> bool:
    pairs = (
        [load_file(folder / file) for folder in (one, other)]
        for file in ("rerank/model.safetensors", "rerank/reranker/weights.safetensors", "distill/model.safetensors")
    )
    return all((expected[name] == got[name]).all() for expected, got in pairs for name in expected)


def test_the_result_embeds(finished: Path) -> None:
    embedder = Embedder(finished / "finetune")
    vectors = embedder.encode_query(["a red apple", "a green pear"])
    assert vectors.shape == (2, 32)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1.0, 1.0], abs=1e-5)


def test_the_reranker_is_in_the_folder_of_the_embedder(finished: Path) -> None:
    embedder, reranker = load_pair(finished / "rerank")
    assert embedder.vision_hash == reranker.vision_hash == Embedder(finished / "finetune").vision_hash
    assert embedder.model_hash == Embedder(finished / "finetune").model_hash
    scores = reranker.score("a red apple", ["a red apple", "a green pear"])
    assert ((scores > 0) & (scores < 1)).all()
    assert reranker.settings.fusion_weight == 0.5 and reranker.settings.text_max_tokens == 512
    counts = json.loads((finished / "rerank" / "rows.json").read_text())
    assert counts["trained"] + counts["skipped"] + counts["held_out"] == counts["queries"] and counts["held_out"]
    page = (finished / "report.md").read_text()
    assert "| held-out queries of rerank | step 2 | step 4 |" in page
    assert f"{counts['trained']} are trained on" in page


def test_the_temperature_goes_from_stage_to_stage(finished: Path) -> None:
    """Learnt in text_pairs, kept in caption_pairs, whose adapter is merged, and begun anew in warmup."""
    found = {name: load_temperature(finished / name) for name in ("text_pairs", "caption_pairs", "warmup", "distill")}
    assert found["text_pairs"] == found["caption_pairs"] != found["warmup"] == 0.03
    assert found["distill"] not in (None, 0.03)


def test_the_lists_of_a_teacher_are_learnt_from(finished: Path, tmp_path: Path) -> None:
    """Half from each pool, with a positive; the control trains on the same queries and the same candidates."""
    pipeline_of = _Pipeline(recipe(), DATA, finished)
    mixture, lists = pipeline_of._taught()
    for task, found in zip(mixture.tasks, lists, strict=True):
        drawn = [query for query in task.queries if query.qid in found]
        assert len(drawn) >= len(task.queries) // 2 - 1 and all(len(one.dids) == 6 for one in found.values())
        assert all(set(found[query.qid].dids) & set(query.positives) for query in drawn)
        assert any(did.count("/") == 2 for one in found.values() for did in one.dids)
        assert {did for one in found.values() for did in one.dids} <= {one.did for one in task.candidates}
    control = {
        "optimizer": STEPS,
        "loss": {"batch_size": 3, "num_negatives": 5, "in_batch": False, "inherit_temperature": True, "eval_every": 0},
        "lora": {"rank": 2, "alpha": 4},
    }
    other = recipe(distill=None, continue_hard=control)
    for task, found in zip(_Pipeline(other, DATA, finished).mixture("continue_hard").tasks, lists, strict=True):
        assert {query.qid for query in task.queries} == found.keys()
        for query in task.queries:
            assert set(query.negatives) == set(found[query.qid].dids) - set(query.positives)
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    folder = run(other, DATA, tmp_path, first="continue_hard", report=lambda _: None)
    assert Embedder(folder).encode_query("a").shape == (1, 32)
    reads = json.loads((folder / "manifest.json").read_text())["reads"]
    assert reads.keys() == {"finetune", "teach"}


def test_a_reranker_that_sees_otherwise_is_alone(finished: Path, tmp_path: Path) -> None:
    """All weights of the embedder were trained after ``restore``, with which this reranker begins."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    other = values()["rerank"] | {"initial": "restore", "loss": {"batch_size": 4, "eval_queries": 0, "eval_every": 0}}
    folder = run(recipe(rerank=other), DATA, tmp_path, first="rerank", last="rerank", report=lambda _: None)
    assert json.loads((folder / "manifest.json").read_text())["reads"].keys() == {
        *("restore", "mine", "judge", "finetune")
    }
    assert has_reranker(folder) and not (folder / "reranker").exists()
    assert not same_eyes(finished / "finetune", folder)
    assert Reranker(folder).score("a", ["b"]).shape == (1,)


def test_two_adapters_on_one_trunk(finished: Path, tmp_path: Path) -> None:
    """Embedder and reranker of a checkpoint that both leave as it is."""
    lora = {"rank": 2, "alpha": 4, "keep": True}
    short = {key: one for key, one in values().items() if key in ("name", "mixture", "mine", "rerank")}
    short["rerank"] |= {"initial": "restore", "lora": lora, "fill_from_mined": False}
    warmup = {"optimizer": STEPS, "loss": {"batch_size": 4, "eval_every": 0}, "lora": lora}
    model = {"checkpoint": str(finished / "restore")}
    whole = parse(Recipe, short | {"model": model, "warmup": warmup}, where="test")
    assert whole.first_model("rerank") is None
    folder = run(whole, DATA, tmp_path, report=lambda _: None)
    embedder, reranker = load_pair(folder)
    assert (folder / "embedder").is_dir() and (folder / "reranker" / "adapter").is_dir()
    assert not (folder / "reranker" / "weights.safetensors").exists()
    assert embedder.vision_hash == reranker.vision_hash
    alone = parse(Recipe, short | {"model": {"checkpoint": str(folder)}}, where="test")
    assert has_reranker(run(alone, DATA, tmp_path / "again", report=lambda _: None))


def test_every_stage_leaves_what_it_was_made_from(finished: Path) -> None:
    for stage in STAGES:
        manifest = json.loads((finished / stage / "manifest.json").read_text())
        assert manifest["stage"] == stage and len(manifest["inputs_sha256"]) == 2
        assert (finished / stage / "recipe.yaml").is_file()
    reads = {stage: set(json.loads((finished / stage / "manifest.json").read_text())["reads"]) for stage in STAGES}
    assert reads["restore"] == {"tower"}
    assert reads["text_pairs"] == {"restore"} and reads["caption_pairs"] == {"text_pairs"}
    assert reads["warmup"] == {"caption_pairs", "teacher"}
    assert reads["hard_negatives"] == {"warmup", "mine"}
    assert reads["judge"] == {"retrieve"}
    assert reads["finetune"] == {"hard_negatives", "judge", "mine"}
    assert reads["rerank"] == {"finetune", "judge", "mine"}
    assert reads["teach"] == {"finetune", "rerank"}
    assert reads["distill"] == {"finetune", "teach"}
    assert "finetune" in (finished / "report.md").read_text()
    assert not list(finished.glob("*.running"))


def test_finished_stages_are_not_run_again(finished: Path) -> None:
    said: list[str] = []
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*.safetensors")}
    run(recipe(), DATA, finished, report=said.append)
    assert said == [f"{stage}: finished before" for stage in STAGES]
    assert before == {file: file.stat().st_mtime_ns for file in finished.rglob("*.safetensors")}


def _run_in_child(folder: Path) -> None:
    run(recipe(), DATA, folder, report=lambda _: None)


def test_a_killed_run_ends_as_if_never_killed(finished: Path, tmp_path: Path) -> None:
    """SIGKILL at five random moments of the run, whatever it is doing then."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["quarterlight.pipeline"])
    whole = sum(json.loads((finished / one / "manifest.json").read_text())["seconds"] for one in STAGES)
    clock, kills = random.Random(0), 0
    while kills < 5:
        child = context.Process(target=_run_in_child, args=(tmp_path,))
        child.start()
        child.join(clock.uniform(0.1, 0.4) * max(whole, 5))
        if not child.is_alive():
            assert child.exitcode == 0
            shutil.rmtree(tmp_path)  # it was faster than the clock: begin again
            continue
        child.kill()
        child.join()
        kills += 1
    run(recipe(), DATA, tmp_path, report=lambda _: None)
    assert same_weights(finished, tmp_path)


def test_a_checkpoint_that_was_cut_short_is_not_resumed(finished: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()
    assert last_checkpoint(tmp_path / "nothing") is None


def test_a_stage_is_due_again_when_what_it_depends_on_changes(finished: Path, tmp_path: Path) -> None:
    def due(new: Recipe, data: Path = DATA) -> list[str]:
        stages = _Pipeline(new, data, finished)
        return [stage for stage in STAGES if not stages.finished(stage)]

    def warmup(**loss: float) -> Recipe:
        before = recipe()
        return replace(before, warmup=replace(before.warmup, loss=replace(before.warmup.loss, **loss)))

    assert due(recipe()) == []
    assert due(warmup(temperature=0.1)) == ["warmup"]  # and the later ones once it has been run
    assert due(warmup(eval_every=1)) == []
    assert due(recipe(seed=1)) == list(STAGES)
    assert due(recipe(finetune=values()["finetune"] | {"initial_weight": 0.0})) == []
    assert due(recipe(finetune=values()["finetune"] | {"initial_weight": 0.5})) == ["finetune"]
    assert due(recipe(finetune=values()["finetune"] | {"freeze_eyes": True})) == ["finetune"]
    for changed, stages in {"eval_every": [], "eval_queries": ["rerank"], "visual_tokens_bytes": []}.items():
        rerank = values()["rerank"]
        assert due(recipe(rerank=rerank | {"loss": rerank["loss"] | {changed: 5}})) == stages
    other = tmp_path / "data"
    shutil.copytree(DATA, other)
    queries = other / "emoji" / "queries" / "t2i.train.jsonl"
    queries.write_bytes(queries.read_bytes() + b"\n")
    assert due(recipe(), other) == [stage for stage in STAGES if stage != "restore"]


def test_stages_can_be_run_one_by_one(finished: Path, tmp_path: Path) -> None:
    for stage in STAGES[: STAGES.index("mine")]:
        shutil.copytree(finished / stage, tmp_path / stage)
    said: list[str] = []
    other = recipe(mine={"depth": 5, "window": [1, 5], "sample": None}, validation=None)
    folder = run(other, DATA, tmp_path, first="mine", last="hard_negatives", report=said.append)
    assert folder == tmp_path / "hard_negatives"
    assert said[6:8] == ["warmup: taken as it is", "mine: running"]
    assert not (tmp_path / "retrieve").exists()
    said.clear()
    run(recipe(seed=3), DATA, tmp_path, first="retrieve", last="retrieve", report=said.append)
    assert said[0] == "start: taken as it is"
    assert sorted(one.name for one in tmp_path.iterdir() if one.is_dir())[-2:] == ["tower", "warmup"]


@pytest.mark.parametrize(("stage", "before"), [("hard_negatives", "warmup"), ("finetune", "hard_negatives")])
def test_a_stage_can_leave_the_average_of_what_it_began_with_and_what_it_trained(
    finished: Path, tmp_path: Path, stage: str, before: str
) -> None:
    weights = [load_file(finished / before / "model.safetensors")]
    for share in (0.0, 0.25):  # whole weights and, in finetune, an adapter that is merged; all behind frozen eyes
        folder = tmp_path / str(share)
        for one in STAGES[: STAGES.index(stage)]:
            shutil.copytree(finished / one, folder / one)
        changed = recipe(**{stage: values()[stage] | {"freeze_eyes": True, "initial_weight": share}})
        assert _Pipeline(changed, DATA, folder).finished(before)
        run(changed, DATA, folder, first=stage, last=stage, report=lambda _: None)
        weights.append(load_file(folder / stage / "model.safetensors"))
    initial, trained, left = weights
    assert initial.keys() == trained.keys() == left.keys()
    for name, weight in left.items():
        torch.testing.assert_close(weight, 0.25 * initial[name] + 0.75 * trained[name], rtol=1e-6, atol=1e-7)
        if "vision_tower" in name or "projector" in name:  # not altered, though the recipe augments pictures elsewhere
            assert torch.equal(weight, initial[name])
    assert any(not torch.equal(trained[name], initial[name]) for name in initial)


def test_training_can_begin_with_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    short = values()
    short = {key: short[key] for key in ("name", "mixture", "validation")}
    model = {"checkpoint": str(finished / "restore"), "visual_token_compression": 1, "system_prompt": "Be brief."}
    warmup = {"optimizer": STEPS, "loss": {"batch_size": 4}, "lora": {"rank": 2, "alpha": 4, "keep": True}}
    whole = parse(Recipe, short | {"model": model, "warmup": warmup}, where="test")
    folder = run(whole, DATA, tmp_path, report=print)
    embedder = Embedder(folder)
    assert embedder.model.config.visual_token_compression == 1
    assert embedder.settings.system_prompt == "Be brief."
    assert [one.name for one in tmp_path.iterdir() if one.is_dir()] == ["warmup"]
    shutil.copytree(finished / "warmup", tmp_path / "other")
    moved = replace(whole, model=replace(whole.model, checkpoint=str(tmp_path / "other")))
    assert _Pipeline(whole, DATA, tmp_path).finished("warmup")
    assert not _Pipeline(moved, DATA, tmp_path).finished("warmup")


def test_a_folder_that_was_half_removed_is_not_resumed(finished: Path, tmp_path: Path) -> None:
    """A checkpoint whose mark is gone may be of any recipe."""
    (tmp_path / "start.running" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(RecipeError, match="half a run of another recipe"):
        run(recipe(), DATA, tmp_path, report=lambda _: None)


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(pipeline, "save_file", full)
    with pytest.raises(RecipeError, match=r"teacher cannot go on: .*No space left on device.*What was saved is kept"):
        run(recipe(), DATA, tmp_path, last="teacher", report=lambda _: None)
    monkeypatch.undo()
    assert run(recipe(), DATA, tmp_path, last="teacher", report=lambda _: None) == tmp_path / "teacher"


def test_merging_in_the_tower_is_a_setting_of_the_model(tmp_path: Path) -> None:
    def with_merging(share: float | None) -> Recipe:
        return recipe(model=values()["model"] | {"vision_token_merging": share})

    folder = run(with_merging(0.25), DATA, tmp_path / "run", last="start", report=lambda _: None)
    assert load_config(folder).vision_token_merging == 0.25
    told, other, untold = (
        _Pipeline(with_merging(one), DATA, tmp_path).fingerprint("start") for one in (0.25, 0.5, None)
    )
    assert len({told, other, untold}) == 3
    assert untold == _Pipeline(recipe(), DATA, tmp_path).fingerprint("start")
    assert untold == _Pipeline(with_merging(0), DATA, tmp_path).fingerprint("start")

    def begun_with(checkpoint: Path, share: float | None) -> str:
        short = {key: value for key, value in values().items() if key in ("name", "mixture", "validation", "restore")}
        model = {"checkpoint": str(checkpoint), "vision_token_merging": share}
        begun = parse(Recipe, short | {"model": model}, where="test")
        return _Pipeline(begun, DATA, tmp_path / "other").fingerprint("restore")

    assert begun_with(folder, 0.0) != begun_with(folder, None)  # this one merges, unless it is told not to


def test_what_cannot_be_run_is_said(finished: Path, tmp_path: Path) -> None:
    def fails(error: type[Exception], match: str, new: Recipe, out: Path = tmp_path, **span: str) -> None:
        with pytest.raises(error, match=match):
            run(new, DATA, out, **span, report=lambda _: None)

    fails(RecipeError, "no stage 'towr'", recipe(), first="towr")
    fails(RecipeError, "nothing to run", recipe(), first="warmup", last="teacher")
    fails(RecipeError, "needs the stage start, which is not finished", recipe(), first="teacher")
    nobody = [{"dataset": "emoji", "task": "t2i", "weight": 1.0, "where": {"lang": "tlh"}}]
    fails(DatasetError, "no query with", recipe(mixture=nobody))
    (tmp_path / "start.running" / "fingerprint").write_text("of another")
    fails(RecipeError, "half a run of another recipe", recipe())
    foreign = tmp_path / "foreign"
    (foreign / "start").mkdir(parents=True)
    fails(RecipeError, "not made by training", recipe(), out=foreign)
    missing = values()["restore"] | {"data": [{"file": "nowhere.jsonl"}]}
    fails(DatasetError, "nowhere.jsonl", recipe(restore=missing), out=finished)
    later = values()["finetune"] | {"mixture": [{"dataset": "emoji", "task": "t2x"}]}
    fails(DatasetError, "no task 't2x'", recipe(finetune=later), out=tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())  # nothing has been run for it
    tied = values()["model"]
    headless = tied | {"text": tied["text"] | {"tie_word_embeddings": False}}
    untied = tmp_path / "untied"
    none = {"rerank": None, "teach": None, "distill": None}
    run(recipe(model=headless, **none), DATA, untied, last="start", report=lambda _: None)
    given = {key: one for key, one in values().items() if key in ("name", "mixture", "warmup", "rerank")}
    given |= {"model": {"checkpoint": str(untied / "start")}}
    given["warmup"].pop("teacher_weight")
    given["rerank"].pop("fill_from_mined")
    fails(RecipeError, "no language head of its own", parse(Recipe, given, where="test"), out=tmp_path / "headless")
    fails(RecipeError, "meant for 2 devices, but 1 processes run it: say --set devices=1", recipe(devices=2))
