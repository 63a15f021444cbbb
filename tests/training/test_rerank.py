"""Shared beginnings = whole prompts, values and gradients; pictures are looked at once; resumed = uninterrupted; two
processes = one; what is trained is what a reranker scores with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.runs import mixed_task, optimizer
from tests.training.test_distributed import in_two_processes
from torch import Tensor
from torch.nn import functional as F

from quarterlight.data.contrastive import TaskMixture
from quarterlight.data.rerank import RerankRow, RerankSampler
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError, RecipeError
from quarterlight.images import load_image
from quarterlight.models.checkpoint import load_backbone
from quarterlight.models.inputs import TokenizedPrompt
from quarterlight.models.rerank_inputs import AnswerTokens, RerankFormatter
from quarterlight.models.reranker import Reranker
from quarterlight.models.settings import RerankerSettings
from quarterlight.records import Item
from quarterlight.training.collate import Pictures
from quarterlight.training.distributed import rank
from quarterlight.training.lora import LoraRecipe, add_lora
from quarterlight.training.optimizer import OptimizerRecipe
from quarterlight.training.rerank import (
    AnswerWriter,
    RerankCollator,
    RerankRecipe,
    RerankTrainer,
    VisualTokens,
    train_rerank,
)

SETTINGS = RerankerSettings(text_max_tokens=32)
RECIPE = RerankRecipe(batch_size=4, min_negatives=2, max_negatives=3, eval_every=2, eval_queries=2)


def task_with_negatives(folder: Path) -> RetrievalTask:
    """Texts, pictures with text and pages on both sides; the first queries have one negative only."""
    task = mixed_task(folder)
    dids = [one.did for one in task.candidates]
    queries = []
    for n, query in enumerate(task.queries):
        others = [did for did in dids[n + 1 :] + dids[:n] if did not in query.positives]
        queries.append(replace(query, negatives=tuple(others[: 1 if n < 2 else 6]), also_relevant=(others[-1],)))
    return replace(task, queries=[*queries, *(replace(one, qid=f"{one.qid}+") for one in queries[2:])])


@pytest.fixture
def task(tmp_path: Path) -> RetrievalTask:
    return task_with_negatives(tmp_path / "pictures")


class Bench:
    """The tiny model as training sees it, with what makes its batches."""

    def __init__(self, checkpoint: Path, attention: str = "eager", max_bytes: int = 1 << 30, **options: Any) -> None:
        self.model, self.processor = load_backbone(checkpoint, language_head=True)
        self.model.set_attn_implementation(attention)
        self.formatter = RerankFormatter(self.processor, SETTINGS)
        self.known = VisualTokens(max_bytes)
        self.answers = AnswerTokens.of(self.processor.tokenizer, checkpoint)
        pictures = Pictures(self.processor.image_processor, max_bytes=0)
        self.collate = RerankCollator(self.formatter, pictures, self.known)
        self.writer: Any = AnswerWriter(self.model, self.processor, self.known, self.answers, **options)

    def whole(self, items: Sequence[Item], prompt: TokenizedPrompt) -> Tensor:
        """[V] for the answer to one whole prompt by transformers' own forward pass."""
        cut = self.processor.image_processor
        tiles = [cut.tiles(load_image(one), item.max_tiles or 1) for item in items for one in item.images]
        ids, _ = self.formatter.tokenize.expand(prompt, [len(one) for one in tiles])
        pixels = [cut.normalize_tiles(torch.from_numpy(one)) for one in tiles]
        return self.model(input_ids=torch.tensor([ids]), pixel_values=torch.cat(pixels) if pixels else None).logits[
            0, -1
        ]

    def prompts(self, row: RerankRow) -> list[tuple[list[Item], TokenizedPrompt, int]]:
        """(pictures of, prompt, answer) of both pairs and the list of a row."""
        query, found = row.query.item, []
        for one, answer in ((row.positive, self.answers.yes), (row.negative, self.answers.no)):
            runs = self.formatter.prefix(query).runs + self.formatter.tails([one.item])[0].runs
            found.append(([query, one.item], TokenizedPrompt(runs), answer))
        if row.slot is not None:
            items = [one.item for one in row.listed]
            runs = self.formatter.prefix(query, listwise=True).runs + self.formatter.list_tail(items).runs
            found.append(([query, *items], TokenizedPrompt(runs), self.answers.numbers[row.slot]))
        return found

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        self.model.zero_grad()
        loss.backward()
        return {name: one.grad.clone() for name, one in self.model.named_parameters() if one.grad is not None}


