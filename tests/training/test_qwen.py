"""The stages of training on Qwen-VL: chunks, packs and branches against one plain pass for each row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.models.qwen import QWEN, plain_qwen
from torch.nn import functional as F

from quarterlight.data.conversations import Conversation, Message
from quarterlight.data.rerank import RerankRow
from quarterlight.models.checkpoint import load_backbone
from quarterlight.models.inputs import InputFormatter
from quarterlight.models.pooling import Attention, PoolingMode, embed
from quarterlight.models.rerank_inputs import RerankFormatter
from quarterlight.models.reranker import Reranker
from quarterlight.models.settings import EmbedderSettings, RerankerSettings
from quarterlight.records import Candidate, Item, Query
from quarterlight.training.augment import AugmentRecipe, augment, draw
from quarterlight.training.collate import Pictures, PromptEncoder
from quarterlight.training.prompt_embedder import PromptEmbedder
from quarterlight.training.rerank import AnswerWriter, RerankCollator, VisualTokens
from quarterlight.training.restore import ConversationTokenizer, PackCollator, RestoreRecipe, next_token_loss

PictureMaker = Callable[..., Image.Image]
PIXELS = 40 * 64


@pytest.fixture(scope="module", params=QWEN)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """Model with a language head, and processor; s = 2."""
    folder = plain_qwen(request.param, tmp_path_factory.mktemp("training") / request.param, tokenizer)
    return load_backbone(folder, visual_token_compression=2, language_head=True)


@pytest.fixture(scope="module")
def items(picture: PictureMaker, tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    folder = tmp_path_factory.mktemp("pictures")
    sizes = [(40, 24), (32, 48), (90, 70), (16, 60)]
    for number, (width, height) in enumerate(sizes):
        picture(number, width, height).save(folder / f"{number}.png")
    return [
        Item(text="a red apple"),
        Item(image=folder / "0.png"),
        Item(image=folder / "1.png", text="the same"),
        Item(image=folder / "2.png", max_tiles=2),
        Item(image=[folder / "3.png", folder / "0.png"]),
    ]


def test_encoded_items_embed_as_formatted_ones(backbone: Any, items: list[Item]) -> None:
    model, processor = backbone
    formatter = InputFormatter(processor, EmbedderSettings(max_pixels=PIXELS))
    encode = PromptEncoder(formatter, Pictures(processor.image_processor, AugmentRecipe(), max_pixels=PIXELS))
    inputs = encode(items, "query")
    expected = embed(model.model, formatter(items, "query"), pooling=PoolingMode.LAST_TOKEN, attention=Attention.CAUSAL)
    for shared in (True, False):
        found = PromptEmbedder(model.model, shared_prefix=shared)(inputs)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert all(most >= length for most, length in zip(encode.num_tokens(items, "query"), lengths, strict=True))


def test_a_picture_is_augmented_as_a_whole(backbone: Any, items: list[Item]) -> None:
    _, processor = backbone
    recipe = AugmentRecipe()
    pictures = Pictures(processor.image_processor, recipe, max_pixels=PIXELS)
    tiles, counts = pictures.tiles(items)
    chance = draw(5, seed=0, step=0)
    found = pictures.pixel_values(tiles, counts, chance)
    rows, columns = counts[1][0]
    whole = torch.from_numpy(tiles[: rows * columns]).reshape(rows, columns, 8, 8, 3).swapaxes(1, 2)
    changed = augment(whole.reshape(1, rows * 8, columns * 8, 3), recipe, chance[:1])
    changed = changed.reshape(rows, 8, columns, 8, 3).swapaxes(1, 2).reshape(-1, 8, 8, 3)
    expected = processor.image_processor.normalize_tiles(changed)
    torch.testing.assert_close(found[: len(expected)], expected)
    assert not torch.equal(found, pictures.pixel_values(tiles, counts))


def test_what_cannot_be_read_is_one_white_tile(backbone: Any, tmp_path: Path) -> None:
    pictures = Pictures(backbone[1].image_processor, max_pixels=PIXELS)
    tiles, counts = pictures.tiles([Item(image=tmp_path / "gone.png")])
    assert counts == [[(1, 1)]] and tiles.shape == (1, 8, 8, 3) and (tiles == 255).all()


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_what_is_trained_is_what_a_reranker_scores_with(backbone: Any, items: list[Item], shared_prefix: bool) -> None:
    model, processor = backbone
    settings = RerankerSettings(max_pixels=PIXELS)
    known = VisualTokens(1 << 20)
    pictures = Pictures(processor.image_processor, max_pixels=PIXELS)
    collate = RerankCollator(RerankFormatter(processor, settings), pictures, known)
    candidates = [Candidate(did=str(number), item=item) for number, item in enumerate(items)]
    rows = [
        RerankRow(
            query=Query(qid="a", item=items[2], positives=("0",)),
            positive=candidates[1],
            negative=candidates[4],
            listed=(candidates[0], candidates[1], candidates[3]),
            slot=1,
        ),
        RerankRow(
            query=Query(qid="b", item=items[0], positives=("3",)),
            positive=candidates[3],
            negative=candidates[0],
            listed=(candidates[3], candidates[2]),
            slot=0,
        ),
    ]
    writer = AnswerWriter(model, processor, known, collate.answers, shared_prefix=shared_prefix)
    reranker = Reranker.from_model(model, processor, settings)
    for _ in range(2):  # the second time with tokens that are known
        batch = collate(rows)
        _, logits_NA = writer(batch)
        for number, row in enumerate(rows):
            pair_22 = logits_NA[(batch["rows"] == number) & (batch["kinds"] < 2), :2]
            scores = reranker.score(row.query.item, [row.positive.item, row.negative.item])
            np.testing.assert_allclose(pair_22.softmax(1)[:, 0].numpy(), scores, atol=1e-5)
            number_A = logits_NA[(batch["rows"] == number) & (batch["kinds"] == 2), 2:][0, : len(row.listed)]
            ranked = reranker.rank_listwise(row.query.item, [one.item for one in row.listed])
            found = {one["corpus_id"]: one["score"] for one in ranked}
            expected = [found[n] for n in range(len(row.listed))]
            np.testing.assert_allclose(number_A.softmax(0).numpy(), expected, atol=1e-5)
    assert not batch["fresh"]


def test_packs_of_conversations_equal_conversations_alone(backbone: Any, items: list[Item]) -> None:
    model, processor = backbone
    recipe = RestoreRecipe(max_tokens=600, max_tiles=1, max_pixels=PIXELS)
    tokenize = ConversationTokenizer(processor, recipe.max_tiles, recipe.max_pixels)

    def said(number: int, question: str, answer: str, *images: Any) -> Any:
        messages = (Message(role="user", content=question), Message(role="assistant", content=answer))
        return tokenize(Conversation(id=str(number), messages=messages, images=images))

    samples = [
        said(0, "<image>What is this?", "an apple", *items[1].images),
        said(1, "Name a fruit.", "pear"),
        said(2, "<image> or <image>?", "the first", *items[4].images),
    ]
    collate = PackCollator(processor, recipe)
    with torch.no_grad():
        together = next_token_loss(model, collate([samples]))
        alone = torch.stack([next_token_loss(model, collate([[one]])) for one in samples])
        torch.testing.assert_close(together, alone.sum(), atol=1e-4, rtol=1e-5)
        batch = collate([samples[2:]])
        pairs = 2 * batch["grids"]
        model.model.rope_deltas = None
        logits = model(
            input_ids=batch["input_ids"],
            pixel_values=batch["pixel_values"],
            image_grid_thw=torch.cat([torch.ones_like(pairs[:, :1]), pairs], 1),
            mm_token_type_ids=(batch["input_ids"] == processor.image_token_id).int(),
        ).logits[0]
    expected = F.cross_entropy(logits[batch["places"]], batch["labels"], reduction="sum")
    torch.testing.assert_close(alone[2], expected, atol=1e-4, rtol=1e-5)
