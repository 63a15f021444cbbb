"""``quarterlight embed`` and what takes up its shards, as a person and as a program call them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.search.fakes import FakeEncoder
from tests.search.files import pdf, write_image

from quarterlight.cli.main import program


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a few files, and a model that needs no weights."""
    monkeypatch.setattr("quarterlight.models.embedder.Embedder", lambda model, quantization: FakeEncoder())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_image(tmp_path / "files" / "a.png", "red")
    (tmp_path / "files" / "b.pdf").write_bytes(pdf(["one", "two"]))
    (tmp_path / "files" / "bad.png").write_bytes(b"")
    (tmp_path / "list.jsonl").write_text('{"id": "x", "text": "a blue thing"}\n')
    return tmp_path


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(program(), arguments)
    return result.exit_code, result.stdout, result.stderr


def test_from_files_to_hits(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("embed", "files", "list.jsonl", "--out", "shards", "--precision", "float16")
    assert (code, out) == (0, "")
    assert "bad.png: is empty (0 bytes)" in err and "Items: 4 looked at; 1 not embedded" in err
    assert "Embeddings: 4 as float16 (512 bytes) in 1 shards in shards" in err
    summary = json.loads(run("embed", "files", "list.jsonl", "--out", "shards", "--json")[1])
    assert (summary["num_items"], summary["num_embedded"], summary["num_rows"]) == (4, 1, 4)
    assert summary["precision"] == "float16" and summary["problems"][0]["path"] == str(here / "files" / "bad.png")
    assert run("embed", "files", "list.jsonl", "--out", "shards", "--strict", "--quiet")[0] == 1

    monkeypatch.setattr("quarterlight.models.embedder.Embedder", None)  # loading needs no model
    code, out, err = run("index", "--from", "shards")
    assert (code, out) == (0, "") and "bad.png" in err
    assert "Loaded: 4 rows of 2 shards." in err and "4 pictures, pages and sections in .quarterlight" in err
    assert "vectors as float16 512 bytes" in err
    loaded = json.loads(run("index", "--from", "shards", "--json", "--store", "s", "--precision", "binary")[1])
    assert (loaded["num_rows"], loaded["precision"], loaded["num_bytes"]) == (4, "binary", 32)

    monkeypatch.setattr("quarterlight.models.embedder.Embedder", lambda model, quantization: FakeEncoder())
    assert json.loads(run("search", "blue", "--json")[1])["hits"][0]["title"] == "x"


def test_precision_of_an_index(here: Path) -> None:
    assert "vectors as int8 216 bytes" in run("index", "files", "--precision", "int8")[2]
    assert json.loads(run("search", "red", "--json")[1])["hits"][0]["path"] == str(here / "files" / "a.png")
    code, _, err = run("index", "files", "--precision", "float32")
    assert code == 1 and "an index cannot mix the two" in err
    assert "vectors as int8" in run("index", "files")[2]


def test_quantised_weights_are_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = {None: "fa4e" * 16, "int8": "07e2" * 16}
    monkeypatch.setattr(
        "quarterlight.models.embedder.Embedder",
        lambda model, quantization: FakeEncoder(model_hash=hashes[quantization]),
    )
    int8 = ("--quantization", "int8")
    assert run("embed", "files", "--out", "shards", *int8)[0] == 0
    code, _, err = run("index", "--from", "shards")
    assert code == 0, err
    assert "unchanged" in run("index", "files", *int8)[2]
    assert run("search", "red")[0] == 1
    code, out, _ = run("search", "red", "--json", *int8)
    assert code == 0 and json.loads(out)["hits"]
    code, _, err = run("search", "red", "--quantization", "int3")
    assert code == 2 and "int3" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["index"], "Nothing to index"),
        (["index", "files", "--from", "shards"], "do not go together"),
        (["index", "--from", "shards", "--quantization", "int8"], "do not go together"),
        (["index", "files", "--workers", "2"], "--workers does nothing without --ray"),
        (["index", "files", "--ray", "local", "--store-visual-tokens", "int8"], "do not go together"),
        (["embed", "files", "--out", "o", "--workers", "2"], "--workers does nothing without --ray"),
        (["embed", "files"], "--out"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2 and words in " ".join(err.split())


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run("embed", "files", "--out", "o", "--ray", "local")
    assert code == 1 and "pip install -e '.[ray]'" in err


def test_help() -> None:
    code, out, _ = run("embed", "--help")
    assert code == 0 and "quarterlight embed catalogue.jsonl" in out and "--ray" in out