def some_rows(task: RetrievalTask, count: int = 8) -> list[RerankRow]:
    rows = RerankSampler(TaskMixture(tasks=[task]), batch_size=count, max_negatives=3).rows(0)
    assert {row.slot is None for row in rows} == {True, False}
    return rows


@pytest.mark.parametrize(("attention", "shared"), [("eager", True), ("eager", False), ("sdpa", True), ("sdpa", False)])
def test_what_is_shared_changes_nothing(
    tiny_checkpoint: Path, task: RetrievalTask, attention: str, shared: bool
) -> None:
    bench = Bench(tiny_checkpoint, attention, shared_prefix=shared)
    rows = some_rows(task)
    batch = bench.collate(rows)
    assert all(len(part["opening"]) > 40 for part in batch["parts"])
    assert sum(len(part["groups"]) for part in batch["parts"]) > 2
    loss_N, logits_NA = bench.writer(batch)
    place = {(int(row), int(kind)): n for n, (row, kind) in enumerate(zip(batch["rows"], batch["kinds"], strict=True))}
    expected = []
    for number, row in enumerate(rows):
        for kind, (items, prompt, answer) in enumerate(bench.prompts(row)):
            logits_V = bench.whole(items, prompt)
            n = place[number, kind]
            assert batch["labels"][n] == answer
            torch.testing.assert_close(logits_NA[n], logits_V[bench.writer.words], atol=1e-4, rtol=1e-4)
            expected.append(F.cross_entropy(logits_V, torch.tensor(answer)))
            torch.testing.assert_close(loss_N[n], expected[-1], atol=1e-4, rtol=1e-4)
    assert len(expected) == len(loss_N) == len(place)
    whole = bench.gradients(torch.stack(expected).sum())
    found = bench.gradients(loss_N.sum())
    assert found.keys() == whole.keys() and any("embed_tokens" in name for name in found)
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-4, rtol=2e-3)
    assert not any(part in name for part in ("vision_tower", "multi_modal_projector") for name in found)


def test_a_batch_is_its_rows(tiny_checkpoint: Path, task: RetrievalTask) -> None:
    bench, rows = Bench(tiny_checkpoint), some_rows(task)
    together = bench.collate(rows)
    loss_N, _ = bench.writer(together)
    for number, row in enumerate(rows):
        alone, _ = bench.writer(bench.collate([row]))
        torch.testing.assert_close(alone, loss_N[together["rows"] == number], atol=1e-4, rtol=1e-4)


def test_the_head_sees_answers_alone(tiny_checkpoint: Path, task: RetrievalTask) -> None:
    bench, sizes = Bench(tiny_checkpoint), []
    bench.model.lm_head.register_forward_hook(lambda _, inputs, output: sizes.append(tuple(output.shape)))
    rows = some_rows(task)
    bench.writer(bench.collate(rows))
    lists = sum(row.slot is not None for row in rows)
    assert sizes == [(2 * len(rows) + lists, bench.model.config.text_config.vocab_size)]


