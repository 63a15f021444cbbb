from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest

from quarterlight.cli import evaluate as command
from quarterlight.cli.main import program
from quarterlight.errors import InputError
from quarterlight.images import load_image
from quarterlight.models.settings import EmbedderSettings, RerankerSettings
from quarterlight.records import Item

Run: TypeAlias = "Callable[..., Outcome]"

FIXTURE = Path(__file__).parents[1] / "fixtures" / "retrieval"


class Constant:
    name, model_hash, dimension, settings = "constant", "c0ffee", 4, EmbedderSettings()

    def encode_query(self, items: Sequence[Item]) -> np.ndarray:
        for position, item in enumerate(items):
            for source in item.images:
                try:
                    load_image(source)
                except InputError as error:
                    raise InputError(f"Item {position}: {error}") from error
        return np.full((len(items), 4), 0.5, dtype=np.float32)

    encode_document = encode_query


@pytest.fixture(autouse=True)
def constant_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_open", lambda model, device: Constant())
    monkeypatch.setenv("COLUMNS", "200")


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``quarterlight evaluate`` with these arguments."""

    def call(*arguments: str | Path) -> Outcome:
        with pytest.raises(SystemExit) as left:
            program()(args=["evaluate", *map(str, arguments)], prog_name="quarterlight")
        out, err = capsys.readouterr()
        return Outcome(int(left.value.code or 0), out, err)

    return call


def test_table(run: Run) -> None:
    result = run(FIXTURE)
    assert result.exit_code == 0, result.stderr
    for word in ("easy_vqa, test", "emoji, test", "it2i", "by lang", "by text_kind", "    skin_tone ", "NDCG@5"):
        assert word in result.stdout, word
    english = next(line for line in result.stdout.splitlines() if line.startswith("    en "))
    assert english.split()[-1] == english.split()[-6]  # a constant model scores chance


def test_json(run: Run) -> None:
    result = run(FIXTURE / "emoji", "--tasks", "t2i,it2i", "--limit", "8", "--by", "lang", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [r["task"] for r in report["results"]] == ["t2i", "it2i"]
    assert [r["num_queries"] for r in report["results"]] == [8, 4]
    assert {group["field"] for r in report["results"] for group in r["groups"]} == {"lang"}
    manifest = report["manifest"]
    assert {"name": "constant", "hash": "c0ffee", "dimension": 4}.items() <= manifest["model"].items()
    assert manifest["model"]["settings"]["instructions"]["document"]["image"] == "Represent the given image."
    assert manifest["settings"]["split"] == "test"
    assert list(manifest["inputs_sha256"][str(FIXTURE / "emoji")]) == ["t2i", "it2i"]
    assert manifest["versions"]["python"]


class Undecided:
    name, model_hash, settings = "undecided", "dec1de", RerankerSettings()

    def predict(self, pairs: Sequence[tuple[Item, Item]]) -> np.ndarray:
        return np.full(len(pairs), 0.5, dtype=np.float32)


def test_both_orders_beside_each_other(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_open_pair", lambda model, reranker, device: (Constant(), Undecided()))
    result = run(FIXTURE / "emoji", "--tasks", "t2i", "--rerank", "3")
    assert result.exit_code == 0, result.stderr
    assert "+R: with the first 3 reranked" in result.stdout
    header = next(line for line in result.stdout.splitlines() if line.startswith("task "))
    assert " ".join(header.split()) == "task queries pool P@1 +R R@5 +R R@10 +R NDCG@5 +R MRR +R chance"
    (row,) = (line for line in result.stdout.splitlines() if line.startswith("t2i "))
    assert len(row.split()) == len(header.split())

    report = json.loads(run(FIXTURE / "emoji", "--tasks", "t2i", "--rerank", "3", "--fusion", "0.5", "--json").stdout)
    (scored,) = report["results"]
    assert scored["reranked"]["metrics"].keys() == scored["scores"]["metrics"].keys() and scored["num_reranked"] == 3
    manifest = report["manifest"]
    assert {"rerank": 3, "fusion_weight": 0.5}.items() <= manifest["settings"].items()
    assert (manifest["reranker"]["name"], manifest["reranker"]["hash"]) == ("undecided", "dec1de")


def test_a_real_pair(run: Run, tiny_pair: Path, tiny_checkpoint: Path) -> None:
    arguments = [FIXTURE / "emoji", "--tasks", "t2i", "--limit", "2", "--device", "cpu", "--json"]
    report = json.loads(run(*arguments, "--model", tiny_pair, "--rerank", "3").stdout)
    assert report["results"][0]["num_pairs"] == 6
    other = run(*arguments, "--model", tiny_checkpoint, "--reranker", tiny_pair, "--rerank", "3")
    assert json.loads(other.stdout)["results"][0]["reranked"] == report["results"][0]["reranked"]
    result = run(*arguments, "--model", tiny_checkpoint, "--rerank", "3")
    assert result.exit_code == 1 and "has no reranker inside" in result.stderr
    result = run(*arguments, "--fusion", "0.5")
    assert result.exit_code == 2 and "--fusion does nothing without --rerank" in result.stderr


def test_bad_pictures_are_named_and_counted(run: Run, tmp_path: Path) -> None:
    shutil.copytree(FIXTURE / "emoji", tmp_path / "emoji")
    shutil.unpack_archive(tmp_path / "emoji" / "images.zip", tmp_path / "emoji" / "images")
    (tmp_path / "emoji" / "images.zip").unlink()
    bad = json.loads((FIXTURE / "emoji/queries/i2t.test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    (tmp_path / "emoji" / "images" / bad["query_img_path"]).write_bytes(b"")
    result = run(tmp_path / "emoji", "--tasks", "i2t")
    assert result.exit_code == 0, result.stderr
    assert "10/11" in result.stdout
    assert f"i2t, {bad['qid']}: " in result.stderr and bad["query_img_path"] in result.stderr.replace("\n", "")
    assert "emoji: 1 queries and candidates could not be scored" in result.stderr


def test_a_dataset_without_the_task_is_left_out_aloud(run: Run) -> None:
    result = run(FIXTURE, "--tasks", "it2t")
    assert result.exit_code == 0
    assert "emoji has no such task" in result.stderr
    assert "easy_vqa, test" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "tset"], "Did you mean 'test'"),
        (["--tasks", "t2i,t2x"], "No dataset has a task 't2x'"),
        (["--by", "language"], "No query has a field 'language'"),
    ],
)
def test_misspelt(run: Run, arguments: list[str], message: str) -> None:
    result = run(FIXTURE, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr


def test_not_a_dataset(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "neither is a retrieval dataset" in result.stderr


def test_help_shows_an_example(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "quarterlight evaluate data/emoji" in result.stdout
