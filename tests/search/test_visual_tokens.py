"""Visual tokens beside the rows: filled in, kept up to date, shared by copies, never behind the rows after a kill."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.search.fakes import FakeEyes
from tests.search.files import pdf, write_image

from quarterlight.errors import InputError, StoreError
from quarterlight.index import IndexStore, VisualTokenStore
from quarterlight.index.rows import path_of, uri_of
from quarterlight.records import Item
from quarterlight.search import ingest as ingest_module
from quarterlight.search.encoder import identity_of
from quarterlight.search.ingest import IngestConfig, IngestReport, TokenReport, ingest


@pytest.fixture
def eyes() -> FakeEyes:
    return FakeEyes()


@pytest.fixture
def store(tmp_path: Path, eyes: FakeEyes) -> IndexStore:
    return IndexStore.create(tmp_path / "store", identity_of(eyes))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three pictures, a PDF of two pages and a text: five things to see."""
    folder = tmp_path / "corpus"
    for colour in ("red", "green", "blue"):
        write_image(folder / "pictures" / f"{colour}.png", colour)
    (folder / "fruit.pdf").write_bytes(pdf(["apples and pears", "plums"]))
    (folder / "notes.md").write_text("# Garden\nRoses.\n")
    return folder


def token_store(store: IndexStore) -> VisualTokenStore:
    found = VisualTokenStore.find(store.folder, FakeEyes.vision_hash)
    assert found is not None
    return found


def shown(store: IndexStore) -> set[str]:
    """The keys of all pictures and pages that have rows."""
    return {picture.key for pictures in store.pictures().values() for picture in pictures}


def told(report: IngestReport) -> TokenReport:
    assert report.visual_tokens is not None
    return report.visual_tokens


def records(store: IndexStore) -> dict[str, Any]:
    return {record.pop("id"): record for record in store._table.to_arrow().to_pylist()}


def test_every_picture_and_page_has_what_the_eyes_saw(store: IndexStore, eyes: FakeEyes, corpus: Path) -> None:
    report = ingest([corpus], store, eyes, visual_tokens="float16")
    tokens = token_store(store)
    assert tokens.keys() == shown(store) and len(shown(store)) == 5
    assert told(report) == TokenReport(precision="float16", num_added=5, num_removed=0, num_items=5, num_bytes=240)
    for uri, pictures in store.pictures().items():
        for picture in pictures:
            found = tokens.get([picture.key])[picture.key]
            if picture.kind == "image":
                np.testing.assert_array_equal(found, eyes.look(Item(image=path_of(uri))))
    assert ingest([corpus], store, eyes).visual_tokens == TokenReport(
        precision="float16", num_added=0, num_removed=0, num_items=5, num_bytes=240
    )
    assert eyes.num_encoded == 6


def test_an_index_without_is_filled_in(store: IndexStore, eyes: FakeEyes, corpus: Path) -> None:
    assert ingest([corpus], store, eyes).visual_tokens is None
    rows = records(store)
    progress: list[tuple[int, int]] = []
    report = ingest(
        [corpus], store, eyes, visual_tokens="int8", on_progress=lambda done, total: progress.append((done, total))
    )
    assert (report.new, report.changed, report.moved, report.unchanged) == (0, 0, 0, 5) and report.problems == []
    assert progress == [(done, 5) for done in range(1, 6)]
    assert eyes.num_encoded == 6 + 5, "the text is not embedded again"
    assert told(report).num_added == 5 and token_store(store).keys() == shown(store)
    assert records(store) == rows
    ingest([corpus], store, eyes, visual_tokens="int8")
    assert eyes.num_encoded == 6 + 5


def test_only_what_is_missing_is_filled_in(store: IndexStore, eyes: FakeEyes, corpus: Path) -> None:
    ingest([corpus], store, eyes, visual_tokens="float16")
    tokens = token_store(store)
    (first, second) = store.pictures()[uri_of(corpus / "fruit.pdf")]
    tokens.prune(tokens.keys() - {second.key})
    report = ingest([corpus], store, eyes)
    assert told(report).num_added == 1 and eyes.num_encoded == 6 + 1
    assert first.key in token_store(store).keys()  # noqa: SIM118 a method of the store


