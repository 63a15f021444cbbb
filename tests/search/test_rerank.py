"""Two-stage search: what the reranker is given, what becomes of its answer, and what happens to files that are gone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.search.fakes import FakeEyes, FakeReranker
from tests.search.files import pdf, write_image

from quarterlight.errors import InputError
from quarterlight.index import IndexStore, VisualTokenStore
from quarterlight.metrics.fusion import RERANK
from quarterlight.models.pair import load_pair
from quarterlight.prompts import QUERY_INSTRUCTIONS
from quarterlight.records import Item
from quarterlight.search.encoder import identity_of
from quarterlight.search.ingest import ingest
from quarterlight.search.retrieve import Hit, Searcher

SHARES = {"red.png": 0, "dusk.png": 10, "dark.png": 20, "night.png": 30}
"""Red pictures of 40 x 30 pixels, of which so many columns are black: the redder first by cosine, the darker first by
the reranker."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, width in SHARES.items():
        picture = Image.new("RGB", (40, 30), "red")
        picture.paste("black", (0, 0, width, 30))
        picture.save(folder / name)
    return folder


def searcher(folder: Path, tokens: Any = None, **options: Any) -> Searcher:
    eyes = FakeEyes()
    store = IndexStore.create(folder.parent / "store", identity_of(eyes))
    ingest([folder], store, eyes, visual_tokens=tokens)
    return Searcher(store, eyes, **({"reranker": FakeReranker()} | options))


def names(hits: list[Hit]) -> list[str]:
    return [hit.path.name for hit in hits]


def test_the_first_are_reordered_and_the_rest_follow(folder: Path) -> None:
    one = searcher(folder)
    plain = one.search("red", rerank=0)
    assert names(plain) == ["red.png", "dusk.png", "dark.png", "night.png"]
    assert {hit.rerank_score for hit in plain} == {None}
    hits = one.search("red", rerank=3)
    assert names(hits) == ["dark.png", "dusk.png", "red.png", "night.png"]
    assert [hit.rerank_score is None for hit in hits] == [False, False, False, True]
    assert hits[0].rerank_score == pytest.approx(0.5, abs=0.1)
    assert {hit.path: hit.score for hit in hits} == {hit.path: hit.score for hit in plain}, "score stays the cosine"
    assert names(one.search("red")) == ["night.png", "dark.png", "dusk.png", "red.png"] and RERANK >= 4
    assert one.problems == []


def test_more_may_be_reranked_than_are_wanted(folder: Path) -> None:
    one = searcher(folder, rerank=4)
    assert names(one.search("red", top_k=2)) == ["night.png", "dark.png"]
    assert names(one.search("red", top_k=2, rerank=2)) == ["dusk.png", "red.png"]
    assert names(one.search("red", top_k=1, rerank=0)) == ["red.png"]
    assert one.search("red", within=folder / "nothing") == []


def test_fusion(folder: Path) -> None:
    by_cosine = ["red.png", "dusk.png", "dark.png", "night.png"]
    assert names(searcher(folder, fusion_weight=0.0).search("red")) == by_cosine
    assert names(searcher(folder, fusion_weight=1.0).search("red")) == by_cosine[::-1]
    setting = searcher(folder, reranker=FakeReranker(fusion_weight=0.0))
    assert names(setting.search("red")) == by_cosine
    half = searcher(folder, fusion_weight=0.5).search("red")
    fused = [hit.score / 2 + (hit.rerank_score or 0) / 2 for hit in half]
    assert fused == sorted(fused, reverse=True)


def test_a_search_takes_the_weight_of_its_direction(folder: Path) -> None:
    by_cosine = ["red.png", "dusk.png", "dark.png", "night.png"]
    one = searcher(folder, reranker=FakeReranker(fusion_weights={"emoji/t2i": 1.0, "t2i": 0.0, "it2i": 0.0}))
    assert names(one.search("red", kind="image")) == by_cosine
    assert names(one.search("red")) == by_cosine, "everything that was found is a picture"
    assert names(one.search(Item(image=folder / "red.png"))) == by_cosine[::-1], "no weight is known of i2i"


def test_hits_of_several_kinds_have_the_weight_of_no_direction(folder: Path) -> None:
    (folder / "notes.md").write_text("red red red dark\n")
    weights = {"t2i": 0.0, "t2t": 0.0}
    one = searcher(folder, reranker=FakeReranker(fusion_weights=weights))
    assert "notes.md" in names(one.search("red")) and names(one.search("red"))[0] == "night.png"
    assert names(one.search("red", kind="image"))[0] == "red.png"


def test_equal_scores_keep_the_order_of_the_search(folder: Path) -> None:
    class Constant(FakeReranker):
        def _score(self, *arguments: Any) -> float:
            return 0.5

    assert names(searcher(folder, reranker=Constant()).search("red")) == [*SHARES]


