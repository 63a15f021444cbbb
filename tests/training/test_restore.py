"""Packed = unpacked, sliced = whole, resumed = uninterrupted, two processes = one; bad pictures and losses are told."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.training.test_distributed import in_two_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from quarterlight.data.conversations import Conversation, Message, from_task
from quarterlight.data.packing import PackedSampler
from quarterlight.data.retrieval import RetrievalDataset
from quarterlight.errors import DatasetError, RecipeError
from quarterlight.models.checkpoint import load_backbone
from quarterlight.training.distributed import rank
from quarterlight.training.optimizer import OptimizerRecipe
from quarterlight.training.restore import (
    ConversationTokenizer,
    PackCollator,
    RestoreRecipe,
    RestoreTrainer,
    next_token_loss,
    train_restore,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "retrieval"
RECIPE = RestoreRecipe(max_tokens=128, packs_per_device=2, max_tiles=1, eval_every=2, eval_conversations=4)
OPTIMIZER = OptimizerRecipe(
    num_steps=4,
    learning_rate=1e-2,
    warmup_steps=1,
    bf16=False,
    save_every=2,
    log_every=1,
    gradient_accumulation_steps=2,
)


def said(question: str, answer: str, *images: Any, more: Sequence[str] = ()) -> Conversation:
    texts = [question, answer, *more]
    messages = tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(texts))
    return Conversation(id=question, messages=messages, images=images)


class Listed:
    """Conversations in memory."""

    def __init__(self, *conversations: Conversation) -> None:
        self.label = "listed"
        self.conversations = conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Conversation:
        return self.conversations[index]


@pytest.fixture
def writer(tiny_checkpoint: Path) -> tuple[Any, Any]:
    """The tiny model with a language head, and its processor."""
    return load_backbone(tiny_checkpoint, language_head=True)


@pytest.fixture
def conversations(picture: Callable[..., Image.Image]) -> list[Conversation]:
    return [
        said("<image>\nWhat is this?", "a red apple", picture(0)),
        said("Hello", "Good day", more=["And now?", "Good night"]),
        said("<image> or <image>?", "the second", picture(1), picture(2, 256, 64)),
        said("Which?", "that one"),
    ]


def test_chatml_and_labels(writer: Any, tokenizer: Any, picture: Callable[..., Image.Image]) -> None:
    tokenize = ConversationTokenizer(writer[1], max_tiles=4)
    wide = said("<image>\nWhat <|im_end|> is this?", "a <image>.", picture(0, 256, 64), more=["Sure?", "yes"])
    system = replace(wide, messages=(Message("system", "Be brief."), *wide.messages))
    sample = tokenize(system)
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<img>" + "<IMG_CONTEXT>" * 4 * 5 + "</img>\n"
        "What @ is this?<|im_end|>\n<|im_start|>assistant\na <image>.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )
    before, after = text.split("@")
    spelt = tokenizer("<|im_end|>", split_special_tokens=True)["input_ids"]
    expected = tokenizer(before)["input_ids"] + spelt + tokenizer(after)["input_ids"]
    assert sample.ids.tolist() == expected
    assert tokenizer.decode(sample.ids[sample.labelled]) == "a <image>.<|im_end|>yes<|im_end|>"
    assert (sample.tiles, expected[sample.image_ends[0] - 1]) == ((5,), tokenizer.end_image_token_id)
    assert tokenize(said("<image>", "x", picture(0, 256, 64))).tiles == (5,)
    assert ConversationTokenizer(writer[1], max_tiles=1)(wide).tiles == (1,)


def whole_logits(model: Any, processor: Any, conversation: Conversation, max_tiles: int) -> Tensor:
    """[labels, V] of one conversation by transformers' own forward pass."""
    sample = ConversationTokenizer(processor, max_tiles)(conversation)
    ids = torch.from_numpy(sample.ids).long()[None]
    tiles = [processor.image_processor.tiles(image, max_tiles) for image in conversation.images]
    pixels = [processor.image_processor.normalize_tiles(torch.from_numpy(one)) for one in tiles]
    logits = model(input_ids=ids, pixel_values=torch.cat(pixels) if pixels else None).logits[0, :-1]
    return logits[torch.from_numpy(sample.labelled[1:])]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_is_unpacked(writer: Any, conversations: list[Conversation], attention: str) -> None:
    model, processor = writer
    model.set_attn_implementation(attention)
    recipe = replace(RECIPE, max_tiles=4)
    tokenize, collate = ConversationTokenizer(processor, 4), PackCollator(processor, recipe)
    first, second, third, fourth = (tokenize(one) for one in conversations)
    batch = collate([[third, second, first], [fourth]])
    heads: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda _, inputs, output: heads.append(output))
    loss = next_token_loss(model, batch)
    handle.remove()
    order = [conversations[2], conversations[1], conversations[0], conversations[3]]
    expected = torch.cat([whole_logits(model, processor, one, 4) for one in order])
    torch.testing.assert_close(torch.cat(heads), expected, atol=1e-5, rtol=1e-5)
    unpacked = torch.nn.functional.cross_entropy(expected, batch["labels"], reduction="sum")
    torch.testing.assert_close(loss, unpacked)
    assert len(batch["labels"]) == len(expected) == sum(one.labelled.sum() for one in (first, second, third, fourth))