def test_a_plain_run_keeps_them_up_to_date(store: IndexStore, eyes: FakeEyes, corpus: Path) -> None:
    ingest([corpus], store, eyes, visual_tokens="float16")
    write_image(corpus / "new.png", "yellow")
    write_image(corpus / "pictures" / "red.png", "white")
    (corpus / "pictures" / "green.png").unlink()
    (corpus / "fruit.pdf").rename(corpus / "renamed.pdf")
    shutil.copy(corpus / "pictures" / "blue.png", corpus / "copy.png")
    report = ingest([corpus], store, eyes)
    assert told(report) == TokenReport(precision="float16", num_added=2, num_removed=2, num_items=5, num_bytes=240)
    assert token_store(store).keys() == shown(store)
    assert eyes.num_encoded == 6 + 2, "what moved and what is a copy is not looked at again"


def test_a_copy_whose_old_rows_lack_them(store: IndexStore, eyes: FakeEyes, corpus: Path) -> None:
    """It gets the vectors of its old rows, which are not below the folders of this run, and is looked at."""
    ingest([corpus], store, eyes)
    (corpus / "elsewhere").mkdir()
    shutil.copy(corpus / "fruit.pdf", corpus / "elsewhere" / "same.pdf")
    report = ingest([corpus / "elsewhere"], store, eyes, visual_tokens="float16")
    assert (report.copied, told(report).num_added) == (1, 2)


def test_copies_are_looked_at_once(store: IndexStore, eyes: FakeEyes, corpus: Path) -> None:
    for number in range(3):
        shutil.copy(corpus / "pictures" / "red.png", corpus / f"{number}.png")
    ingest([corpus], store, eyes)
    num_encoded = eyes.num_encoded
    report = ingest([corpus], store, eyes, visual_tokens="float16")
    assert (report.unchanged, told(report).num_items) == (8, 5) and eyes.num_encoded == num_encoded + 5


def test_another_precision_takes_over(store: IndexStore, eyes: FakeEyes, corpus: Path) -> None:
    ingest([corpus], store, eyes, visual_tokens="float16")
    report = ingest([corpus], store, eyes, visual_tokens="int8")
    assert (told(report).precision, told(report).num_added, told(report).num_items) == ("int8", 5, 5)
    assert told(ingest([corpus], store, eyes)).precision == "int8"
    assert len([*store.folder.glob("tokens_*.json")]) == len([*store.folder.glob("tokens_*.lance")]) == 1


def test_other_models_with_the_same_eyes_keep_theirs(store: IndexStore, eyes: FakeEyes, corpus: Path) -> None:
    ingest([corpus], store, eyes, visual_tokens="float16")
    other = FakeEyes(model_hash="07e2" * 16)
    table = IndexStore.create(store.folder, identity_of(other))
    report = ingest([corpus / "pictures"], table, other)
    assert (told(report).num_added, told(report).num_removed, told(report).num_items) == (0, 0, 5)
    (corpus / "pictures" / "red.png").unlink()
    assert told(ingest([corpus], store, eyes)).num_removed == 0, "the other model still has a row of it"
    assert told(ingest([corpus], table, other)).num_removed == 1


def test_other_eyes_are_left_alone(store: IndexStore, eyes: FakeEyes, corpus: Path) -> None:
    class Other(FakeEyes):
        vision_hash = "07e2" * 16

    ingest([corpus], store, eyes, visual_tokens="float16")
    other = Other(model_hash="07e2" * 16)
    assert ingest([corpus], IndexStore.create(store.folder, identity_of(other)), other).visual_tokens is None
    assert len(token_store(store).keys()) == 5


