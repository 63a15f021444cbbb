"""``quarterlight index`` as a person and as a program calls it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.search.fakes import FakeEncoder, FakeEyes
from tests.search.files import pdf, write_image

from quarterlight.cli.main import program


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a model that needs no weights."""
    monkeypatch.setattr("quarterlight.models.embedder.Embedder", lambda model, quantization: FakeEncoder())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(program(), ["index", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_summary(here: Path) -> None:
    write_image(here / "files" / "a.png", "red")
    (here / "files" / "b.pdf").write_bytes(pdf(["one", "two"]))
    code, out, err = run("files")
    assert (code, out) == (0, "")
    assert "2 new" in err and "3 pictures, pages and sections in .quarterlight" in err
    assert (here / ".quarterlight").is_dir()
    assert "2 unchanged" in run(".")[2], "the default store is not walked"


def test_problems_count_only_when_strict(here: Path) -> None:
    write_image(here / "files" / "good.png", "red")
    (here / "files" / "two\nlines [red].png").write_bytes(b"")
    code, _, err = run("files")
    assert code == 0
    assert rf"{here}/files/two\nlines [red].png: is empty (0 bytes): expected a picture" in err.splitlines()
    assert "1 not indexed" in err
    assert run("files", "--strict")[0] == 1
    code, _, err = run("files", "--strict", "--quiet")
    assert code == 1 and len(err.splitlines()) == 1


def test_json(here: Path) -> None:
    write_image(here / "files" / "a.png", "red")
    name = os.fsdecode(b"caf\xe9\n.png")
    (here / "files" / name).write_bytes(b"")
    code, out, err = run("files", "--json")
    assert (code, err) == (0, "")
    summary = json.loads(out)
    assert summary["new"] == 1 and summary["num_rows"] == 1 and summary["model"] == "fake"
    assert summary["problems"] == [
        {"path": str(here / "files" / name), "reason": "is empty (0 bytes): expected a picture"}
    ]


def test_visual_tokens(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quarterlight.models.embedder.Embedder", lambda model, quantization: FakeEyes())
    for colour in ("red", "green"):
        write_image(here / "files" / f"{colour}.png", colour)
    assert "Visual tokens" not in run("files")[2]
    code, out, err = run("files", "--store-visual-tokens", "float16")
    assert (code, out) == (0, "") and "2 unchanged" in err
    assert "Visual tokens: 2 added; 2 pictures and pages, 48 bytes each as float16, 96 bytes in all." in err
    (here / "files" / "red.png").unlink()
    err = run("files")[2]
    assert "Visual tokens: 1 removed; 1 pictures and pages" in err
    assert "Visual tokens: kept up to date; 1 pictures and pages" in run("files")[2]
    tokens = json.loads(run("files", "--store-visual-tokens", "int8", "--json")[1])["visual_tokens"]
    assert tokens == {"precision": "int8", "num_added": 1, "num_removed": 0, "num_items": 1, "num_bytes": 48}
    code, _, err = run("files", "--store-visual-tokens", "int4")
    assert code == 2 and "int8" in err


def test_what_does_not_exist(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(here / "files" / "a.png", "red")
    assert run("files", "--quiet")[0] == 0
    monkeypatch.setattr("quarterlight.models.embedder.Embedder", None)  # is not reached
    code, out, err = run("files", "missing")
    assert (code, out) == (1, "")
    assert "missing cannot be indexed: No such file or directory." in err


def test_what_was_deleted(here: Path) -> None:
    for name in ("one", "two"):
        write_image(here / "files" / name / f"{name}.png", "red")
    assert run("files")[0] == 0
    shutil.rmtree(here / "files" / "one")
    code, _, err = run("files/one")
    assert code == 0 and "Files: 1 deleted." in err and "1 pictures, pages" in err


def test_copies_are_told_from_moves(here: Path) -> None:
    write_image(here / "files" / "a.png", "red")
    run("files")
    shutil.copy(here / "files" / "a.png", here / "files" / "b.png")
    assert "Files: 1 copied, 1 unchanged." in run("files")[2]
    assert json.loads(run("files", "--json")[1])["copied"] == 0


def test_nothing_indexed_is_a_failure(here: Path) -> None:
    (here / "empty").mkdir()
    code, _, err = run("empty")
    assert code == 1 and "There was nothing to index." in err
    (here / "big.txt").write_bytes(b"a" * (16 * 2**20 + 1))
    code, _, err = run("big.txt", "--json")
    assert code == 1
    write_image(here / "files" / "a.png", "red")
    assert run("files")[0] == 0
    code, _, err = run("files", "big.txt")
    assert code == 1 and "big.txt: is larger than 16 MB, too large for a text" in err, "named, and not indexed"
    assert run("empty", "files")[0] == 0
    (here / "half.pdf").write_bytes(pdf(["one", None]))
    code, _, err = run("half.pdf")
    assert code == 0 and "page 2 of 2 cannot be read" in err


def test_store_that_cannot_be_made(here: Path) -> None:
    (here / "file").write_text("")
    code, _, err = run(".", "--store", "file")
    assert code == 1 and "cannot be written" in err


def test_stopped_by_a_full_disk(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quarterlight.errors import StoreError
    from quarterlight.index import IndexStore

    def full(*arguments: object, **options: object) -> None:
        raise StoreError("The index in x cannot be written: No space left on device.")

    monkeypatch.setattr(IndexStore, "upsert", full)
    write_image(here / "files" / "a.png", "red")
    code, _, err = run("files")
    assert code == 1 and "Stopped: The index in x cannot be written: No space left on device." in err
    code, out, _ = run("files", "--json")
    assert code == 1 and "No space left" in json.loads(out)["stopped"]


def test_help() -> None:
    code, out, _ = run("--help")
    assert code == 0 and "quarterlight index ~/Pictures" in out and "./.quarterlight" in out
