"""The demo: from example files to a page of results, with a model that knows nothing and with nano."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pytest

from quarterlight.cli import demo, main
from quarterlight.errors import CheckpointError
from quarterlight.index import IndexStore
from quarterlight.models.embedder import Embedder
from quarterlight.search.encoder import identity_of
from quarterlight.search.ingest import ingest
from quarterlight.search.retrieve import Searcher

EXAMPLES = demo.CHECKOUT / "examples"
MAX_BYTES = 8 * 2**20
FOUND = 0.8
"""Share of the questions whose answer nano must show among the first results."""


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["quarterlight", "demo", *arguments])
    with pytest.raises(SystemExit) as left:
        main.main()
    return int(left.value.code or 0)


@pytest.fixture
def few_examples(tmp_path: Path) -> Path:
    """The files that the questions name."""
    questions = [question for group in demo.QUESTIONS.values() for question in group]
    for name in {name for question in questions for name in (question.image, question.answer) if name}:
        copy = tmp_path / "few examples" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((EXAMPLES / name).read_bytes())
    return tmp_path / "few examples"


def test_demo_searches_in_four_ways_and_writes_a_page(
    few_examples: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--examples", str(few_examples), "--model", str(tiny_checkpoint), "--out", "result page.html"]
    assert run(*arguments, monkeypatch=monkeypatch, folder=tmp_path) == 0
    captured = capsys.readouterr()
    for heading in demo.QUESTIONS:
        assert heading in captured.out
    assert f"--store .quarterlight-demo --model {tiny_checkpoint}" in captured.err
    html = (tmp_path / "result page.html").read_text(encoding="utf-8")
    assert html.count("<section>") == sum(map(len, demo.QUESTIONS.values()))
    assert set(re.findall(r'(?:src|href)="(\w+):', html)) == {"data", "file"}


def test_demo_shows_both_orders_of_a_pair(
    few_examples: Path,
    tiny_pair: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--examples", str(few_examples), "--model", str(tiny_pair)]
    assert run(*arguments, monkeypatch=monkeypatch, folder=tmp_path) == 0
    shown = capsys.readouterr().out
    questions = sum(map(len, demo.QUESTIONS.values()))
    assert shown.count(demo.RERANKED) == questions
    html = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert html.count("<section>") == questions and html.count(f"<h3>{demo.RERANKED}</h3>") == questions
    assert "<small>cosine" in html
    assert [*(tmp_path / ".quarterlight-demo").glob("tokens_*.lance")]


def test_query_picture_is_not_its_own_answer(
    few_examples: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    question = demo.Question(image="emoji/noto/woman-firefighter.webp", answer="emoji/twemoji/woman-firefighter.webp")
    monkeypatch.setattr(demo, "QUESTIONS", {"A picture to pictures": (question,)})
    assert (
        run("--examples", str(few_examples), "--model", str(tiny_checkpoint), monkeypatch=monkeypatch, folder=tmp_path)
        == 0
    )
    _, _, rows = capsys.readouterr().out.partition(question.title)
    assert len(rows.strip().splitlines()) == 1 + demo.TOP_K and str(question.image) not in rows


def test_missing_examples_are_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--examples", "nowhere", monkeypatch=monkeypatch, folder=tmp_path) == 1
    assert capsys.readouterr().err.startswith("Error: There are no example files in ")
    (tmp_path / "empty").mkdir()
    assert run("--examples", "empty", monkeypatch=monkeypatch, folder=tmp_path) == 1
    assert capsys.readouterr().err.startswith("Error: There are no example files in ")


def test_a_page_that_cannot_be_written_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--out", "nowhere/d.html", monkeypatch=monkeypatch, folder=tmp_path) == 1
    assert capsys.readouterr().err.startswith("Error: nowhere/d.html cannot be written: there is no folder ")
    assert not (tmp_path / ".quarterlight-demo").exists(), "nothing was done before"


def test_nano_answers_the_questions(tmp_path: Path) -> None:
    try:
        nano = Embedder("nano")
    except CheckpointError:
        pytest.skip("nano has not been trained yet")
    table = IndexStore.create(tmp_path / "store", identity_of(nano))
    ingest([EXAMPLES], table, nano)
    searcher = Searcher(table, nano)
    questions = [question for group in demo.QUESTIONS.values() for question in group]
    missed = []
    for question in questions:
        _, hits = demo.ask(searcher, question, EXAMPLES)
        if EXAMPLES / question.answer not in [hit.path for hit in hits]:
            missed.append(question.title)
    assert len(missed) <= (1 - FOUND) * len(questions), missed


def test_examples_are_small_and_every_picture_has_a_source() -> None:
    files = [path for path in EXAMPLES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    listed = set()
    for table in EXAMPLES.rglob("SOURCES.csv"):
        with table.open(encoding="utf-8", newline="") as lines:
            listed |= {table.parent / row["file"] for row in csv.DictReader(lines)}
    assert {path for path in files if path.suffix in (".webp", ".png")} == listed
    for folder in {path.parent for path in files if path.suffix in (".webp", ".png", ".pdf", ".md", ".txt")} - {
        EXAMPLES
    }:
        licensed = [*folder.glob("LICENSE*"), *folder.parent.glob("LICENSE*")]
        assert licensed, f"{folder} has no licence"