def test_what_cannot_be_seen_again_is_a_line(
    store: IndexStore, eyes: FakeEyes, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Picky(FakeEyes):
        def encode_document_with_visual_tokens(self, items: Sequence[Item], **options: Any) -> Any:
            if any(max(item.images[0].size) > 500 for item in items):  # type: ignore[union-attr]
                raise InputError("Item 0: no pages.")
            return super().encode_document_with_visual_tokens(items, **options)

    def change_then_read(*arguments: Any, **options: Any) -> Any:
        for name in ("red", "green"):
            path = corpus / "pictures" / f"{name}.png"
            path.write_bytes(b"broken") if name == "red" else path.unlink()
        return walked(*arguments, **options)

    ingest([corpus], store, eyes)
    walked = VisualTokenStore.create
    monkeypatch.setattr(VisualTokenStore, "create", change_then_read)  # after the walk, before they are read
    report = ingest([corpus], store, Picky(), visual_tokens="float16")
    lines = {(Path(problem.path).name, problem.reason) for problem in report.problems}
    assert lines == {
        ("red.png", "has changed meanwhile: index it again; its visual tokens are not stored"),
        ("green.png", "cannot be read: No such file or directory; its visual tokens are not stored"),
        ("fruit.pdf", "is refused by the model: Item 0: no pages.; its visual tokens are not stored"),
    }
    assert told(report).num_items == 1 and report.unchanged == 5


def test_stopped_by_a_full_disk(
    store: IndexStore, eyes: FakeEyes, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise StoreError("The index in x cannot be written: No space left on device.")

    with monkeypatch.context() as patch:
        patch.setattr(VisualTokenStore, "add", full)
        report = ingest([corpus], store, eyes, visual_tokens="float16", config=IngestConfig(token_bytes_per_write=1))
    assert report.stopped is not None and "No space left" in report.stopped
    assert store.pictures() == {}, "no row without its tokens"
    assert ingest([corpus], store, eyes).stopped is None
    assert token_store(store).keys() == shown(store)


def test_interrupted_filling_keeps_what_is_done(store: IndexStore, eyes: FakeEyes, corpus: Path) -> None:
    class Interrupted(FakeEyes):
        def encode_document_with_visual_tokens(self, items: Sequence[Item], **options: Any) -> Any:
            if self.num_encoded >= 3:
                raise KeyboardInterrupt
            return super().encode_document_with_visual_tokens(items, **options)

    ingest([corpus], store, eyes)
    with pytest.raises(KeyboardInterrupt):
        ingest([corpus], store, Interrupted(), visual_tokens="float16", config=IngestConfig(batch_size=1))
    assert len(token_store(store).keys()) == 3
    assert told(ingest([corpus], store, eyes)).num_added == 2


def test_tokens_do_not_gather_in_memory(store: IndexStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long file is written in one commit; its tokens are not kept until then."""
    (tmp_path / "long.pdf").write_bytes(pdf(["words"] * 40))
    written: list[int] = []
    add = VisualTokenStore.add
    monkeypatch.setattr(
        VisualTokenStore, "add", lambda self, tokens: (written.append(len(tokens)), add(self, tokens))[1]
    )
    config = IngestConfig(batch_size=4, token_bytes_per_write=6 * 48)
    ingest([tmp_path / "long.pdf"], store, FakeEyes(), visual_tokens="float16", config=config)
    assert max(written) <= 6 and sum(written) == 40


KILLED = """
import sys, time
from pathlib import Path
from quarterlight.index import IndexStore
from quarterlight.search.encoder import identity_of
from quarterlight.search.ingest import IngestConfig, ingest
from tests.search.fakes import FakeEyes

class Slow(FakeEyes):
    def encode_document_with_visual_tokens(self, items, **options):
        time.sleep(0.02)
        return super().encode_document_with_visual_tokens(items, **options)

corpus, folder = map(Path, sys.argv[1:])
eyes = Slow()
store = IndexStore.create(folder, identity_of(eyes))
config = IngestConfig(rows_per_commit=6, batch_size=4, token_bytes_per_write=100)
ingest([corpus], store, eyes, visual_tokens="float16", config=config,
       on_progress=lambda done, total: print(done, flush=True))
"""


def test_after_a_kill_no_row_lacks_its_tokens(corpus: Path, tmp_path: Path) -> None:
    for number in range(30):
        write_image(corpus / "many" / f"{number}.png", (8 * number, 0, 0))
    (corpus / "long.pdf").write_bytes(pdf([f"page {number}" for number in range(8)]))
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(corpus), str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    dice = random.Random(0)
    eyes = FakeEyes()
    sizes = []
    for attempt in range(2):
        enough = 15 * attempt + dice.randrange(1, 15)
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert any(int(line) >= enough for line in process.stdout)
            time.sleep(dice.uniform(0, 0.1))
            process.kill()
        store = IndexStore.open(folder, identity_of(eyes))
        assert shown(store) <= token_store(store).keys()
        sizes.append(store.count())
    assert 0 < sizes[0] <= sizes[-1] < 35 + 8
    (corpus / "many" / "29.png").unlink()
    ingest([corpus], store, eyes)
    assert shown(store) == token_store(store).keys() and len(shown(store)) == 5 + 29 + 8


def test_no_tokens_are_asked_of_a_model_that_has_none(store: IndexStore, corpus: Path) -> None:
    """A plain encoder indexes as before, and its vision hash, for which weights are read, is not asked for."""

    class Plain(FakeEyes):
        @property
        def vision_hash(self) -> str:  # type: ignore[override]
            raise AssertionError("was asked for")

    assert ingest([corpus], store, Plain()).visual_tokens is None
    assert not ingest_module._token_store(store, Plain(), None)