def test_a_picture_is_looked_at_once(tiny_checkpoint: Path, task: RetrievalTask) -> None:
    rows = some_rows(task)
    shown = {
        (source, item.max_tiles): 5 if item.max_tiles == 4 else 1
        for row in rows
        for item in (row.query.item, *(one.item for one in (row.positive, row.negative, *row.listed)))
        for source in item.images
    }
    for max_bytes, passes in ((1 << 30, 1), (0, 2)):
        bench, seen = Bench(tiny_checkpoint, max_bytes=max_bytes), []
        bench.model.model.vision_tower.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(1))
        first, _ = bench.writer(bench.collate(rows))
        second, _ = bench.writer(bench.collate(rows))
        assert sum(seen) == passes * -(-sum(shown.values()) // 4)  # tiles by four
        assert torch.equal(first, second)
    bench.writer.train()
    assert bench.model.training and not bench.model.model.vision_tower.training
    tight = VisualTokens(100)
    tight.put("large", torch.zeros(26), 1)
    tight.put("small", torch.zeros(25), 1)
    assert "small" in tight and "large" not in tight


def test_what_is_trained_is_what_a_reranker_scores_with(tiny_checkpoint: Path, task: RetrievalTask) -> None:
    bench, rows = Bench(tiny_checkpoint), some_rows(task)
    batch = bench.collate(rows)
    _, logits_NA = bench.writer(batch)
    reranker = Reranker.from_model(bench.model.eval(), bench.processor, SETTINGS)
    for number, row in enumerate(rows):
        pair_22 = logits_NA[(batch["rows"] == number) & (batch["kinds"] < 2), :2]
        scores = reranker.score(row.query.item, [row.positive.item, row.negative.item])
        torch.testing.assert_close(torch.from_numpy(scores), pair_22.softmax(dim=1)[:, 0], atol=1e-4, rtol=1e-4)
        if row.slot is not None:
            number_A = logits_NA[(batch["rows"] == number) & (batch["kinds"] == 2), 2:][0, : len(row.listed)]
            ranked = reranker.rank_listwise(row.query.item, [one.item for one in row.listed])
            found = {one["corpus_id"]: one["score"] for one in ranked}
            torch.testing.assert_close(
                torch.tensor([found[n] for n in range(len(row.listed))]), number_A.softmax(0), atol=1e-4, rtol=1e-3
            )


def test_a_row_with_an_unreadable_picture_does_not_count(
    tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    good, bad = some_rows(task)[:2]
    bad = replace(bad, query=replace(bad.query, item=replace(bad.query.item, image=tmp_path / "broken.png")))
    bench = Bench(tiny_checkpoint)
    for _ in range(2):  # also when its tokens are known
        batch = bench.collate([good, bad])
        assert torch.equal(batch["weights"], (batch["rows"] == 0).float())
        (reason,) = batch["unreadable"]
        assert reason.startswith(str(tmp_path / "broken.png"))
        bench.writer(batch)


def train(
    checkpoint: Path,
    task: RetrievalTask,
    folder: Path,
    steps: OptimizerRecipe | None = None,
    lora: LoraRecipe | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    """A short run, whose model is ``trained_model`` of the trainer."""
    model, processor = load_backbone(checkpoint, language_head=True, dtype=dtype)
    model.set_attn_implementation("eager")
    if lora is not None:
        add_lora(model, lora, seed=0)
    trainer: Any = train_rerank(
        model,
        processor,
        settings=SETTINGS,
        mixture=TaskMixture(tasks=[task]),
        recipe=replace(RECIPE, **changes),
        optimizer=steps or optimizer(learning_rate=1e-2, gradient_accumulation_steps=2),
        folder=folder,
        seed=1,
    )
    trainer.trained_model = model
    return trainer


class Stop(Exception):
    """Raised where a test pulls the plug."""


@pytest.mark.parametrize("lora", [None, LoraRecipe(rank=2, dropout=0.1)])
def test_training_learns_and_resumes_bitwise(
    tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path, monkeypatch: Any, lora: LoraRecipe | None
) -> None:
    before = load_backbone(tiny_checkpoint, language_head=True)[0].state_dict()
    whole = train(tiny_checkpoint, task, tmp_path / "whole", lora=lora)
    measured = [one for one in whole.state.log_history if "eval_loss" in one]
    assert len(measured) == 2 and measured[1]["eval_loss"] < measured[0]["eval_loss"]
    for name in ("pair_accuracy", "list_accuracy"):
        assert 0 <= measured[1][f"eval_{name}"] <= 1
    total = measured[1]["eval_pointwise_loss"] + measured[1]["eval_listwise_loss"]
    assert measured[1]["eval_loss"] == pytest.approx(total)
    weights = whole.trained_model.state_dict()
    changed = {name for name in weights if name not in before or not torch.equal(weights[name], before[name])}
    assert changed and not any("vision" in name or "projector" in name for name in changed)
    assert lora is None or all(".lora_" in name or ".base_layer." in name for name in changed)

    step = RerankTrainer.compute_loss

    def pull_the_plug(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 3:
            raise Stop
        return step(self, *arguments, **options)

    monkeypatch.setattr(RerankTrainer, "compute_loss", pull_the_plug)
    with pytest.raises(Stop):
        train(tiny_checkpoint, task, tmp_path / "halves", lora=lora)
    monkeypatch.undo()
    ahead = optimizer(learning_rate=1e-2, gradient_accumulation_steps=2, num_workers=2)
    halves = train(tiny_checkpoint, task, tmp_path / "halves", ahead, lora)
    assert halves.state.global_step == 4
    for name, expected in weights.items():
        assert torch.equal(halves.trained_model.state_dict()[name], expected), name


def test_weights_of_the_losses(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    once = optimizer(num_steps=1, warmup_steps=0)

    def loss(name: str, **weights: float) -> float:
        trainer = train(tiny_checkpoint, task, tmp_path / name, once, eval_every=0, batch_size=9, **weights)
        return trainer.state.log_history[0]["loss"]

    both, pairs, lists = loss("both"), loss("pairs", listwise_weight=0.0), loss("lists", pointwise_weight=1e-9)
    assert both == pytest.approx(pairs + lists, rel=1e-4)
    weighted = loss("weighted", pointwise_weight=2.0, listwise_weight=0.5)
    assert weighted == pytest.approx(2 * pairs + lists / 2, rel=1e-4)
    assert loss("lists alone", pointwise_weight=0.0) > 0  # of queries that have lists


def test_gradient_checkpointing_changes_nothing(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    plain, again = (
        train(tiny_checkpoint, task, tmp_path / str(on), optimizer(gradient_checkpointing=on), eval_every=0)
        for on in (False, True)
    )
    for one, other in zip(plain.state.log_history[:4], again.state.log_history[:4], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


TWO = {"eval_queries": 3, "eval_every": 2}


def train_half(checkpoint: Path, folder: Path) -> None:
    """The run of two processes, four rows each; the first leaves weights and log."""
    task = task_with_negatives(folder.parent / "pictures")
    steps = optimizer(num_steps=2, learning_rate=1e-2)
    trainer = train(checkpoint, task, folder, steps, dtype=torch.float64, batch_size=4, **TWO)
    if rank() == 0:
        torch.save({"weights": trainer.trained_model.state_dict(), "log": trainer.state.log_history}, folder / "two.pt")


def test_two_processes_are_one(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    # in float64, in which Adam does not blow rounding errors up
    steps = optimizer(num_steps=2, learning_rate=1e-2)
    one = train(tiny_checkpoint, task, tmp_path / "one", steps, dtype=torch.float64, batch_size=8, **TWO)
    in_two_processes(train_half, tiny_checkpoint, tmp_path / "two")
    two = torch.load(tmp_path / "two" / "two.pt")
    torch.testing.assert_close(two["weights"], dict(one.trained_model.state_dict()), atol=1e-5, rtol=1e-4)
    for before, after in zip(one.state.log_history, two["log"], strict=True):
        for name in before.keys() & {"loss", "eval_loss", "eval_pair_accuracy", "eval_list_accuracy"}:
            assert after[name] == pytest.approx(before[name], rel=1e-4), name


def test_too_many_unreadable_pictures_stop_training(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    for file in (tmp_path / "pictures").glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"pictures seen so far cannot be read, .* For example: .*\.png"):
        train(tiny_checkpoint, task, tmp_path / "run", optimizer(num_steps=99, warmup_steps=1), eval_every=0)
    assert (tmp_path / "run" / "unreadable.txt").read_text().count(".png")


def test_a_loss_that_is_no_number_names_its_rows(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    steps = optimizer(learning_rate=1e38, max_grad_norm=1e38)
    with pytest.raises(RecipeError, match=r"The loss became nan at step [1-3]: look at the batch"):
        train(tiny_checkpoint, task, tmp_path / "run", steps, eval_every=0)
    problem = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert {*problem["qids"]} <= {one.qid for one in task.queries} and len(problem["dids"]) >= 2 * RECIPE.batch_size


def test_flash_attention_is_said_not_to_do(tiny_checkpoint: Path, task: RetrievalTask, tmp_path: Path) -> None:
    model, processor = load_backbone(tiny_checkpoint, language_head=True)
    model.config.text_config._attn_implementation = "flash_attention_2"
    mixture = TaskMixture(tasks=[task])
    with pytest.raises(RecipeError, match="take sdpa"):
        train_rerank(
            model,
            processor,
            settings=SETTINGS,
            mixture=mixture,
            recipe=RECIPE,
            optimizer=optimizer(),
            folder=tmp_path,
            seed=0,
        )


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("min_negatives", 0), ("max_negatives", 9), ("max_unreadable", 1.5)]
)
def test_impossible_recipes(name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=name):
        RerankRecipe(**{name: value})