def test_gradient_of_slices_is_that_of_the_whole(writer: Any, conversations: list[Conversation]) -> None:
    model, processor = writer
    tokenize, collate = ConversationTokenizer(processor, 1), PackCollator(processor, RECIPE)
    batch = collate([[tokenize(one) for one in conversations]])

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}

    expected = gradients(
        sum(
            torch.nn.functional.cross_entropy(
                whole_logits(model, processor, one, 1),
                torch.from_numpy((sample := tokenize(one)).ids[sample.labelled]).long(),
                reduction="sum",
            )
            for one in conversations
        )
    )
    for slices in (1, 3, 40):  # more slices than labels
        found = gradients(next_token_loss(model, batch | {"slices": slices}))
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4)


def test_scores_of_the_vocabulary_exist_for_a_slice_at_a_time(writer: Any, conversations: list[Conversation]) -> None:
    model, processor = writer
    tokenize, collate = ConversationTokenizer(processor, 1), PackCollator(processor, RECIPE)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: sizes.append(len(output)))
    batch = collate([[tokenize(one) for one in conversations]])
    next_token_loss(model, batch | {"slices": 4}).backward()
    labels = len(batch["labels"])
    assert len(sizes) == 8 and sum(sizes) == 2 * labels  # each slice once forward, once more in the backward pass
    assert max(sizes) <= labels // 4 + 1


def test_text_alone_still_reaches_the_tower(writer: Any, conversations: list[Conversation]) -> None:
    model, processor = writer
    tokenize, collate = ConversationTokenizer(processor, 1), PackCollator(processor, RECIPE)
    next_token_loss(model, collate([[tokenize(conversations[1])]])).backward()
    gradients = [one.grad for one in model.model.vision_tower.parameters() if one.requires_grad]
    assert all(one is not None and not one.any() for one in gradients[:5])
    blank = next_token_loss(model, collate([[]]))
    blank.backward()
    assert blank.item() == 0


def test_unreadable_pictures_lose_their_labels(writer: Any, conversations: list[Conversation], tmp_path: Path) -> None:
    tokenize, collate = ConversationTokenizer(writer[1], 4), PackCollator(writer[1], replace(RECIPE, max_tiles=4))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    broken = said("<image> and <image>?", "both", conversations[0].images[0], str(tmp_path / "broken.png"))
    samples = [tokenize(one) for one in (broken, conversations[1])]
    batch = collate([samples])
    assert batch["labels"].tolist() == samples[1].ids[samples[1].labelled].tolist()
    (reason,) = batch["unreadable"]
    assert reason.startswith(str(tmp_path / "broken.png")) and batch["num_pictures"] == 2
    assert batch["pixel_values"].shape[0] == sum(samples[0].tiles)


