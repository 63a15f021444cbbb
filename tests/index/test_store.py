"""The store: files replaced as a whole, hostile names, other models, two writers, a full disk, a vector index."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quarterlight.errors import InputError, StoreError
from quarterlight.index import VECTOR_PRECISIONS, IndexStore, Kind, ModelIdentity, Row, VectorPrecision
from quarterlight.index import store as store_module
from quarterlight.index.rows import path_of, uri_of
from quarterlight.index.store import models_of

MODEL = ModelIdentity(name="small", hash="ab" * 32, dimension=16)


def unit(num: int, dimension: int = 16, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(num, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def row(path: str | Path, part: int = 0, kind: Kind = "image", **fields: object) -> Row:
    return Row(uri=uri_of(path), kind=kind, part=part, size=1, mtime_ns=2, content_hash="c", **fields)


@pytest.fixture
def store(tmp_path: Path) -> IndexStore:
    return IndexStore.create(tmp_path / "store", MODEL)


NAMES = ["plain.png", "it's.png", 'say "x".png', "two\nlines.png", "50%_off.png", "a' OR 1=1 --.png", "ü 日本.png"]
NAMES.append(os.fsdecode(b"latin-\xe9.png"))


@pytest.mark.parametrize("name", NAMES)
def test_uri_keeps_every_name(name: str) -> None:
    uri = uri_of(f"/some/{name}")
    assert path_of(uri) == Path(f"/some/{name}")
    assert uri.isascii() and not set(uri) & set("'\"\n ")


def test_rows_come_back_as_they_were(store: IndexStore) -> None:
    full = row("/a.pdf", 3, "page", width=5, height=6, thumbnail=b"\0\xff", text="t", title="T", problems=("page 2",))
    vectors = unit(1)
    store.upsert([full], vectors)
    (found,) = store.search(vectors[0])
    assert found.row == full and found.score == pytest.approx(1, abs=1e-6)
    rows, stored = store.rows([full.uri])
    assert rows == [full] and np.array_equal(stored, vectors)


def test_filters_with_hostile_names(store: IndexStore) -> None:
    paths = [f"/{folder}/{name}" for folder in ("a", "a0", "a.b", "it's") for name in NAMES]
    vectors = unit(len(paths))
    store.upsert([row(path) for path in paths], vectors)
    for path, vector in zip(paths, vectors, strict=True):
        (found,) = store.search(vector, within=path)
        assert path_of(found.row.uri) == Path(path)
    for folder in ("/a", "/it's"):
        found = store.search(vectors[0], within=folder, top_k=100)
        assert {match.row.uri for match in found} == {uri_of(f"{folder}/{name}") for name in NAMES}
    assert len(store.search(vectors[0], within="/", top_k=100)) == len(paths)
    store.delete([uri_of(f"/it's/{name}") for name in NAMES])
    assert store.count() == len(paths) - len(NAMES)


def test_kinds(store: IndexStore) -> None:
    vectors = unit(3)
    store.upsert([row("/a.png"), row("/b.pdf", 1, "page"), row("/c.md", 1, "text")], vectors)
    assert [match.row.kind for match in store.search(vectors[0], kind="page")] == ["page"]
    assert [store.count(kind) for kind in ("image", "page", "text", None)] == [1, 1, 1, 3]
    with pytest.raises(InputError, match="Did you mean 'page'"):
        store.search(vectors[0], kind="pages")  # type: ignore[arg-type]


def test_a_file_is_replaced_as_a_whole(store: IndexStore) -> None:
    vectors = unit(6)
    store.upsert([row("/a.pdf", part, "page") for part in (1, 2, 3)] + [row("/b.png")], vectors[:4])
    store.upsert([row("/a.pdf", part, "page") for part in (1, 2)], vectors[4:], known=[uri_of("/a.pdf")])
    rows, _ = store.rows([uri_of("/a.pdf")])
    assert sorted(row.part for row in rows) == [1, 2]
    assert store.files().keys() == {uri_of("/a.pdf"), uri_of("/b.png")}


def test_equal_scores_are_ordered_by_name(store: IndexStore) -> None:
    vector = unit(1)
    store.upsert([row(f"/{name}.png") for name in "cab"], np.repeat(vector, 3, axis=0))
    assert [path_of(match.row.uri).stem for match in store.search(vector[0])] == ["a", "b", "c"]


def test_wrong_shapes(store: IndexStore) -> None:
    with pytest.raises(InputError, match="16 dimensions"):
        store.upsert([row("/a.png")], unit(1, 8))
    with pytest.raises(InputError, match="16 dimensions"):
        store.search(unit(1, 8)[0])
    with pytest.raises(InputError, match="top_k"):
        store.search(unit(1)[0], top_k=0)


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no index in .*quarterlight index"):
        IndexStore.open(tmp_path / "missing", MODEL)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be written"):
        IndexStore.create(tmp_path / "file", MODEL)


def test_other_model(store: IndexStore) -> None:
    other = ModelIdentity(name="large", hash="cd" * 32, dimension=8)
    with pytest.raises(StoreError, match=r"'small'.*'large'.*--model"):
        IndexStore.open(store.folder, other)
    IndexStore.create(store.folder, other).upsert([row("/a.png")], unit(1, 8))
    assert (IndexStore.open(store.folder, other).count(), IndexStore.open(store.folder, MODEL).count()) == (1, 0)
    assert models_of(store.folder) == [MODEL, other]


def test_damaged_manifest(store: IndexStore) -> None:
    next(store.folder.glob("*.json")).write_text("{}")
    with pytest.raises(StoreError, match="does not describe an index"):
        IndexStore.open(store.folder, MODEL)


def test_one_writer_at_a_time(store: IndexStore) -> None:
    with store.writing(), pytest.raises(StoreError, match="Another process"), store.writing():
        pass
    with store.writing():
        pass


def test_a_searcher_sees_what_others_write(store: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = IndexStore.open(store.folder, MODEL)
    assert reader.search(unit(1)[0]) == []
    for name in "abc":
        store.upsert([row(f"/{name}.png")], unit(1))
    monkeypatch.setattr(store_module, "MAX_FRAGMENTS", 2)
    with store.writing():
        store.optimize()
    assert store._table.stats()["fragment_stats"]["num_fragments"] == 1
    assert len(reader.search(unit(1)[0])) == 3


def test_disk_full(store: IndexStore) -> None:
    """A limit on file size stands for the full disk: the write fails in the same place."""
    store.upsert([row("/a.png")], unit(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(StoreError, match=r"cannot be written: File too large\. What was written before is kept"):
            store.upsert([row("/b.png", thumbnail=os.urandom(300_000))], unit(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert IndexStore.open(store.folder, MODEL).files().keys() == {uri_of("/a.png")}
    store.upsert([row("/b.png", thumbnail=os.urandom(300_000))], unit(1))
    assert store.count() == 2


@pytest.mark.parametrize("dimension", [64, 20])
def test_vector_index_finds_what_exact_search_finds(tmp_path: Path, dimension: int) -> None:
    model = ModelIdentity(name="m", hash="ef" * 32, dimension=dimension)
    store = IndexStore.create(tmp_path, model)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(100, dimension))
    vectors = (centres[rng.integers(100, size=12_000)] + 0.5 * rng.normal(size=(12_000, dimension))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = [row(f"/{'in' if i % 50 == 0 else 'out'}/{i}.png") for i in range(len(vectors))]
    with store.writing():
        store.upsert(rows[:10_000], vectors[:10_000])
        store.optimize()
        assert store._table.list_indices() == []  # flat is fast enough up to here
        store.upsert(rows[10_000:11_900], vectors[10_000:11_900])
        store.optimize()
        store.upsert(rows[11_900:], vectors[11_900:])
        store.optimize()
    (index,) = store._table.list_indices()
    assert index.index_type.upper().replace("_", "") == ("IVFRQ" if dimension == 64 else "IVFFLAT")
    assert store._table.index_stats(index.name).num_unindexed_rows == 100  # found all the same, see below

    queries = vectors[::400] + 0.05 * rng.normal(size=(30, dimension)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    position = {row.uri: i for i, row in enumerate(rows)}
    for within, allowed in ((None, np.arange(12_000)), ("/in", np.arange(0, 12_000, 50))):
        hits = 0
        for query in queries:
            exact = allowed[np.argsort(-(vectors[allowed] @ query))[:10]]
            found = store.search(query, within=within)
            assert [match.score for match in found] == sorted((match.score for match in found), reverse=True)
            hits += len(set(exact) & {position[match.row.uri] for match in found})
        assert hits / (10 * len(queries)) >= 0.95


@pytest.mark.parametrize(("precision", "recall"), [("float16", 0.99), ("int8", 0.95), ("binary", 0.3)])
def test_precisions_find_what_float32_finds(
    tmp_path: Path, precision: VectorPrecision, recall: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a vector index, and in one folder of ten."""
    monkeypatch.setattr(store_module, "MAX_FLAT_ROWS", 1500)
    model = ModelIdentity(name="m", hash="ef" * 32, dimension=100)  # no whole number of bytes of signs
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 100))
    vectors = (centres[rng.integers(20, size=2000)] + 0.5 * rng.normal(size=(2000, 100))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = [row(f"/{i % 10}/{i}.png") for i in range(2000)]
    store = IndexStore.create(tmp_path, model, precision=precision)
    with store.writing():
        store.upsert(rows[:1500], vectors[:1500])
        store.upsert(rows[1500:], vectors[1500:])
        for indexed in (False, True):
            if indexed:
                store.optimize()
                (index,) = store._table.list_indices()
                assert index.index_type.upper().replace("_", "") == ("IVFFLAT")
            for within, allowed in ((None, np.arange(2000)), ("/3", np.arange(3, 2000, 10))):
                hits = 0
                for query in vectors[::100]:
                    exact = allowed[np.argsort(-(vectors[allowed] @ query))[:10]]
                    found = IndexStore.open(tmp_path, model).search(query, within=within)
                    assert [match.score for match in found] == sorted((match.score for match in found), reverse=True)
                    hits += len({int(path_of(match.row.uri).stem) for match in found} & set(exact))
                assert hits / 200 >= recall
    found = store.search(vectors[7], top_k=1)[0]
    assert found.row == rows[7]
    if precision != "binary":
        assert found.score == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("precision", VECTOR_PRECISIONS)
def test_vectors_can_be_written_again(tmp_path: Path, precision: VectorPrecision) -> None:
    model = ModelIdentity(name="m", hash="ef" * 32, dimension=20)
    store = IndexStore.create(tmp_path, model, precision=precision)
    vectors = unit(3, 20)
    store.upsert([row("/a.pdf", part, "page") for part in (1, 2, 3)], vectors)
    before = store._table.to_arrow().sort_by("part")
    rows, stored = store.rows([uri_of("/a.pdf")])
    order = np.argsort([row.part for row in rows])
    assert np.all((stored[order] * vectors).sum(axis=1) > {"binary": 0.7}.get(precision, 0.999))
    store.upsert(rows, stored)
    assert store._table.to_arrow().sort_by("part").equals(before)
    per_vector = {"float32": 80, "float16": 40, "int8": 23, "binary": 3}
    assert store.size_in_bytes() == 3 * per_vector[precision]


def test_precisions_are_not_mixed(tmp_path: Path) -> None:
    assert IndexStore.create(tmp_path, MODEL, precision="int8").precision == "int8"
    assert IndexStore.create(tmp_path, MODEL).precision == IndexStore.open(tmp_path, MODEL).precision == "int8"
    with pytest.raises(StoreError, match=r"as int8, not as float32.*Leave out --precision.*--store"):
        IndexStore.create(tmp_path, MODEL, precision="float32")
    with pytest.raises(InputError, match="Did you mean 'int8'"):
        IndexStore.create(tmp_path, MODEL, precision="int4")  # type: ignore[arg-type]
    manifest = next(tmp_path.glob("vectors_*.json"))
    manifest.unlink()
    assert IndexStore.create(tmp_path, MODEL, precision="binary").search(unit(1)[0]) == []
    manifest.write_text(manifest.read_text().replace('"precision": "binary",', ""))
    assert IndexStore.open(tmp_path, MODEL).precision == "float32", "what older versions wrote"


def test_index_is_rebuilt_when_many_rows_are_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_FLAT_ROWS", 500)
    store = IndexStore.create(tmp_path, MODEL)
    vectors = unit(3000)
    rows = [row(f"/{i}.png") for i in range(3000)]
    for start, end in ((0, 600), (600, 3000)):
        with store.writing():
            store.upsert(rows[start:end], vectors[start:end])
            store.optimize()
        assert store._table.index_stats("vector_idx").num_indexed_rows == end
    assert all(store.search(vectors[i])[0].row == rows[i] for i in range(0, 3000, 300))


def test_lock_dies_with_its_process(store: IndexStore) -> None:
    code = (
        "import os, sys; from quarterlight.index import *;"
        f"s = IndexStore.open({str(store.folder)!r}, ModelIdentity(name='small', hash={MODEL.hash!r}, dimension=16));"
        "s.writing().__enter__(); os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == -9
    with store.writing():
        pass


def test_what_goes_wrong_while_writing_is_not_the_stores_fault(store: IndexStore) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), store.writing():
        raise RuntimeError("out of memory")
