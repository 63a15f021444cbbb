"""``quarterlight search`` as a person and as a program calls it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.search.fakes import FakeEncoder
from tests.search.files import pdf, write_image

from quarterlight.cli.main import program


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with an index of three pictures, two pages and a text."""
    hashes = {"nano": "fa4e" * 16, "other": "07e2" * 16}
    monkeypatch.setattr(
        "quarterlight.models.embedder.Embedder", lambda model, **_: FakeEncoder(model_hash=hashes[model])
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name, colour in {"[red].png": "red", "green.png": "green", os.fsdecode(b"\xff.png"): "blue"}.items():
        write_image(tmp_path / "files" / name, colour)
    (tmp_path / "files" / "a.pdf").write_bytes(pdf(["apples", "pears"], title="Fruit"))
    (tmp_path / "files" / "notes.txt").write_text("roses")
    assert CliRunner().invoke(program(), ["index", "files", "--quiet"]).exit_code == 0
    return tmp_path


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(program(), ["search", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_table() -> None:
    code, out, err = run("red")
    assert (code, err) == (0, "")
    header, first, *_ = out.splitlines()
    assert header.split() == ["#", "score", "kind", "path", "part", "text"]
    assert first.split()[2:] == ["image", "files/[red].png"]
    assert "Fruit: pears" in out and r"\udcff.png" in out


def test_long_names_lose_their_beginning(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(here / "files" / "a long name of a folder" / "another long name" / "holiday.png", "red")
    assert CliRunner().invoke(program(), ["index", "files", "--quiet"]).exit_code == 0
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run("red")
    assert "…/another long name/holiday.png" in out and "a long name of a" not in out
    assert any(line.rstrip().endswith("p. 2  Fruit: pears") for line in out.splitlines())
    assert any(line.rstrip().endswith("§ 1   roses") for line in out.splitlines())


def test_json(here: Path) -> None:
    code, out, _ = run("blue", "--json", "--top-k", "1")
    (hit,) = json.loads(out)["hits"]
    assert code == 0 and hit["path"] == str(here / "files" / os.fsdecode(b"\xff.png"))
    code, out, _ = run("pears", "--json", "--type", "page")
    assert sorted(hit["page"] for hit in json.loads(out)["hits"]) == [1, 2]


def test_picture_place_and_page(here: Path) -> None:
    code, out, err = run("--image", "files/green.png", "--in", "files/green.png", "--html", "found.html")
    assert code == 0 and "1.000" in out and "Wrote found.html." in err
    assert "data:image/webp;base64," in (here / "found.html").read_text()
    assert "Nothing was found" in run("red", "--in", "files/green.png", "--type", "page")[2]


def test_what_is_wrong_is_told_before_a_model_is_loaded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quarterlight.models.embedder.Embedder", None)
    for arguments, told in (
        (("red", "--html", "missing/found.html"), f"missing/found.html cannot be written: there is no folder {here}/"),
        (("red", "--html", "files"), "files cannot be written: it is a folder."),
        (("red", "--in", "elsewhere"), "The index in .quarterlight has nothing of elsewhere: --in takes a file"),
        (("red", "--store", "elsewhere"), "There is no index in elsewhere. Make one with `quarterlight index FOLDER"),
        (("--image", "missing.png"), "Error: missing.png cannot be read: No such file or directory."),
        (("--image", "https://example.com/a.jpg"), "Error: https://example.com/a.jpg is an address, and pictures are"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "") and told in err


def test_words_that_name_a_picture() -> None:
    code, _, err = run("files/green.png", "--top-k", "1")
    assert code == 0 and "files/green.png is taken as words; to look for a picture, give --image and its name." in err
    assert "https://a.b/c.png is taken as words" in run("https://a.b/c.png")[2]
    for words in ("a/b", "files/notes.txt", "x" * 5000, "nul \0"):
        assert run(words)[2] == ""


def test_a_broken_index(here: Path) -> None:
    for piece in (here / ".quarterlight").glob("*.lance/data/*.lance"):
        piece.write_bytes(piece.read_bytes()[:20])
    code, _, err = run("red")
    assert code == 1 and "cannot be read" in err and "If this stays so, delete the folder and index again." in err


@pytest.mark.parametrize(
    "arguments", [(), ("  ",), ("red", "--type", "video"), ("red", "--top-k", "0"), ("red", "--tpye", "page")]
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "give words, --image FILE, or both" in err or "page" in err or "top-k" in err


@pytest.fixture
def pair(here: Path, tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same files in an index of a real model that has a reranker."""
    monkeypatch.undo()  # the model that is none
    monkeypatch.chdir(here)
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["index", "files", "--quiet", "--model", str(tiny_pair), "--store-visual-tokens", "float16"]
    assert CliRunner().invoke(program(), arguments).exit_code == 0
    return tiny_pair


def test_rerank(pair: Path, here: Path) -> None:
    code, out, err = run("red", "--model", str(pair), "--rerank", "4", "--html", "found.html")
    assert (code, err) == (0, "Wrote found.html.\n")
    header, *rows = out.splitlines()
    assert header.split() == ["#", "score", "reranked", "kind", "path", "part", "text"]
    reranked = [float(row.split()[2]) for row in rows[:4]]
    assert (
        len(rows) == 6
        and reranked == sorted(reranked, reverse=True)
        and rows[4].split()[2] in ("image", "page", "text")
    )
    assert "<small>cosine" in (here / "found.html").read_text()

    hits = json.loads(run("red", "--model", str(pair), "--rerank", "4", "--json")[1])["hits"]
    assert [hit["rerank_score"] is None for hit in hits] == [False] * 4 + [True] * 2
    plain = json.loads(run("red", "--model", str(pair), "--json")[1])["hits"]
    assert {hit["rerank_score"] for hit in plain} == {None}
    fused = json.loads(run("red", "--model", str(pair), "--rerank", "6", "--fusion", "0", "--json")[1])["hits"]
    assert [hit["uri"] for hit in fused] == [hit["uri"] for hit in plain]
    named = run("red", "--model", str(pair), "--rerank", "4", "--reranker", str(pair / "reranker"), "--json")[1]
    assert [hit["rerank_score"] for hit in json.loads(named)["hits"]] == [
        pytest.approx(hit["rerank_score"], abs=1e-5) for hit in hits
    ]


def test_what_could_not_be_reranked_is_told(pair: Path, here: Path) -> None:
    for tokens in (here / ".quarterlight").glob("tokens_*.json"):
        tokens.unlink()
    (here / "files" / "green.png").unlink()
    code, out, err = run("green", "--model", str(pair), "--rerank", "6")
    assert code == 0 and "green.png" in out
    assert err == f"{here}/files/green.png: cannot be read: No such file or directory; it was not reranked\n"


def test_a_model_without_a_reranker(here: Path, tiny_checkpoint: Path, pair: Path) -> None:
    code, _, err = run("red", "--model", str(tiny_checkpoint), "--rerank", "4")
    assert code == 1 and "has no reranker inside: name one with --reranker, train one" in err
    for option in (("--fusion", "0.5"), ("--reranker", "x")):
        code, _, err = run("red", *option)
        assert code == 2 and f"{option[0]} does nothing without --rerank" in err


def test_errors_say_what_to_do() -> None:
    code, _, err = run("red", "--model", "other")
    assert code == 1 and "was built with model 'fake' (64 dimensions, hash fa4efa4efa4e)" in err