def train(
    folder: Path,
    checkpoint: Path,
    optimizer: OptimizerRecipe = OPTIMIZER,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> RestoreTrainer:
    """A short run on captions and questions, whose model is ``trained_model`` of the trainer."""
    model, processor = load_backbone(checkpoint, language_head=True, dtype=dtype)
    model.set_attn_implementation("eager")
    emoji, shapes = RetrievalDataset(FIXTURE / "emoji"), RetrievalDataset(FIXTURE / "easy_vqa")
    options: dict[str, Any] = {
        "sources": [from_task(emoji.load("i2t", "train")), from_task(shapes.load("it2t", "train"))],
        "validation": [from_task(emoji.load("i2t", "test")), from_task(shapes.load("it2t", "test"))],
        "weights": [1.0, 2.0],
        "recipe": RECIPE,
        "seed": 1,
    }
    trainer = train_restore(model, processor, optimizer=optimizer, folder=folder, **(options | changes))
    trainer.trained_model = model  # type: ignore[attr-defined]
    return trainer


def trained(trainer: Any) -> dict[str, Tensor]:
    """The weights of the model that was given, rather than of what a launcher made of it."""
    return trainer.trained_model.state_dict()


class Stop(Exception):
    """Raised where a test pulls the plug."""


def test_training_learns_and_resumes_bitwise(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole = train(tmp_path / "whole", tiny_checkpoint)
    history = [one["eval_loss"] for one in whole.state.log_history if "eval_loss" in one]
    assert len(history) == 2 and history[1] < history[0]
    assert {"eval_loss_emoji_i2t", "eval_loss_easy_vqa_it2t"} <= whole.evaluate().keys()

    step = RestoreTrainer.compute_loss

    def pull_the_plug(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 3:
            raise Stop
        return step(self, *arguments, **options)

    monkeypatch.setattr(RestoreTrainer, "compute_loss", pull_the_plug)
    with pytest.raises(Stop):
        train(tmp_path / "halves", tiny_checkpoint)
    monkeypatch.undo()
    halves = train(tmp_path / "halves", tiny_checkpoint, replace(OPTIMIZER, num_workers=0))
    assert halves.state.global_step == 4
    for name, expected in trained(whole).items():
        assert torch.equal(trained(halves)[name], expected), name


def test_accumulated_batches_are_one_batch(tiny_checkpoint: Path, tmp_path: Path) -> None:
    # three batches of two packs with unequal numbers of labels, or one of six
    once = replace(OPTIMIZER, num_steps=1, warmup_steps=0)
    small = train(tmp_path / "small", tiny_checkpoint, replace(once, gradient_accumulation_steps=3), validation=[])
    large = train(
        tmp_path / "large",
        tiny_checkpoint,
        replace(once, gradient_accumulation_steps=1),
        validation=[],
        recipe=replace(RECIPE, packs_per_device=6),
    )
    losses = [one.state.log_history[0]["loss"] for one in (small, large)]
    norms = [one.state.log_history[0]["grad_norm"] for one in (small, large)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_epochs_count_conversations(tiny_checkpoint: Path, tmp_path: Path) -> None:
    optimizer = replace(OPTIMIZER, num_steps=None, num_epochs=1.0, warmup_steps=None, gradient_accumulation_steps=1)
    trainer = train(tmp_path, tiny_checkpoint, optimizer, validation=[], weights=None)
    tasks = [
        RetrievalDataset(FIXTURE / name).load(task, "train") for name, task in (("emoji", "i2t"), ("easy_vqa", "it2t"))
    ]
    _, processor = load_backbone(tiny_checkpoint)
    sampler = PackedSampler(
        [from_task(task) for task in tasks],
        tokenize=ConversationTokenizer(processor, 1),
        max_tokens=RECIPE.max_tokens,
        seed=1,
    )
    drawn = trainer.state.global_step * 2 * sampler.conversations_per_pack
    total = sum(len(task.queries) for task in tasks)
    assert total <= drawn < total + 3 * sampler.conversations_per_pack


def test_too_many_unreadable_pictures_stop_training(tiny_checkpoint: Path, tmp_path: Path) -> None:
    missing = Listed(*(said(f"<image> {n}", "x", str(tmp_path / f"{n}.png")) for n in range(9)))
    optimizer = replace(OPTIMIZER, num_steps=99)
    with pytest.raises(DatasetError, match=r"pictures seen so far cannot be read, .* For example: .*\.png"):
        train(tmp_path / "run", tiny_checkpoint, optimizer, sources=[missing], validation=[], weights=None)
    lines = (tmp_path / "run/unreadable.txt").read_text().splitlines()
    assert len(lines) == 9 and {line.split()[0] for line in lines} == {str(tmp_path / f"{n}.png") for n in range(9)}


def test_a_loss_that_is_no_number_names_its_conversations(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"The loss became nan at step [1-3]: look at the batch"):
        train(tmp_path, tiny_checkpoint, replace(OPTIMIZER, learning_rate=1e38, max_grad_norm=1e38))
    problem = json.loads((tmp_path / "nonfinite.json").read_text())
    assert problem["step"] >= 1 and all(name.startswith(("101:", "106:")) for name in problem["ids"])


def test_flash_attention_takes_packs_one_by_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """In a batch of several rows it would not tell the samples of a pack apart."""
    model, processor = load_backbone(tiny_checkpoint, language_head=True)
    model.config.text_config._attn_implementation = "flash_attention_2"
    recipe = replace(RECIPE, packs_per_device=2)
    with pytest.raises(RecipeError, match="packs_per_device must be 1"):
        train_restore(
            model, processor, sources=[], validation=[], recipe=recipe, optimizer=OPTIMIZER, folder=tmp_path, seed=0
        )


@pytest.mark.parametrize(("name", "value"), [("max_tokens", 0), ("packs_per_device", 0), ("max_unreadable", 1.5)])
def test_impossible_recipes(name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=name):
        RestoreRecipe(**{name: value})


ONCE_MORE = replace(OPTIMIZER, num_steps=2, gradient_checkpointing=True)


def train_half(checkpoint: Path, folder: Path) -> None:
    """The run of ``ONCE_MORE``, a pack of each two on this process; the first leaves weights and log."""
    trainer = train(folder, checkpoint, ONCE_MORE, torch.float64, recipe=replace(RECIPE, packs_per_device=1))
    if rank() == 0:
        torch.save({"weights": trained(trainer), "log": trainer.state.log_history}, folder / "two.pt")


def test_two_processes_are_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    # in float64, in which Adam does not blow rounding errors up
    one = train(tmp_path / "one", tiny_checkpoint, ONCE_MORE, torch.float64)
    in_two_processes(train_half, tiny_checkpoint, tmp_path / "two")
    two = torch.load(tmp_path / "two" / "two.pt")
    torch.testing.assert_close(two["weights"], dict(trained(one)), atol=1e-5, rtol=1e-4)
    for before, after in zip(one.state.log_history, two["log"], strict=True):
        for name in before.keys() & {"loss", "eval_loss", "eval_loss_emoji_i2t"}:
            assert after[name] == pytest.approx(before[name], rel=1e-4), name


class Loss(nn.Module):
    """A module for the shards to be gathered around."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        return next_token_loss(self.model, batch)  # type: ignore[arg-type]


def sharded_gradients(checkpoint: Path, folder: Path, conversations: list[Conversation]) -> None:
    """Of pictures on one process and text alone on the other, when weights are spread over both."""
    model, processor = load_backbone(checkpoint, language_head=True)
    loss = Loss(model)
    for layer in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layer):
        fully_shard(layer)
    fully_shard(loss)
    tokenize, collate = ConversationTokenizer(processor, 1), PackCollator(processor, RECIPE)
    batch = collate([[tokenize(one) for one in conversations[rank() :: 2]]])
    loss(batch).backward()
    gradients = {name: one.grad.full_tensor() for name, one in model.named_parameters() if one.grad is not None}
    if rank() == 0:
        torch.save(gradients, folder / "gradients.pt")


def test_text_alone_does_not_hang_sharded_training(
    writer: Any, tiny_checkpoint: Path, tmp_path: Path, conversations: list[Conversation]
) -> None:
    assert [bool(one.images) for one in conversations] == [True, False, True, False]
    model, processor = writer
    tokenize, collate = ConversationTokenizer(processor, 1), PackCollator(processor, RECIPE)
    (next_token_loss(model, collate([[tokenize(one) for one in conversations]])) / 2).backward()
    in_two_processes(sharded_gradients, tiny_checkpoint, tmp_path, conversations)
    whole = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    torch.testing.assert_close(torch.load(tmp_path / "gradients.pt"), whole, atol=1e-4, rtol=1e-3)