def test_candidates_are_what_was_embedded(folder: Path) -> None:
    (folder / "notes.md").write_text("# Garden\nRoses are red in dark places.\n")
    (folder / "fruit.pdf").write_bytes(pdf(["red", "apples"]))
    one = searcher(folder, rerank=20)
    one.search(Item(text="red", image=folder / "red.png"), kind=None)
    ((query, candidates, instruction),) = one.reranker.asked  # type: ignore[union-attr]
    assert query.text == "red" and query.images and instruction == QUERY_INSTRUCTIONS["it2i"]
    assert [item.text for item in candidates if not item.images] == ["Garden\n\nRoses are red in dark places."]
    assert sorted(item.max_tiles or 0 for item in candidates if item.images) == [1, 1, 1, 1, 4, 4]
    one.search("red", kind="page")
    (_, pages, instruction) = one.reranker.asked[-1]  # type: ignore[union-attr]
    assert instruction == QUERY_INSTRUCTIONS["t2vd"] and len(pages) == 2
    assert pages[0].images[0].tobytes() != pages[1].images[0].tobytes()  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_stored_tokens_stand_for_the_files(folder: Path, precision: str) -> None:
    (folder / "fruit.pdf").write_bytes(pdf(["red", "apples"]))
    read = searcher(folder, rerank=10)
    expected = read.search("red")
    stored = searcher(folder, precision, rerank=10)
    shutil.rmtree(folder)
    hits = stored.search("red")
    assert names(hits) == names(expected) and stored.problems == []
    scores = ([hit.rerank_score for hit in both] for both in (hits, expected))
    np.testing.assert_allclose(*scores, atol=1e-3 if precision == "float16" else 0.02)
    (reading, looking) = (one.reranker.num_seen for one in (read, stored))  # type: ignore[union-attr]
    assert (reading, looking) == (6, 0)
    # two pages of a file are two pictures
    _, candidates, _ = stored.reranker.asked[0]  # type: ignore[union-attr]
    assert len({item.images for item in candidates}) == 6


def test_tokens_that_are_missing_are_worked_out(folder: Path) -> None:
    one = searcher(folder, "float16")
    tokens = VisualTokenStore.find(one.store.folder, FakeEyes.vision_hash)
    assert tokens is not None
    tokens.prune(sorted(tokens.keys())[:2])
    assert names(one.search("red")) == [*SHARES][::-1] and one.reranker.num_seen == 2  # type: ignore[union-attr]


def test_tokens_of_other_eyes_are_not_used(folder: Path) -> None:
    class Other(FakeReranker):
        vision_hash = "07e2" * 16

    one = searcher(folder, "float16", reranker=Other())
    one.search("red")
    assert one.reranker.num_seen == 4  # type: ignore[union-attr]


def test_what_cannot_be_read_stands_behind_what_was_reranked(folder: Path) -> None:
    write_image(folder / "green.png", "green")
    one = searcher(folder, rerank=4)
    (folder / "night.png").unlink()
    (folder / "dusk.png").write_bytes(b"broken")
    hits = one.search("red")
    assert names(hits) == ["dark.png", "red.png", "dusk.png", "night.png", "green.png"]
    assert [hit.rerank_score is None for hit in hits] == [False, False, True, True, True]
    assert {Path(problem.path).name: problem.reason for problem in one.problems} == {
        "night.png": "cannot be read: No such file or directory; it was not reranked",
        "dusk.png": "is not a picture in a known format (" + one.problems[0].reason.partition("(")[2],
    }
    one.search("red", rerank=0)
    assert one.problems == [], "problems are those of the last search"
    shutil.rmtree(folder)
    assert names(one.search("red")) == ["red.png", "dusk.png", "dark.png", "night.png", "green.png"]
    assert len(one.problems) == 4


def test_what_has_changed_is_reranked_as_it_is(folder: Path) -> None:
    one = searcher(folder)
    write_image(folder / "red.png", "black")
    os.utime(folder / "red.png", ns=(1, 1))
    hits = one.search("red")
    assert names(hits)[0] == "red.png" and hits[0].rerank_score == pytest.approx(1, abs=0.01)
    (problem,) = one.problems
    assert problem.reason == "has changed since it was indexed, and was reranked as it is now: index it again"


def test_wrong_numbers(folder: Path) -> None:
    one = searcher(folder, reranker=None)
    assert names(one.search("red")) == [*SHARES]
    for number in (-1, 3):
        with pytest.raises(InputError, match=f"rerank is 0 or the number of hits.*got {number}"):
            one.search("red", rerank=number)
        with pytest.raises(InputError, match="rerank is 0"):
            searcher(folder, reranker=None, rerank=number)
    for options in ({"fusion_weight": 2.0}, {"fusion_weight": 0.5, "reranker": None}):
        with pytest.raises(InputError, match="fusion_weight is from 0 to 1 and needs a reranker"):
            searcher(folder, **options)
    with pytest.raises(InputError, match="top_k must be at least 1"):
        searcher(folder).search("red", top_k=0)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_a_real_pair_says_the_same_of_stored_tokens(folder: Path, tiny_pair: Path, precision: Any) -> None:
    """Rendered pages of several tiles, pictures and texts; what is stored against what is worked out."""
    (folder / "fruit.pdf").write_bytes(pdf(["red", "apples"]))
    (folder / "notes.md").write_text("# Garden\nRoses.\n")
    embedder, reranker = load_pair(tiny_pair, dtype=torch.float32, device="cpu")
    store = IndexStore.create(folder.parent / "store", identity_of(embedder))
    ingest([folder], store, embedder)
    one = Searcher(store, embedder, reranker=reranker, rerank=10)
    worked_out = {hit.id: hit.rerank_score for hit in map(Placed, one.search(folder / "red.png"))}
    ingest([folder], store, embedder, visual_tokens=precision)
    keys = {picture.key for pictures in store.pictures().values() for picture in pictures}
    found = VisualTokenStore.find(store.folder, reranker.vision_hash)
    assert found is not None and found.get(keys).keys() == keys and len(keys) == 6
    (folder / "fruit.pdf").unlink()
    (folder / "night.png").unlink()
    stored = {hit.id: hit.rerank_score for hit in map(Placed, one.search(folder / "red.png"))}
    assert one.problems == [] and stored.keys() == worked_out.keys() and len(stored) == 7
    assert len(set(worked_out.values())) > 4
    for place, score in stored.items():
        assert score == pytest.approx(worked_out[place], abs=1e-3 if precision == "float16" else 1e-2)


class Placed:
    """A hit by its place."""

    def __init__(self, hit: Hit) -> None:
        self.id = (hit.path.name, hit.page)
        self.rerank_score = hit.rerank_score
