"""The reranker: what is shared between queries and candidates changes no score."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

import quarterlight.models.reranker as reranker_module
from quarterlight.errors import CheckpointError, ImageError, InputError
from quarterlight.images import load_image
from quarterlight.models.checkpoint import load_backbone, save_reranker
from quarterlight.models.embedder import Embedder
from quarterlight.models.inputs import TokenizedPrompt
from quarterlight.models.rerank_inputs import AnswerTokens
from quarterlight.models.reranker import Reranker, has_reranker
from quarterlight.models.settings import RerankerSettings
from quarterlight.models.tokenizer import train_tokenizer
from quarterlight.records import Item

Pictures = Callable[..., Image.Image]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reranker over the tiny trunk, whose language model is a little different from the embedder's."""
    model, processor = load_backbone(tiny_checkpoint, language_head=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.model.language_model.layers.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    target = tmp_path_factory.mktemp("models") / "reranker"
    return save_reranker(target, model, processor, RerankerSettings(text_max_tokens=32))


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return Reranker(folder, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def queries(picture: Pictures) -> list[Item]:
    return [
        Item(text="a red apple."),
        Item(image=picture(0)),
        Item(text="sliced", image=picture(1, 200, 60), max_tiles=4),
        Item(text="own words", instruction="Look closely."),
    ]


@pytest.fixture(scope="module")
def candidates(picture: Pictures) -> list[Item]:
    return [
        Item(text="An apple, red"),
        Item(image=picture(2)),
        Item(image=picture(3, 300, 90), max_tiles=4),
        Item(image=[picture(4), picture(5, 40, 40)], text="two"),
        Item(text="<|im_end|> is spelt out"),
    ]


def whole(reranker: Reranker, query: Item, items: list[Item], *, listwise: bool = False) -> np.ndarray:
    """The plain way: prompts as a whole, one after the other, all logits of the vocabulary."""
    formatter, processor = reranker.formatter, reranker.processor
    rows = [items] if listwise else [[one] for one in items]
    scores = []
    for row in rows:
        tail = formatter.list_tail(row) if listwise else formatter.tails(row)[0]
        prompt = TokenizedPrompt(formatter.prefix(query, listwise=listwise).runs + tail.runs)
        tiles = [
            processor.image_processor.tiles(load_image(source), formatter.max_tiles(one))
            for one in (query, *row)
            for source in one.images
        ]
        ids, _ = formatter.tokenize.expand(prompt, [len(one) for one in tiles])
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if tiles:
            inputs["pixel_values"] = processor.image_processor.normalize_tiles(torch.from_numpy(np.concatenate(tiles)))
        with torch.inference_mode():
            logits = reranker.model(**inputs).logits[0, -1]
        answers = reranker.answers
        words = answers.numbers[: len(row)] if listwise else (answers.yes, answers.no)
        scores.append(logits[list(words)].softmax(0).numpy())
    return scores[0] if listwise else np.array([one[0] for one in scores])


def test_shared_prefix_equals_full_pairs(reranker: Reranker, queries: list[Item], candidates: list[Item]) -> None:
    for query in queries:
        scores = reranker.score(query, candidates)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, whole(reranker, query, candidates), atol=1e-5)
    assert np.ptp(scores) > 1e-3  # the candidate matters


def test_list_equals_full_prompt(reranker: Reranker, queries: list[Item], candidates: list[Item]) -> None:
    for query in queries:
        ranking = reranker.rank_listwise(query, candidates)
        plain = whole(reranker, query, candidates, listwise=True)
        assert [one["corpus_id"] for one in ranking] == np.argsort(-plain).tolist()
        np.testing.assert_allclose([one["score"] for one in ranking], np.sort(plain)[::-1], atol=1e-5)
        assert plain.sum() == pytest.approx(1, abs=1e-5)


def test_order_batches_and_copies_change_nothing(folder: Path, queries: list[Item], candidates: list[Item]) -> None:
    small = Reranker(folder, dtype=torch.float32, device="cpu", tokens_per_batch=1, num_workers=0)
    large = Reranker(folder, dtype=torch.float32, device="cpu")
    expected = large.score(queries[0], candidates)
    np.testing.assert_allclose(small.score(queries[0], candidates), expected, atol=1e-5)
    np.testing.assert_allclose(large.score(queries[0], candidates[::-1])[::-1], expected, atol=1e-5)
    twice = large.score(queries[0], [*candidates, *candidates])
    np.testing.assert_array_equal(twice[:5], twice[5:])
    np.testing.assert_allclose(twice[:5], expected, atol=1e-5)


def test_predict_groups_pairs_of_a_query(
    reranker: Reranker, queries: list[Item], candidates: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reranker_module, "QUERIES_PER_WINDOW", 2)
    pairs = [(query, candidate) for candidate in candidates for query in queries]
    scores = reranker.predict(pairs).reshape(len(candidates), len(queries))
    for column, query in zip(scores.T, queries, strict=True):
        np.testing.assert_allclose(column, reranker.score(query, candidates), atol=1e-5)
    assert reranker.predict([]).shape == (0,)


def test_rank(reranker: Reranker, candidates: list[Item]) -> None:
    scores = reranker.score("an apple", candidates)
    ranking = reranker.rank("an apple", candidates, top_k=3)
    assert [one["corpus_id"] for one in ranking] == np.argsort(-scores)[:3].tolist()
    same = reranker.rank("an apple", ["x"] * 4)
    assert [one["corpus_id"] for one in same] == [0, 1, 2, 3]
    assert reranker.rank("an apple", []) == []
    assert reranker.score("an apple", "pear").shape == (1,)  # one candidate, not its letters
    assert reranker.rank_listwise("an apple", []) == []


def test_instruction_changes_the_score(reranker: Reranker) -> None:
    plain = reranker.score("an apple", ["red"])
    default = reranker.score("an apple", ["red"], instruction=reranker.settings.instructions["text"])
    np.testing.assert_allclose(plain, default, atol=1e-6)
    assert abs(reranker.score("an apple", ["red"], instruction="Find fruit.") - plain) > 1e-6


def test_long_lists_are_ordered_window_by_window(reranker: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a judge of lists that knows the truth, what stands last comes first."""
    seen: list[int] = []

    def by_length(query: Item, items: list[Item], *_: Any) -> tuple[np.ndarray, int]:
        seen.append(len(items))
        return np.array([len(str(item.text)) for item in items], np.float32), 0

    monkeypatch.setattr(reranker, "_list_scores", by_length)
    ranking = reranker.rank_listwise("q", ["x" * n for n in range(1, 15)], top_k=3)
    assert [one["corpus_id"] for one in ranking] == [13, 12, 11]
    assert max(seen) <= reranker_module.LIST_SIZE


def test_more_than_nine_candidates_in_lists(reranker: Reranker) -> None:
    ranking = reranker.rank_listwise("an apple", [f"candidate {n}" for n in range(11)])
    assert sorted(one["corpus_id"] for one in ranking) == list(range(11))
    with pytest.raises(InputError, match="at most 9 candidates, got 11"):
        reranker.formatter.list_tail([Item(text="x")] * 11)


def test_stored_visual_tokens_equal_the_pictures(
    reranker: Reranker, tiny_embedder: Embedder, queries: list[Item], candidates: list[Item]
) -> None:
    """As they come out of indexing: float16, made by the embedder that has the same eyes."""
    shown = [candidates[1], candidates[2], candidates[0]]
    vectors, stored = tiny_embedder.encode_document_with_visual_tokens(shown)
    np.testing.assert_array_equal(vectors, tiny_embedder.encode_document(shown))
    assert stored[2] is None and stored[0] is not None and stored[0].dtype == np.float16
    unread = [Item(image="/nowhere.png", max_tiles=one.max_tiles) for one in shown[:2]] + shown[2:]
    unread[1] = Item(image="/elsewhere.png", max_tiles=4)
    for query in queries:
        expected = reranker.score(query, shown)
        np.testing.assert_allclose(reranker.score(query, unread, visual_tokens=stored), expected, atol=1e-3)


def test_unusable_visual_tokens(reranker: Reranker, picture: Pictures) -> None:
    item, tokens = Item(image=picture(0)), np.zeros((4, 32), np.float16)
    with pytest.raises(InputError, match="for 1 candidates, got 2"):
        reranker.score("q", [item], visual_tokens=[tokens, tokens])
    with pytest.raises(InputError, match=r"Candidate 0.* got \[3, 32\]"):
        reranker.score("q", [item], visual_tokens=[tokens[:3]])
    with pytest.raises(InputError, match="Candidate 0 has 2 pictures"):
        reranker.score("q", [Item(image=[picture(0), picture(1)])], visual_tokens=[tokens])


def test_unusable_items(reranker: Reranker, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="The query has neither text nor image"):
        reranker.score("  ", ["x"])
    with pytest.raises(InputError, match="Candidate 1 has neither"):
        reranker.score("q", ["x", Item(text=" ")])
    with pytest.raises(InputError, match="Candidate 1: An item is text"):
        reranker.score("q", ["x", 7])  # type: ignore[list-item]
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ImageError, match=r"Candidate 2: .*torn\.png"):
        reranker.score("q", ["x", "y", tmp_path / "torn.png"])
    with pytest.raises(ImageError, match=r"The query: .*torn\.png"):
        reranker.score(tmp_path / "torn.png", ["x"])
    with pytest.raises(ImageError, match=r"Pair 1: .*torn\.png"):
        reranker.predict([("q", "x"), ("q", tmp_path / "torn.png")])
    for pair in (("q",), "ab", {"q": "x", "r": "y"}):
        with pytest.raises(InputError, match="Pair 1: expected a query and a candidate"):
            reranker.predict([("q", "x"), pair])  # type: ignore[list-item]
    with pytest.raises(InputError, match="Pair 1, its candidate has neither"):
        reranker.predict([("q", "x"), ("q", " ")])
    with pytest.raises(InputError, match="top_k must be at least 1, got -1"):
        reranker.rank("q", ["x"], top_k=-1)


def test_long_texts_are_cut_at_the_end_and_reported(reranker: Reranker, caplog: pytest.LogCaptureFixture) -> None:
    long = "apple " * 40
    with caplog.at_level(logging.WARNING):
        cut = reranker.score("q", [long, "short"])
    assert "1 texts were longer than the reranker reads" in caplog.text
    np.testing.assert_allclose(cut[0], reranker.score("q", [long + "never read"])[0], atol=1e-6)


def test_a_text_of_just_the_limit_is_not_reported(reranker: Reranker, caplog: pytest.LogCaptureFixture) -> None:
    limit = reranker.settings.text_max_tokens
    token = reranker.processor.tokenizer.encode(" a", add_special_tokens=False)
    assert len(token) == 1
    with caplog.at_level(logging.WARNING):
        reranker.score(" a" * limit, [" a" * limit])
        assert not caplog.text
        reranker.score(" a" * (limit + 1), ["x"])
    assert "1 texts were longer" in caplog.text


@pytest.mark.parametrize("max_tiles", [1, 4])
def test_what_no_longer_fits_is_cut_but_never_the_template(
    folder: Path, picture: Pictures, max_tiles: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the pictures take: all tiles of a page count."""
    reranker = Reranker(folder, dtype=torch.float32, device="cpu")
    query, item = Item(text="q"), Item(text="apple " * 9, image=picture(0, 128, 128), max_tiles=max_tiles)
    seen = reranker._see([item], ["it"], {})
    (tail,) = reranker.formatter.tails([item])
    prefix = reranker.formatter.prefix(query).num_tokens
    longest = prefix + len(reranker._expand(tail, [item], seen))
    text = reranker.model.config.text_config
    monkeypatch.setattr(text, "max_position_embeddings", longest - 5)
    (fitting,), (ids,) = reranker._fitting([tail], [[item]], prefix, seen)
    assert ids == reranker._expand(fitting, [item], seen) and prefix + len(ids) == longest - 5
    assert fitting.runs[-1] == tail.runs[-1]
    with caplog.at_level(logging.WARNING):
        reranker.score(query, [item])
    assert "1 texts were longer" in caplog.text
    monkeypatch.setattr(text, "max_position_embeddings", prefix + 3)
    with pytest.raises(InputError, match="leave no room"):
        reranker.score(query, [item])
    monkeypatch.setattr(text, "max_position_embeddings", prefix)
    with pytest.raises(InputError, match="leaves no room for a candidate"):
        reranker.score(query, [item])


def test_threads_spell_alike(folder: Path) -> None:
    """A tokenizer that one thread has told to spell special tokens out must not do so for another."""
    reranker = Reranker(folder, dtype=torch.float32, device="cpu")
    expected = reranker.score("an apple", ["<|im_end|> spelt out"])

    def work(number: int) -> np.ndarray:
        return Reranker.from_model(reranker.model, reranker.processor, reranker.settings).score(
            "an apple", [f"<|im_end|> {number}", "<|im_end|> spelt out"]
        )

    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(work, range(64)):
            np.testing.assert_allclose(scores[1], expected[0], atol=1e-6)


def test_weights_that_change_are_seen(folder: Path) -> None:
    reranker = Reranker(folder, dtype=torch.float32, device="cpu")
    before = reranker.score("an apple", ["red"])
    with torch.no_grad():
        for weight in reranker.model.model.language_model.layers.parameters():
            weight.mul_(1.5)
    fresh = Reranker.from_model(reranker.model, reranker.processor, reranker.settings)
    np.testing.assert_array_equal(reranker.score("an apple", ["red"]), fresh.score("an apple", ["red"]))
    assert abs(before - fresh.score("an apple", ["red"])) > 1e-4


def test_windows_hold_so_many_visual_tokens(
    reranker: Reranker, picture: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reranker_module, "TOKEN_CACHE_BYTES", 3 * 4 * 32 * 4)  # three pictures of one tile
    items = [Item(image=picture(n)) for n in range(4)]
    windows = list(reranker._windows([[0, 1], [2], [3], []], items))
    assert windows == [[[0, 1], [2]], [[3], []]]


def test_tokenizer_that_splits_the_answers() -> None:
    tokenizer = train_tokenizer(["hello"] * 5, 270)
    assert AnswerTokens.of(tokenizer, "here").yes == tokenizer.convert_tokens_to_ids("Yes")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = []
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    with pytest.raises(CheckpointError, match="The tokenizer of here spells 'Yes' in 3 tokens"):
        AnswerTokens.of(tokenizer, "here")


def test_cross_encoder_gives_the_same_scores(reranker: Reranker, folder: Path, picture: Pictures) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = sentence_transformers.CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    pairs: list[Any] = [
        ("a red apple.", "An apple"),
        ("a red apple.", picture(2)),
        (picture(0), "An apple"),
        ({"text": "sliced", "image": picture(1)}, {"text": "a slice", "image": picture(3)}),
        ("<|im_end|>", "spelt out <IMG_CONTEXT>"),
    ]
    ours = reranker.predict([(_item(query), _item(candidate)) for query, candidate in pairs])
    np.testing.assert_allclose(encoder.predict(pairs, batch_size=2), ours, atol=1e-5)
    ranking = encoder.rank("a red apple.", ["An apple", "x", "a pear"])
    ours_ranked = reranker.rank("a red apple.", ["An apple", "x", "a pear"])
    assert [one["corpus_id"] for one in ranking] == [one["corpus_id"] for one in ours_ranked]


def _item(value: Any) -> Any:
    return value if isinstance(value, str) else Item.parse(value)


def test_save_and_reload(reranker: Reranker, candidates: list[Item], tmp_path: Path) -> None:
    save_reranker(tmp_path / "again", reranker.model, reranker.processor, reranker.settings)
    again = Reranker(tmp_path / "again", dtype=torch.float32, device="cpu")
    assert again.model_hash == reranker.model_hash
    np.testing.assert_array_equal(again.score("q", candidates), reranker.score("q", candidates))


def test_hashes(reranker: Reranker, tiny_embedder: Embedder, folder: Path) -> None:
    assert reranker.vision_hash == tiny_embedder.vision_hash
    assert reranker.model_hash != tiny_embedder.model_hash
    other = Reranker.from_model(reranker.model, reranker.processor, RerankerSettings(text_max_tokens=9))
    assert other.vision_hash == reranker.vision_hash
    assert other.model_hash != reranker.model_hash


def test_folders_of_other_kinds(tiny_checkpoint: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no reranker but embedder"):
        Reranker(tiny_checkpoint)
    with pytest.raises(CheckpointError, match="holds a reranker, not an embedder"):
        Embedder(folder)
    assert has_reranker(folder)
    assert not has_reranker(tiny_checkpoint)


def test_from_model_without_head(tiny_embedder: Embedder, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no language head"):
        save_reranker(tmp_path / "x", tiny_embedder.model, tiny_embedder.processor, RerankerSettings())


def test_scores_that_are_not_numbers(folder: Path) -> None:
    broken = Reranker(folder, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        broken.model.model.language_model.norm.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not numbers"):
        broken.score("q", ["x"])
