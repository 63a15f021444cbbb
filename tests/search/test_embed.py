"""Bulk embedding: shards depend on the files alone, are resumed, and give the index that `index` gives."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from tests.search.fakes import FakeEncoder, FakeReranker
from tests.search.files import pdf, write_image

from quarterlight.errors import InputError, StoreError
from quarterlight.images import load_image
from quarterlight.index import IndexStore, ModelIdentity, VectorPrecision
from quarterlight.index.rows import path_of
from quarterlight.index.shards import ShardFolder
from quarterlight.records import Item
from quarterlight.search.embed import EmbedConfig, EmbedReport, Group, Local, Shard, embed
from quarterlight.search.encoder import identity_of
from quarterlight.search.ingest import ingest
from quarterlight.search.items import LINES_PER_PIECE
from quarterlight.search.load import load
from quarterlight.search.retrieve import Searcher

SMALL = EmbedConfig(items_per_shard=2, items_per_group=2)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three pictures, a PDF of three pages of which one is broken, two sections, and a file that is no picture."""
    folder = tmp_path / "corpus"
    for colour in ("red", "green", "blue"):
        write_image(folder / "pictures" / f"{colour}.png", colour)
    (folder / "fruit.pdf").write_bytes(pdf(["apples and pears", None, "plums"], title="Fruit"))
    (folder / "notes.md").write_text("# Garden\nRoses.\n# Kitchen\nKnives.\n")
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def run(
    paths: Sequence[Path],
    out: Path,
    encoder: FakeEncoder | None = None,
    precision: VectorPrecision | None = None,
    config: EmbedConfig = SMALL,
) -> EmbedReport:
    encoder = encoder or FakeEncoder()
    folder = ShardFolder.create(out, identity_of(encoder), precision=precision)
    return embed(paths, folder, Local(encoder), config=config)


def rows_of(store: IndexStore) -> dict[str, Any]:
    """id -> everything else, vectors included."""
    return {record.pop("id"): record for record in store._table.to_arrow().to_pylist()}


def content(out: Path) -> dict[str, Any]:
    """URI and part -> everything that shards say of it."""
    tables = [pq.read_table(path) for path in (out / "shards").glob("*.parquet")]
    return {(one["uri"], one["part"]): one for table in tables for one in table.to_pylist()}


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_shards_make_the_index_that_index_makes(tmp_path: Path, corpus: Path, precision: VectorPrecision) -> None:
    report = run([corpus], tmp_path / "out", precision=precision)
    assert (report.num_items, report.num_embedded, report.num_rows) == (6, 6, 7)
    identity = identity_of(FakeEncoder())
    loaded = IndexStore.create(tmp_path / "loaded", identity, precision=precision)
    assert load(ShardFolder.open(tmp_path / "out"), loaded).num_rows == 7
    indexed = IndexStore.create(tmp_path / "indexed", identity, precision=precision)
    there = ingest([corpus], indexed, FakeEncoder())
    assert rows_of(loaded) == rows_of(indexed)
    assert report.problems == there.problems and len(report.problems) == 2
    again = ingest([corpus], loaded, encoder := FakeEncoder())
    assert (again.unchanged, encoder.num_encoded) == (5, 0), "what came from shards is known"


