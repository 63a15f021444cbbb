"""Indexing: every kind of bad file is one line, and the table depends on the files alone, not on how it came about."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.search.fakes import FakeEncoder
from tests.search.files import bomb, pdf, write_image

from quarterlight.errors import InputError, StoreError
from quarterlight.index import IndexStore
from quarterlight.index.rows import path_of
from quarterlight.records import Item
from quarterlight.search import ingest as ingest_module
from quarterlight.search.encoder import identity_of
from quarterlight.search.ingest import IngestConfig, IngestReport, ingest


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def store(tmp_path: Path, encoder: FakeEncoder) -> IndexStore:
    return IndexStore.create(tmp_path / "store", identity_of(encoder))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three pictures, a PDF of two pages and a Markdown file of two sections: seven rows."""
    folder = tmp_path / "corpus"
    for colour in ("red", "green", "blue"):
        write_image(folder / "pictures" / f"{colour}.png", colour)
    (folder / "fruit.pdf").write_bytes(pdf(["apples and pears", "plums"], title="Fruit"))
    (folder / "notes.md").write_text("# Garden\nRoses.\n# Kitchen\nKnives.\n")
    return folder


def snapshot(store: IndexStore) -> dict[str, Any]:
    """id -> everything else, vectors included."""
    return {record.pop("id"): record for record in store._table.to_arrow().to_pylist()}


