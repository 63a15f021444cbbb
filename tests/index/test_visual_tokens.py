"""Visual tokens on disk: what comes back, which table is in use, and what is removed."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest

from quarterlight.errors import InputError, StoreError
from quarterlight.index import PRECISIONS, VisualTokenStore
from quarterlight.index import visual_tokens as module

EYES = "ab" * 32


def tokens(num: int, seed: int = 0, columns: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, columns)).astype(np.float16)


def test_float16_comes_back_to_the_bit(tmp_path: Path) -> None:
    store = VisualTokenStore.create(tmp_path, EYES, "float16")
    given = {"a#0": tokens(4), "b#1": tokens(20, 1), "b#2": tokens(64, 2)}
    store.add(given)
    found = store.get([*given, "c#0"])
    assert found.keys() == given.keys() == store.keys()
    for key, one in given.items():
        assert found[key].dtype == np.float16 and found[key].flags.writeable
        np.testing.assert_array_equal(found[key], one)
    assert store.get([]) == {}
    size = store.size()
    assert (size.num_items, size.num_tokens, size.num_bytes) == (3, 88, 88 * 16 * 2)


def test_int8_is_near_in_every_token(tmp_path: Path) -> None:
    store = VisualTokenStore.create(tmp_path, EYES, "int8")
    given = tokens(5).astype(np.float32) * np.array([1e-6, 1, 100, 0, 30_000])[:, None]  # each token has its own scale
    store.add({"a#0": given})
    found = store.get(["a#0"])["a#0"]
    assert found.dtype == np.float32 and found.shape == given.shape
    assert (np.abs(found - given).max(axis=1) <= 0.501 * np.abs(given).max(axis=1) / 127).all()
    assert store.size().num_bytes == 5 * 16 + 5 * 4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_cannot_be_stored_is_remembered(tmp_path: Path, precision: module.Precision) -> None:
    store = VisualTokenStore.create(tmp_path, EYES, precision)
    broken = tokens(4).astype(np.float32)
    broken[2, 3] = np.inf
    store.add({"a#0": tokens(4), "b#0": broken})
    assert store.keys() == {"a#0", "b#0"} and store.get(["a#0", "b#0"]).keys() == {"a#0"}
    too_large = np.full((2, 8), 1e6, np.float32)
    store.add({"c#0": too_large})
    assert ("c#0" in store.get(["c#0"])) == (precision == "int8")


def test_the_newest_table_is_in_use(tmp_path: Path) -> None:
    assert VisualTokenStore.find(tmp_path / "missing", EYES) is None
    VisualTokenStore.create(tmp_path, "cd" * 32, "int8")
    assert VisualTokenStore.find(tmp_path, EYES) is None
    for precision in ("float16", "int8", "float16"):
        VisualTokenStore.create(tmp_path, EYES, precision).add({precision: tokens(1)} if precision == "int8" else {})
        in_use = VisualTokenStore.find(tmp_path, EYES)
        assert in_use is not None and in_use.precision == precision
    in_use.drop_others()
    int8 = VisualTokenStore.create(tmp_path, EYES, "int8")
    assert int8.keys() == set(), "the old table is gone with its tokens"
    other = VisualTokenStore.find(tmp_path, "cd" * 32)
    assert other is not None and other.precision == "int8"


def test_prune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = VisualTokenStore.create(tmp_path, EYES, "float16")
    store.add({f"{number}#0": tokens(2, number) for number in range(25)})
    monkeypatch.setattr(module, "MAX_FLAT_KEYS", 10)  # removed in several commits
    keep = {f"{number}#0" for number in range(0, 25, 8)}
    assert store.prune(keep | {"unknown#0"}) == 21
    assert store.keys() == keep and store.prune(keep) == 0
    np.testing.assert_array_equal(store.get(["8#0"])["8#0"], tokens(2, 8))


def test_optimize_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FLAT_KEYS", 10)
    monkeypatch.setattr(module, "MAX_FRAGMENTS", 3)
    store = VisualTokenStore.create(tmp_path, EYES, "float16")
    for start in range(0, 50, 10):
        store.add({f"{number}#0": tokens(2, number) for number in range(start, start + 10)})
        store.optimize()
    assert store._table.stats()["fragment_stats"]["num_fragments"] <= 3
    assert [index.index_type for index in store._table.list_indices()] == ["BTree"]
    found = store.get([f"{number}#0" for number in range(0, 60, 7)])
    assert found.keys() == {f"{number}#0" for number in range(0, 50, 7)}
    for number in range(0, 50, 7):
        np.testing.assert_array_equal(found[f"{number}#0"], tokens(2, number))
    monkeypatch.setattr(module, "MAX_MERGED_BYTES", 0)
    for number in range(60, 64):
        store.add({f"{number}#0": tokens(2)})
    store.optimize()
    assert store._table.stats()["fragment_stats"]["num_fragments"] > 3, "a large table is not rewritten"


def test_a_reader_sees_what_is_written_later(tmp_path: Path) -> None:
    store = VisualTokenStore.create(tmp_path, EYES, "float16")
    reader = VisualTokenStore.find(tmp_path, EYES)
    store.add({"a#0": tokens(1)})
    assert reader is not None and reader.get(["a#0"]).keys() == {"a#0"}


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no precision 'int4'.*Did you mean 'int8'"):
        VisualTokenStore.create(tmp_path, EYES, "int4")  # type: ignore[arg-type]
    VisualTokenStore.create(tmp_path, EYES, "int8")
    next(tmp_path.glob("tokens_*.json")).write_text("{}")
    with pytest.raises(StoreError, match="does not describe visual tokens"):
        VisualTokenStore.find(tmp_path, EYES)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        VisualTokenStore.create(tmp_path / "file", EYES, "int8")


def test_disk_full(tmp_path: Path) -> None:
    """A limit on file size stands for the full disk."""
    store = VisualTokenStore.create(tmp_path, EYES, "float16")
    store.add({"a#0": tokens(1)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        noise = np.frombuffer(os.urandom(300_000), np.uint16).reshape(-1, 50) % 1000
        with pytest.raises(StoreError, match="cannot be written: File too large"):
            store.add({"b#0": noise.astype(np.float16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert store.keys() == {"a#0"}