def test_a_run_that_is_started_again(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "out"

    with pytest.raises(KeyboardInterrupt):
        run([corpus], out, Stopped(4))
    assert not list(out.glob("shards/*.part"))
    kept = content(out)
    assert 0 < len(kept) < 7
    encoder = FakeEncoder()
    report = run([corpus], out, encoder)
    assert encoder.num_encoded == 7 - len(kept) and report.num_rows == 7
    run([corpus], tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")
    encoder = FakeEncoder()
    report = run([corpus], out, encoder)
    assert (encoder.num_encoded, report.num_embedded, len(report.problems)) == (0, 1, 2), "only the bad file is read"


def test_changed_new_and_vanished_files(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "out"
    run([corpus], out)
    write_image(corpus / "pictures" / "red.png", "yellow", (50, 30))
    write_image(corpus / "pictures" / "new.png", "white")
    write_image(corpus / "bad.png", "black")
    (corpus / "pictures" / "blue.png").unlink()
    encoder = FakeEncoder()
    report = run([corpus], out, encoder)
    run([corpus], tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")
    assert encoder.num_encoded < report.num_rows == 8
    assert [Path(problem.path).name for problem in report.problems] == ["fruit.pdf"], "bad.png is mended"


class Stopped(FakeEncoder):
    """Is stopped by its user after so many items."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def encode_document(self, items: Sequence[Item], *, instruction: str | None = None) -> npt.NDArray[np.float32]:
        if self.num_encoded >= self.after:
            raise KeyboardInterrupt
        return super().encode_document(items)


def test_nothing_goes_before_its_replacement_is_there(tmp_path: Path) -> None:
    folder, out = tmp_path / "corpus", tmp_path / "out"
    for number in range(6):
        write_image(folder / f"{number}.png", (40 * number, 0, 0))
    run([folder], out, config=EmbedConfig(items_per_shard=3))
    before = content(out)
    write_image(folder / "0.png", "white", (50, 30))
    write_image(folder / "3.png", "black", (50, 30))
    with pytest.raises(KeyboardInterrupt):
        run([folder], out, Stopped(0))
    assert content(out) == before
    run([folder], out, encoder := FakeEncoder(), config=EmbedConfig(items_per_shard=5))
    assert encoder.num_encoded == 2, "the others are carried over, and another size of shards changes nothing"
    assert len(list(out.glob("shards/*.parquet"))) == 2
    run([folder], tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


def test_a_stopped_run_leaves_two_states_of_which_the_later_is_loaded(tmp_path: Path, corpus: Path) -> None:
    folder = ShardFolder.create(tmp_path / "out", identity_of(FakeEncoder()))
    (corpus / "notes.md").write_text("# a\nA.\n# b\nB.\n# c\nC.\n")
    run([corpus], folder.folder)
    (corpus / "notes.md").write_text("# z\nZ.\n")
    write_image(corpus / "z.png", "white")
    with pytest.raises(KeyboardInterrupt):
        run([corpus], folder.folder, Stopped(1), config=EmbedConfig(items_per_shard=1, num_readers=1))
    assert len({info.written_ns for info in folder.shards()}) > 2
    store = IndexStore.create(tmp_path / "store", folder.model)
    load(folder, store)
    found = {one["text"] for one in rows_of(store).values() if one["uri"].endswith("notes.md")}
    assert found == {"Z."}


def test_other_inputs_and_closed_folders_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, names = tmp_path / "out", ("a", "b/deep", "b/gone")
    for name in names:
        write_image(tmp_path / name / "x.png", "red")
    (tmp_path / "a" / "bad.png").write_bytes(b"")
    (tmp_path / "b" / "list.jsonl").write_text('{"id": 1, "text": "words"}')
    run([tmp_path / "a"], out)
    before = content(out)
    run([tmp_path / "b"], out, encoder := FakeEncoder())
    assert before.items() < content(out).items() and encoder.num_encoded == 2
    report = run([tmp_path / "b" / "list.jsonl"], out, encoder)
    assert (report.num_rows, report.problems, encoder.num_encoded) == (4, [], 3)
    assert [Path(path).name for path, _ in ShardFolder.open(out).problems()] == ["bad.png"]

    scandir = os.scandir

    def closed(folder: str) -> Any:
        if Path(folder).name == "deep":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    (tmp_path / "b" / "gone" / "x.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", closed)
        report = run([tmp_path / "b"], out, encoder)
    assert [problem.reason for problem in report.problems] == ["cannot be opened: Permission denied"]
    kept = {str(path_of(one["uri"]).relative_to(tmp_path)) for one in content(out).values()}
    assert kept == {"a/x.png", "b/deep/x.png", "b/list.jsonl"}, "a list that is not named is no input"
    (tmp_path / "b" / "list.jsonl").unlink()
    report = run([tmp_path / "b"], out, encoder)
    assert report.num_rows == 2 and encoder.num_encoded == 3


def test_index_by_an_engine(tmp_path: Path, corpus: Path) -> None:
    """As `index --ray` does; a cluster only is another engine."""
    stores = [IndexStore.create(tmp_path / name, identity_of(FakeEncoder())) for name in ("engine", "alone")]
    there = ingest([corpus], stores[1], FakeEncoder())
    report = ingest([corpus], stores[0], None, engine=Local(FakeEncoder()))
    assert rows_of(stores[0]) == rows_of(stores[1])
    assert (report.new, report.problems) == (there.new, there.problems) and report.num_rows == 7
    (corpus / "notes.md").unlink()
    report = ingest([corpus], stores[0], None, engine=Local(encoder := FakeEncoder()))
    assert (report.unchanged, report.deleted, report.num_rows, encoder.num_encoded) == (4, 1, 5, 0)
    with pytest.raises(InputError, match="visual tokens, which are not made on a cluster"):
        ingest([corpus], stores[0], None, engine=Local(FakeEncoder()), visual_tokens="int8")


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    """A list in which lines 3 and on are bad in all ways."""
    for colour in ("red", "green"):
        write_image(tmp_path / "list" / f"{colour}.png", colour)
    lines = [
        '{"id": "a/1", "text": "a red thing", "image": "red.png"}',
        '{"id": 2, "text": "dark words"}',
        "",
        '{"id": "x", "image": "missing.png"}',
        '{"id": "a/1", "text": "again"}',
        '{"id": "y", "txet": "t"}',
        '{"text": "no id"}',
        '{"id": "z"}',
        "[1]",
        "{",
        '{"id": "both", "image": ["red.png", "green.png"], "max_tiles": 4}',
        '{"id": "ü", "image": "red.png"}',
    ]
    path = tmp_path / "list" / "catalogue.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_lists_of_items(tmp_path: Path, catalogue: Path) -> None:
    report = run([catalogue, catalogue], tmp_path / "out", config=EmbedConfig(items_per_shard=5, items_per_group=2))
    found = {one["id"]: one for one in content(tmp_path / "out").values()}
    assert found.keys() == {"a/1", "2", "both", "ü"} and report.num_items == 12
    given = {
        "a/1": Item(text="a red thing", image=load_image(catalogue.parent / "red.png")),
        "2": Item(text="dark words"),
        "both": Item(image=[load_image(catalogue.parent / f"{colour}.png") for colour in ("red", "green")]),
        "ü": Item(image=load_image(catalogue.parent / "red.png")),
    }
    for id, item in given.items():
        assert np.array_equal(found[id]["vector"], FakeEncoder().encode_document([item])[0])
    reasons = {problem.reason.split(":")[0]: problem.reason for problem in report.problems}
    assert list(reasons) == sorted(reasons) and len(reasons) == 7
    assert "No such file" in reasons["id x"]
    assert "same id" in reasons["line 5, id a/1"]
    assert "Did you mean 'text'" in reasons["id y"]
    assert "no id" in reasons["line 7"] and "empty" in reasons["id z"]
    assert "got list" in reasons["line 9"] and "not JSON" in reasons["line 10"]
    written = [json.loads(line) for line in (tmp_path / "out" / "problems.jsonl").read_text().splitlines()]
    assert [one["reason"] for one in written] == [problem.reason for problem in report.problems]


@pytest.mark.parametrize("spaced", [False, True])
def test_lines_come_and_go_anywhere_in_a_list(tmp_path: Path, spaced: bool) -> None:
    """spaced: with an empty line behind every other one."""
    path = tmp_path / "list.jsonl"
    lines = [f'{{"id": "{number}", "text": "word {number}"}}' for number in range(1000)]
    lines[700:703] = ['{"text": "no id"}', '{"id": "5", "text": "again"}', '{"id": "empty"}']
    if spaced:
        lines = [line for number, one in enumerate(lines) for line in ([one, ""] if number % 2 else [one])]

    def embedded(*, whole: bool = False) -> tuple[int, EmbedReport]:
        path.write_text("\n".join(lines))
        encoder, out = FakeEncoder(), tmp_path / "whole" / str(len(lines)) if whole else tmp_path / "out"
        report = run([path], out, encoder, config=EmbedConfig(items_per_shard=100))
        return encoder.num_encoded, report

    assert embedded()[0] == 997
    for change in (lambda: lines.insert(0, '{"id": "new", "text": "on top"}'), lambda: lines.pop(400)):
        change()
        encoded, report = embedded()
        _, expected = embedded(whole=True)
        assert 0 < encoded <= LINES_PER_PIECE[-1] and report.num_rows == expected.num_rows
        assert [one.reason for one in report.problems] == [one.reason for one in expected.problems]
        there, anew = content(tmp_path / "out"), content(tmp_path / "whole" / str(len(lines)))
        assert there.keys() == anew.keys()
        assert all(np.array_equal(there[one]["vector"], anew[one]["vector"]) for one in anew)
    assert embedded()[0] == 0


def test_pictures_change_behind_an_unchanged_list(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", "red")
    path = tmp_path / "list.jsonl"
    lines = [{"id": "a", "image": "a.png"}, {"id": "b", "image": ["b.png", "a.png"]}, {"id": "c", "image": "\0"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert len(run([path], tmp_path / "out").problems) == 2
    encoder = FakeEncoder()
    assert run([path], tmp_path / "out", encoder).num_embedded == encoder.num_encoded == 0
    write_image(tmp_path / "b.png", "blue")
    write_image(tmp_path / "a.png", "green", (50, 30))
    report = run([path], tmp_path / "out", encoder)
    assert encoder.num_encoded == report.num_rows == 2 and "id c" in report.problems[0].reason
    run([path], tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_items_of_a_list_are_found(tmp_path: Path, catalogue: Path) -> None:
    run([catalogue], tmp_path / "out")
    store = IndexStore.create(tmp_path / "store", identity_of(FakeEncoder()))
    load(ShardFolder.open(tmp_path / "out"), store)
    load(ShardFolder.open(tmp_path / "out"), store)
    assert store.count() == 4
    searcher = Searcher(store, FakeEncoder(), reranker=FakeReranker(), rerank=4)
    hits = {hit.title: hit for hit in searcher.search("dark red words")}
    assert hits["a/1"].path == catalogue.parent / "red.png" and hits["2"].path == catalogue
    assert hits["2"].rerank_score == pytest.approx(0.5), "the reranker reads the words without the id"
    assert not searcher.problems
    assert {hit.title for hit in searcher.search("red", within=catalogue.parent / "red.png")} == {"a/1", "ü", "both"}
    ingest([catalogue.parent], store, FakeEncoder())
    assert store.count() == 6, "both pictures stand beside the items that show them"
    (catalogue.parent / "red.png").unlink()
    ingest([catalogue.parent], store, FakeEncoder())
    assert store.count() == 5


def test_items_that_move_and_go(tmp_path: Path) -> None:
    shards, lists = tmp_path / "out", [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    write_image(tmp_path / "a.png", "red")
    write_image(tmp_path / "b.png", "blue")
    lists[0].write_text('{"id": "shoe", "image": "a.png"}\n{"id": "hat", "text": "a hat"}\n')
    lists[1].write_text('{"id": "sock", "image": "a.png"}\n')
    store = IndexStore.create(tmp_path / "store", identity_of(FakeEncoder()))

    def loaded() -> dict[str, str]:
        load(ShardFolder.open(shards), store)
        return {one["title"]: path_of(one["uri"]).name for one in rows_of(store).values()}

    run(lists, shards)
    assert loaded() == {"shoe": "a.png", "hat": "one.jsonl", "sock": "a.png"} and store.count() == 3
    lists[0].write_text('{"id": "shoe", "image": "b.png"}\n')
    with pytest.raises(KeyboardInterrupt):
        run([lists[0]], shards, Stopped(0))
    assert store.count() == 3 and len(loaded()) == 3
    run([lists[0]], shards)
    assert loaded() == {"shoe": "b.png", "sock": "a.png"} and store.count() == 2
    run([lists[0]], tmp_path / "other")
    load(ShardFolder.open(tmp_path / "other"), store)
    assert store.count() == 2, "the other shards know nothing of the second list"
    lists[1].write_text("")
    run(lists, shards)
    assert loaded() == {"shoe": "b.png"}


def test_other_model_and_precision(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "out"
    run([corpus], out, precision="int8")
    with pytest.raises(StoreError, match="as int8, not as float32: leave out --precision"):
        run([corpus], out, precision="float32")
    with pytest.raises(StoreError, match=r"holds embeddings of model 'fake'.*--out"):
        run([corpus], out, FakeEncoder(model_hash="0" * 64))
    assert run([corpus], out).num_rows == 7
    shards = ShardFolder.open(out)
    with pytest.raises(StoreError, match=r"as int8, too coarse .* as float32"):
        load(shards, IndexStore.create(tmp_path / "fine", shards.model))
    load(shards, binary := IndexStore.create(tmp_path / "coarse", shards.model, precision="binary"))
    assert binary.count() == 7
    other = ModelIdentity(name="other", hash="0" * 64, dimension=64)
    with pytest.raises(StoreError, match="cannot be compared"):
        load(shards, IndexStore.create(tmp_path / "other", other))
    with pytest.raises(StoreError, match="is not a folder of embeddings"):
        ShardFolder.open(tmp_path)
    shard = next((out / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(StoreError, match=r"damaged.*embedded again"):
        run([corpus], out)
    shard.unlink()
    assert run([corpus], out).num_rows == 7


def test_groups_in_any_order_and_twice(tmp_path: Path, corpus: Path) -> None:
    """As a cluster may give them."""
    encoder = FakeEncoder()

    def engine(shards: Sequence[Shard], config: EmbedConfig) -> Iterator[Group]:
        groups = list(Local(encoder)(shards, config))
        order = np.random.default_rng(0).permutation(2 * len(groups))
        yield from (groups[n % len(groups)] for n in order)

    embed([corpus], ShardFolder.create(tmp_path / "out", identity_of(encoder)), engine, config=SMALL)
    run([corpus], tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_the_model_refuses(tmp_path: Path, corpus: Path) -> None:
    class Picky(FakeEncoder):
        def encode_document(self, items: Sequence[Item], *, instruction: str | None = None) -> npt.NDArray[np.float32]:
            if any("Roses" in (item.text or "") for item in items):
                raise InputError("No roses.")
            return super().encode_document(items)

    report = run([corpus], tmp_path / "out", Picky())
    reasons = {Path(path).name: reason for path, reason in report.problems}
    assert reasons["notes.md"] == "section 1 is refused by the model: No roses." and report.num_rows == 6


def test_what_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing cannot be indexed: No such file"):
        run([tmp_path / "missing"], tmp_path / "out")
    with pytest.raises(InputError, match="items_per_shard"):
        EmbedConfig(items_per_shard=0)
    assert path_of("file:///a/b.png#x") == Path("/a/b.png")
