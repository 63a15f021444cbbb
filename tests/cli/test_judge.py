from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quarterlight.cli.main import program
from quarterlight.data.retrieval import RetrievalDataset

Run: TypeAlias = "Callable[..., tuple[int, str, str]]"

FIXTURE = Path(__file__).parents[1] / "fixtures" / "retrieval"


@pytest.fixture
def retrieved(tmp_path: Path) -> Path:
    task = RetrievalDataset(FIXTURE / "emoji").load("t2i", "train")
    rows = [
        (query.qid, one.did) for query in task.queries for one in task.candidates[:5] if one.did not in query.positives
    ]
    qids, dids = map(list, zip(*rows, strict=True))
    (tmp_path / "retrieved").mkdir()
    pq.write_table(pa.table({"qid": qids, "did": dids}), tmp_path / "retrieved" / "emoji.t2i.parquet")
    return tmp_path / "retrieved"


@pytest.fixture
def judge(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``quarterlight judge`` with these arguments: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            program()(args=["judge", *map(str, arguments)], prog_name="quarterlight")
        out, err = capsys.readouterr()
        return left.value.code, out, err  # type: ignore[return-value]

    return call


def test_counts_are_printed_and_files_written(judge: Run, retrieved: Path, tmp_path: Path) -> None:
    out = tmp_path / "judged"
    code, stdout, stderr = judge("--data", FIXTURE, "--retrieved", retrieved, "--out", out)
    assert code == 0 and stdout.split()[:2] == ["task", "pairs"] and "emoji/t2i" in stdout
    assert "report.html" in stderr and (out / "report.html").is_file()
    code, stdout, again = judge("--data", FIXTURE / "emoji", "--retrieved", retrieved, "--out", out, "--json")
    counts = json.loads(stdout)["emoji/t2i"]
    assert counts["yes"] == 0 and "The labels call nothing of this relevant" in stderr and again == stderr
    pairs = pq.read_metadata(retrieved / "emoji.t2i.parquet").num_rows
    assert code == 0 and sum(counts.values()) == pairs and set(counts) == {"yes", "no", "undecided", "failed"}


def test_mistakes_are_one_line(judge: Run, retrieved: Path, tmp_path: Path) -> None:
    usual = ("--data", FIXTURE, "--retrieved", retrieved, "--out", tmp_path / "judged")
    for more, message in {
        ("--task", "emoji/t2j"): "has no 'emoji/t2j' with a split 'train'",
        ("--task", "emoji/i2t"): "emoji.i2t.parquet",
        ("--backend", "endpoint"): "needs model",
        ("--instruction", "what"): "--instruction takes dataset/task=words, got 'what'",
    }.items():
        code, _, stderr = judge(*usual, *more)
        assert code == 1 and message in stderr and stderr.count("\n") == 1
    code, _, stderr = judge("--data", FIXTURE, "--retrieved", tmp_path, "--out", tmp_path / "judged")
    assert code == 1 and "run quarterlight mine first" in stderr
