from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import pytest
from tests.data.layouts import write_suite

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
    model = SimpleNamespace(dtype="torch.float32", device=SimpleNamespace(type="cpu"), base_model=None)

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
    monkeypatch.setattr(command, "_open", lambda *_: Constant())
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
    name, model_hash, settings, model = "undecided", "dec1de", RerankerSettings(), Constant.model

    def predict(self, pairs: Sequence[tuple[Item, Item]]) -> np.ndarray:
        return np.full(len(pairs), 0.5, dtype=np.float32)


def test_both_orders_beside_each_other(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_open_pair", lambda *_: (Constant(), Undecided()))
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


def test_results_name_the_weights_that_they_were_made_with(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*arguments: str, **settings: Any) -> tuple[list[float], float | None]:
        judge = Undecided()
        judge.settings = RerankerSettings(**settings)
        monkeypatch.setattr(command, "_open_pair", lambda *_: (Constant(), judge))
        report = json.loads(run(FIXTURE / "emoji", "--tasks", "t2i,i2t", "--rerank", "3", "--json", *arguments).stdout)
        return [one["fusion_weight"] for one in report["results"]], report["manifest"]["settings"]["fusion_weight"]

    weights = {"emoji/t2i": 0.2, "i2t": 0.4}
    assert found(fusion_weights=weights) == ([0.2, 0.4], None)
    assert found(fusion_weights=weights | {"emoji/t2i": 0.3}) == ([0.3, 0.4], None)
    assert found("--fusion", "0.5", fusion_weights=weights) == ([0.5, 0.5], 0.5)
    assert found() == ([1.0, 1.0], None)


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


@pytest.fixture
def suite_data(tmp_path: Path) -> Path:
    """The datasets of ``mini``, a few rows each."""
    return write_suite("mini", tmp_path / "data")


def test_a_suite_leaves_its_files_and_prints_its_averages(run: Run, suite_data: Path, tmp_path: Path) -> None:
    arguments = ["--suite", "mini", "--data", suite_data, "--cache", tmp_path / "cache"]
    result = run(*arguments, "--tasks", "t2vd,emoji/t2i", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert next(line for line in lines if line[:1] == ["emoji/t2i"])[1] == "precision@1"
    (average,) = (line for line in lines if line[:1] == ["t2vd"])
    (missing,) = (line for line in lines if line[:1] == ["Overall"])
    assert average[1:5] == ["mean", "of", "2", "tasks"] and missing[3] == "3/25" and missing[-1] == "–"
    assert "Report: " in result.stderr
    for name in ("results.json", "report.md", "report.html", "plots/tasks.svg", "queries/emoji.t2i.parquet"):
        assert (tmp_path / "out" / name).is_file(), name
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"hash": "c0ffee", "dtype": "float32", "device": "cpu"}.items() <= record["model"].items()
    assert [one.name for one in (tmp_path / "cache").iterdir()] == ["float32.cpu"]
    assert record["environment"]["versions"]["python"]
    assert [one["name"] for one in record["tasks"]] == ["emoji/t2i", "jose_pages/t2vd", "wtq_tables/t2vd"]
    for one in record["tasks"]:
        assert one["instructions"]["query"] and one["max_tiles"] and len(one["rows_sha256"]) == 64
    # the same again, from what was kept, as one line of JSON
    again = json.loads(run(*arguments, "--tasks", "t2vd,emoji/t2i", "--out", tmp_path / "out", "--json").stdout)
    assert [one["num_embedded"] for one in again["cost"]] == [0, 0, 0]
    assert (again["tasks"], again["averages"]) == (record["tasks"], record["averages"])

    compared = run("--compare", tmp_path / "out" / "results.json", tmp_path / "out")
    assert compared.exit_code == 0 and "+0.0 to +0.0" in compared.stdout and "t2vd" in compared.stdout
    plain = json.loads(run("--compare", tmp_path / "out", tmp_path / "out", "--json").stdout)
    assert [one["difference"] for one in plain["differences"]] == [0.0] * 4


def test_a_stopped_run_leaves_no_record_of_the_one_before(
    run: Run, suite_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--suite", "mini", "--data", suite_data, "--cache", tmp_path / "cache", "--tasks", "emoji/t2i"]
    assert run(*arguments, "--out", tmp_path / "out").exit_code == 0

    class Stopped(Constant):
        model_hash = "c0ffee-too"

        def encode_query(self, items: Sequence[Item]) -> np.ndarray:
            raise InputError("Stopped.")

    monkeypatch.setattr(command, "_open", lambda *_: Stopped())
    assert run(*arguments, "--out", tmp_path / "out").exit_code == 1
    assert (tmp_path / "out/queries/emoji.t2i.parquet").is_file() and not (tmp_path / "out/results.json").exists()
    compared = run("--compare", tmp_path / "out", tmp_path / "out")
    assert compared.exit_code == 1 and "results.json" in compared.stderr


def test_checkpoints_of_one_name_have_folders_of_their_own(
    run: Run, suite_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--suite", "mini", "--data", suite_data, "--cache", tmp_path / "cache", "--tasks", "emoji/t2i"]
    first = run(*arguments, "--model", "a/final")
    assert first.exit_code == 0 and "mean of 1/5 tasks" in first.stdout
    assert "mean of 0/" not in first.stdout, "averages of which no task was asked for"
    assert "not the benchmark's numbers" not in first.stdout
    monkeypatch.setattr(Constant, "model_hash", "0123456789abcdef")
    assert run(*arguments, "--model", "b/final").exit_code == 0
    assert sorted(one.name for one in Path("evaluations").iterdir()) == ["mini.final.01234567", "mini.final.c0ffee"]


def test_a_suite_with_a_real_pair(run: Run, suite_data: Path, tmp_path: Path, tiny_pair: Path) -> None:
    more = ["--data", suite_data, "--cache", tmp_path / "cache", "--out", tmp_path / "out", "--device", "cpu", "--json"]
    result = run("--suite", "mini", "--tasks", "emoji/t2i", "--model", tiny_pair, "--rerank", "3", *more)
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    (one,) = record["tasks"]
    assert one["reranked"] is not None and record["reranker"]["hash"] and record["settings"]["rerank"] == 3
    assert (tmp_path / "out" / "runs" / "emoji.t2i.reranked.trec").is_file()
    assert record["reranker"]["dtype"] == record["model"]["dtype"] == "float32"
    compared = run("--compare", tmp_path / "out", tmp_path / "out")
    assert compared.exit_code == 0 and "precision@1, reranked" in compared.stdout and "!" not in compared.stderr
    record["tasks"][0]["instructions"]["query"] = ["Find something else."]
    (tmp_path / "out" / "other.json").write_text(json.dumps(record))
    compared = run("--compare", tmp_path / "out", tmp_path / "out" / "other.json")
    assert compared.exit_code == 0 and "not asked the same" in compared.stderr
    assert "(emoji/t2i: instructions)" in " ".join(compared.stderr.split())


def test_a_suite_stops_at_once_when_data_is_missing(run: Run, suite_data: Path, tmp_path: Path) -> None:
    (suite_data / "emoji" / "queries" / "t2i.test.jsonl").unlink(missing_ok=True)
    for file in (suite_data / "emoji" / "queries").glob("t2i.test.*"):
        file.unlink()
    more = ["--suite", "mini", "--data", suite_data, "--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    result = run(*more)
    assert result.exit_code == 1 and "1 of 25 tasks cannot be read" in result.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()
    result = run(*more, "--skip-missing", "--limit", "1")
    assert result.exit_code == 0 and "emoji/t2i is left out" in result.stderr
    assert "at most 1 queries of each task: not the benchmark's numbers" in result.stdout
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "emoji/t2i was not run" in report and "t2i (1 of 5 missing)" in report


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--suite", "mimi"], 1, "Did you mean 'mini'"),
        (["--suite", "mini", "--tasks", "emoji/t2x"], 1, "no task or group 'emoji/t2x'"),
        (["--suite", "mini", "--split", "val"], 2, "does not go with --split"),
        ([FIXTURE, "--suite", "mini"], 2, "does not go with dataset folders"),
        (["--suite", "mini", "--data", "gone"], 1, "25 of 25 tasks cannot be read"),
        ([], 2, "Name a dataset folder, or a benchmark with --suite"),
        ([FIXTURE, "--out", "here"], 2, "--out does nothing without --suite"),
        (["--compare", "gone.json", "gone.json"], 1, "is not the results.json"),
    ],
)
def test_wrong_use_of_suites(run: Run, arguments: list[str | Path], code: int, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_data_names_a_folder_too(run: Run) -> None:
    assert "emoji, test" in run("--data", FIXTURE, "--tasks", "t2i").stdout
