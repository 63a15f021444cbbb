from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.mining.worker import Hashing

from quarterlight.errors import DatasetError, InputError
from quarterlight.models.embedder import Embedder
from quarterlight.records import Item
from quarterlight.training import embeddings
from quarterlight.training.embeddings import Contents, Embeddings


@pytest.fixture
def contents() -> Contents:
    return Contents()


def _items(count: int) -> dict[bytes, Item]:
    return {b"%16d" % n: Item(text=f"text {n}") for n in range(count)}


def test_copies_have_one_content(contents: Contents, picture, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "copy.png")
    a, copy, b = (Item(image=str(tmp_path / name)) for name in ("a.png", "copy.png", "b.png"))
    opened = Item(image=picture(0))
    words = Item(image=a.image, text="sliced")
    everything = (a, copy, b, opened, words, Item(text="sliced"), Item(image=[a.image, b.image]))
    contents.read(everything)
    assert contents.of(a) == contents.of(copy)
    different = [contents.of(one) for one in everything if one is not copy]
    assert len(set(different)) == len(different)
    assert contents.of(Item(text="sliced")) == contents.of(Item(text="sliced", instruction="Find", max_tiles=4))


def test_key_holds_what_changes_a_vector(contents: Contents) -> None:
    keys = [contents.key(Item(text="a", **more)) for more in ({}, {"instruction": "Find"}, {"max_tiles": 4})]
    assert len(set(keys)) == 3


def test_missing_picture_has_no_content(contents: Contents, picture, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    item = Item(image=[tmp_path / "a.png", tmp_path / "gone.png"])
    contents.read([item, Item(image=tmp_path / "a.png")])
    assert contents.of(item) is None and contents.key(item) is None
    assert "gone.png" in str(contents.problem(item))
    assert contents.num_pictures == 2 and len(contents.problems) == 1


def test_rows_are_those_of_the_embedder(
    tiny_embedder: Embedder, picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "SHARD", 4)
    items = _items(6) | {b"%16d" % (10 + n): Item(image=picture(n)) for n in range(4)}
    store = Embeddings(tiny_embedder, tmp_path)
    for role in ("query", "document"):
        store.add(role, items)
    assert len(list((tmp_path / tiny_embedder.model_hash / "query").glob("*.npz"))) == 3
    keys = list(reversed(items))
    rows = store.rows("document", keys)
    expected = tiny_embedder.encode_document([items[key] for key in keys])
    assert rows.shape == expected.shape
    assert rows[:] == pytest.approx(expected, abs=1e-5)
    assert rows[2:7] == pytest.approx(expected[2:7], abs=1e-5)
    assert rows[3:3].shape == (0, expected.shape[1])
    queries = store.rows("query", keys)[:]
    assert queries == pytest.approx(tiny_embedder.encode_query([items[key] for key in keys]), abs=1e-5)
    assert not np.allclose(queries, expected)


def test_nothing_is_embedded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "SHARD", 4)
    Embeddings(Hashing(), tmp_path).add("query", _items(10))
    encoder = Hashing()
    store = Embeddings(encoder, tmp_path)
    store.add("query", _items(13))
    assert encoder.asked == ["text 10", "text 11", "text 12"]
    store.add("query", _items(13))
    assert len(encoder.asked) == 3
    store.add("document", _items(2))
    assert len(encoder.asked) == 5  # a document is embedded in another way
    expected = encoder.encode_query(list(_items(13).values()))
    assert np.array_equal(store.rows("query", list(_items(13)))[:], expected)


def test_unreadable_picture_is_left_out_and_remembered(tiny_embedder: Embedder, picture, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    items = _items(2) | {b"broken----------": Item(image=tmp_path / "broken.png")}
    for _ in range(2):  # the second finds it on disk
        store = Embeddings(tiny_embedder, tmp_path / "cache")
        store.add("document", items)
        assert list(store.problems["document"]) == [b"broken----------"]
        assert "broken.png" in store.problems["document"][b"broken----------"]
        assert store.rows("document", list(_items(2)))[:].shape == (2, 32)


def test_failure_that_is_no_picture_is_raised(tmp_path: Path, tiny_embedder: Embedder) -> None:
    with pytest.raises(InputError, match="neither text nor image"):
        Embeddings(tiny_embedder, tmp_path).add("document", {b"0" * 16: Item(text="  ")})


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    Embeddings(Hashing(), tmp_path).add("query", _items(3))
    shard = next(tmp_path.rglob("*.npz"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DatasetError, match=f"{shard.name} is damaged .* remove it"):
        Embeddings(Hashing(), tmp_path).add("query", _items(3))


def test_opened_pictures_count_by_what_they_show(contents: Contents) -> None:
    pictures = [Image.new("RGB", (4, 4), colour) for colour in ("red", "red", "blue")]
    contents.read([Item(image=one) for one in pictures])
    red, again, blue = (contents.of(Item(image=one)) for one in pictures)
    assert red == again != blue