def fresh_snapshot(folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The table that indexing gives where there was none."""
    encoder = FakeEncoder()
    store = IndexStore.create(Path(tempfile.mkdtemp(dir=tmp_path)), identity_of(encoder))
    ingest([folder], store, encoder)
    return snapshot(store)


def counts(report: IngestReport) -> dict[str, int]:
    names = ("new", "changed", "moved", "copied", "unchanged", "deleted")
    return {name: getattr(report, name) for name in names if getattr(report, name)}


def reasons(report: IngestReport) -> dict[str, str]:
    return {Path(problem.path).name: problem.reason for problem in report.problems}


def test_first_time(store: IndexStore, encoder: FakeEncoder, corpus: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = ingest([corpus], store, encoder, on_progress=lambda done, total: seen.append((done, total)))
    assert counts(report) == {"new": 5} and report.num_rows == 7 and report.problems == []
    assert seen == [(done, 5) for done in range(1, 6)]
    assert [store.count(kind) for kind in ("image", "page", "text")] == [3, 2, 2]


def test_incremental(store: IndexStore, encoder: FakeEncoder, corpus: Path, tmp_path: Path) -> None:
    ingest([corpus], store, encoder)
    assert counts(ingest([corpus], store, encoder)) == {"unchanged": 5}
    assert encoder.num_encoded == 7

    write_image(corpus / "new.png", "yellow")
    write_image(corpus / "pictures" / "red.png", "white")
    (corpus / "notes.md").write_text("# Garden\nOnly roses.\n")  # loses a section
    (corpus / "pictures" / "green.png").unlink()
    (corpus / "fruit.pdf").rename(corpus / "renamed.pdf")
    os.utime(corpus / "pictures" / "blue.png", ns=(1, 1))
    report = ingest([corpus], store, encoder)
    # the PDF's old name and green.png are gone; it and the touched picture keep their vectors
    assert counts(report) == {"new": 1, "changed": 2, "moved": 2, "deleted": 2}
    assert encoder.num_encoded == 7 + 3
    assert snapshot(store) == fresh_snapshot(corpus, tmp_path)


def test_copies_are_no_moves(store: IndexStore, encoder: FakeEncoder, corpus: Path) -> None:
    ingest([corpus], store, encoder)
    shutil.copytree(corpus / "pictures", corpus / "again")
    (corpus / "fruit.pdf").rename(corpus / "renamed.pdf")
    assert counts(ingest([corpus], store, encoder)) == {"moved": 1, "copied": 3, "unchanged": 4, "deleted": 1}
    assert encoder.num_encoded == 7


def test_what_is_gone_is_taken_out_by_its_own_name(store: IndexStore, encoder: FakeEncoder, corpus: Path) -> None:
    ingest([corpus], store, encoder)
    shutil.rmtree(corpus / "pictures")
    (corpus / "fruit.pdf").unlink()
    (corpus / "notes.md").unlink()
    assert counts(ingest([corpus / "pictures", corpus / "notes.md"], store, encoder)) == {"deleted": 4}
    assert [path_of(uri).name for uri in store.files()] == ["fruit.pdf"]
    with pytest.raises(InputError, match="pictures cannot be indexed: No such file or directory"):
        ingest([corpus / "pictures"], store, encoder)


def test_swapped_files(store: IndexStore, encoder: FakeEncoder, corpus: Path, tmp_path: Path) -> None:
    ingest([corpus], store, encoder)
    red, blue = corpus / "pictures" / "red.png", corpus / "pictures" / "blue.png"
    red.rename(corpus / "swap")
    blue.rename(red)
    (corpus / "swap").rename(blue)
    ingest([corpus], store, encoder, config=IngestConfig(rows_per_commit=1))
    assert snapshot(store) == fresh_snapshot(corpus, tmp_path)


def test_same_bytes_in_another_kind_of_file(
    store: IndexStore, encoder: FakeEncoder, corpus: Path, tmp_path: Path
) -> None:
    ingest([corpus], store, encoder)
    shutil.copy(corpus / "notes.md", corpus / "notes.txt")
    ingest([corpus], store, encoder)
    assert snapshot(store) == fresh_snapshot(corpus, tmp_path)


def test_only_what_was_asked_for_is_deleted(store: IndexStore, encoder: FakeEncoder, corpus: Path) -> None:
    ingest([corpus], store, encoder)
    shutil.rmtree(corpus / "pictures")
    (corpus / "fruit.pdf").unlink()
    (corpus / "pictures").mkdir()
    assert counts(ingest([corpus / "pictures"], store, encoder)) == {"deleted": 3}
    assert store.count("page") == 2


def test_a_file_that_breaks_leaves_the_index(store: IndexStore, encoder: FakeEncoder, corpus: Path) -> None:
    ingest([corpus], store, encoder)
    red = corpus / "pictures" / "red.png"
    red.write_bytes(red.read_bytes()[:50])
    report = ingest([corpus], store, encoder)
    assert list(reasons(report)) == ["red.png"] and store.count("image") == 2


def test_bad_input(store: IndexStore, encoder: FakeEncoder, corpus: Path, tmp_path: Path) -> None:
    noise = tmp_path / "noise.jpg"
    Image.effect_noise((64, 64), 80).save(noise)
    bad = corpus / "bad"
    bad.mkdir()
    files = {
        "truncated.jpg": noise.read_bytes()[:800],
        "zero.png": b"",
        "bomb.png": bomb(),
        "words.png": b"not a picture",
        "encrypted.pdf": pdf(["secret"], encrypted=True),
        "broken.pdf": pdf(["first", None, "third"]),
        "zero.pdf": b"",
        "zero.txt": b"",
        "binary.md": b"\0\1\2",
    }
    for name, data in files.items():
        (bad / name).write_bytes(data)
    (bad / "dangling.png").symlink_to("missing.png")
    (bad / "loop").symlink_to(corpus)
    write_image(bad / "thin.png", "red", (1, 4000))
    write_image(bad / "two\nlines.png", "green")
    write_image(bad / os.fsdecode(b"caf\xe9.png"), "blue")
    (bad / "other.zip").write_bytes(b"PK")

    report = ingest([corpus], store, encoder)
    expected = {
        "truncated.jpg": "truncated",
        "zero.png": "is empty",
        "bomb.png": "decompression bomb",
        "words.png": "not a picture in a known format",
        "encrypted.pdf": "is encrypted",
        "broken.pdf": "page 2 of 3 cannot be read",
        "zero.pdf": "is empty",
        "zero.txt": "is empty",
        "binary.md": "is not a text",
        "dangling.png": "is a broken symbolic link",
        "loop": "not followed",
    }
    assert reasons(report).keys() == expected.keys() and len(report.problems) == len(expected)
    for name, reason in reasons(report).items():
        assert expected[name] in reason
    assert all("\n" not in str(problem) and str(problem).isprintable() for problem in report.problems)
    assert report.num_other == 1
    found = {path_of(uri) for uri in store.files()}
    assert {bad / "thin.png", bad / "two\nlines.png", bad / os.fsdecode(b"caf\xe9.png"), bad / "broken.pdf"} <= found
    assert report.num_rows == 7 + 3 + 2

    again = ingest([corpus], store, encoder)
    assert again.problems == report.problems, "a broken page is told of every time, though its file is unchanged"


def test_deleted_between_walk_and_read(
    store: IndexStore, encoder: FakeEncoder, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def walk_then_delete(*args: Any, **kwargs: Any) -> Any:
        found = walk(*args, **kwargs)
        (corpus / "pictures" / "red.png").unlink()
        return found

    walk = ingest_module.walk
    monkeypatch.setattr(ingest_module, "walk", walk_then_delete)
    report = ingest([corpus], store, encoder)
    assert reasons(report) == {"red.png": "cannot be read: No such file or directory"}
    assert report.num_rows == 6


@contextlib.contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder in which file permissions count, for root too."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    user = os.geteuid()
    if user == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(user)
        for path in folder.rglob("*"):
            path.chmod(0o700)
        shutil.rmtree(folder)


def test_permissions(encoder: FakeEncoder) -> None:
    with unprivileged() as folder:
        store = IndexStore.create(folder / "store", identity_of(encoder))
        corpus = folder / "corpus"
        for name in ("open.png", "closed.png", "folder/a.png"):
            write_image(corpus / name, "red")
        assert counts(ingest([corpus], store, encoder)) == {"new": 3}
        (corpus / "closed.png").chmod(0)
        os.utime(corpus / "closed.png", ns=(1, 1))
        for mode in (0o000, 0o300, 0o600):
            (corpus / "folder").chmod(mode)
            report = ingest([corpus], store, encoder)
            assert reasons(report)["closed.png"] == "cannot be read: Permission denied"
            assert len(report.problems) == 2 and "Permission denied" in report.problems[1].reason
            # what is behind a closed door is not taken as deleted
            assert {path_of(uri).name for uri in store.files()} == {"open.png", "a.png"}


def test_disk_full(store: IndexStore, encoder: FakeEncoder, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upsert = store.upsert

    def until_full(rows: Any, *args: Any, **kwargs: Any) -> None:
        if store.count() >= 2:
            raise StoreError("The index cannot be written: No space left on device.")
        upsert(rows, *args, **kwargs)

    monkeypatch.setattr(store, "upsert", until_full)
    report = ingest([corpus], store, encoder, config=IngestConfig(rows_per_commit=1, batch_size=1))
    assert report.stopped is not None and "No space left" in report.stopped
    assert 2 <= report.num_rows < 7
    monkeypatch.undo()
    assert ingest([corpus], store, encoder).stopped is None
    assert store.count() == 7


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_disk_really_full(encoder: FakeEncoder, tmp_path: Path) -> None:
    disk, corpus = tmp_path / "disk", tmp_path / "noise"
    disk.mkdir()
    corpus.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        for number in range(80):
            noise = Image.frombytes("RGB", (160, 160), random.Random(number).randbytes(3 * 160 * 160))
            noise.save(corpus / f"{number:02}.webp", quality=50)
        store = IndexStore.create(disk / "store", identity_of(encoder))
        report = ingest([corpus], store, encoder, config=IngestConfig(rows_per_commit=10, batch_size=10))
        assert report.stopped is not None and "No space left on device" in report.stopped
        assert 10 <= report.num_rows < 80
        reopened = IndexStore.open(disk / "store", identity_of(encoder))
        assert len(reopened.files()) == len(snapshot(reopened)) == report.num_rows
        assert len(reopened.search(encoder.encode_query([Item(text="red")])[0])) == 10
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_interrupt_keeps_what_is_done(store: IndexStore, corpus: Path) -> None:
    class Interrupted(FakeEncoder):
        def encode_document(self, items: Any, **options: Any) -> Any:
            if self.num_encoded >= 4:
                raise KeyboardInterrupt
            return super().encode_document(items, **options)

    with pytest.raises(KeyboardInterrupt):
        ingest([corpus], store, Interrupted(), config=IngestConfig(batch_size=1))
    assert 2 <= store.count() <= 4


def test_an_item_the_model_refuses(store: IndexStore, corpus: Path) -> None:
    class Picky(FakeEncoder):
        def encode_document(self, items: Any, **options: Any) -> Any:
            if any("Knives" in (item.text or "") for item in items):
                raise InputError("Item 0: no knives.")
            return super().encode_document(items, **options)

    report = ingest([corpus], store, Picky())
    assert reasons(report) == {"notes.md": "section 2 is refused by the model: Item 0: no knives."}
    assert report.num_rows == 6


def test_a_bug_in_a_decoder_is_one_line(
    store: IndexStore, encoder: FakeEncoder, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(file: Any, pictures: Any) -> Any:
        if file.path.endswith("red.png"):
            raise ZeroDivisionError("division\nby zero")
        return read_parts(file, pictures)

    read_parts = ingest_module.read_parts
    monkeypatch.setattr(ingest_module, "read_parts", read)
    report = ingest([corpus], store, encoder)
    assert reasons(report) == {"red.png": r"cannot be read: ZeroDivisionError: division\nby zero"}
    assert report.num_rows == 6


KILLED = """
import sys, time
from pathlib import Path
from quarterlight.index import IndexStore
from quarterlight.search.encoder import identity_of
from quarterlight.search.ingest import IngestConfig, ingest
from tests.search.fakes import FakeEncoder

class Slow(FakeEncoder):
    def encode_document(self, items, **options):
        time.sleep(0.02)
        return super().encode_document(items, **options)

corpus, folder = map(Path, sys.argv[1:])
encoder = Slow()
store = IndexStore.create(folder, identity_of(encoder))
config = IngestConfig(rows_per_commit=6, batch_size=4)
ingest([corpus], store, encoder, config=config, on_progress=lambda done, total: print(done, flush=True))
"""


def test_kill_and_run_again(corpus: Path, tmp_path: Path) -> None:
    """Killed at random moments, then run to the end: row by row the table of an uninterrupted run."""
    for number in range(60):
        write_image(corpus / "many" / f"{number}.png", (4 * number, 0, 0))
    (corpus / "long.pdf").write_bytes(pdf([f"page {number}" for number in range(8)]))
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(corpus), str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    dice = random.Random(0)
    encoder = FakeEncoder()
    sizes = []
    for attempt in range(4):
        enough = 15 * attempt + dice.randrange(1, 15)
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert any(int(line) >= enough for line in process.stdout)
            time.sleep(dice.uniform(0, 0.1))
            process.kill()
        if attempt == 1:  # the world goes on meanwhile
            (corpus / "pictures" / "red.png").unlink()
            write_image(corpus / "many" / "0.png", "white")
        store = IndexStore.open(folder, identity_of(encoder))
        sizes.append(store.count())
        pages = sorted(row.part for row in store.rows(store.files(within=corpus / "long.pdf"))[0])
        assert pages in ([], list(range(1, 9))), "a file is in the table as a whole or not at all"
    ingest([corpus], store, encoder)
    assert snapshot(store) == fresh_snapshot(corpus, tmp_path)
    assert 0 < sizes[0] <= sizes[-1] < 75


def test_memory_holds_a_few_parts_only(store: IndexStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = peak = 0

    def counted(file: Any, pictures: Any) -> Any:
        nonlocal alive, peak
        for part in read_parts(file, pictures):
            alive += 1
            peak = max(peak, alive)
            yield part

    class Counting(FakeEncoder):
        def encode_document(self, items: Any, **options: Any) -> Any:
            nonlocal alive
            alive -= len(items)
            return super().encode_document(items, **options)

    read_parts = ingest_module.read_parts
    monkeypatch.setattr(ingest_module, "read_parts", counted)
    (tmp_path / "long.pdf").write_bytes(pdf(["words"] * 60))
    config = IngestConfig(batch_size=4)
    ingest([tmp_path / "long.pdf"], store, Counting(), config=config)
    assert store.count() == 60 and peak <= 3 * config.batch_size + config.num_readers


def test_vectors_fit_their_rows(store: IndexStore, encoder: FakeEncoder, corpus: Path) -> None:
    ingest([corpus], store, encoder, config=IngestConfig(batch_size=2))
    for record in snapshot(store).values():
        if record["kind"] == "image":
            vector = encoder.encode_query([Item(image=path_of(record["uri"]))])[0]
            assert np.allclose(vector, record["vector"], atol=1e-6)
