from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from quarterlight.cli.main import program

FIXTURE = Path(__file__).parents[1] / "fixtures" / "retrieval"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs ``quarterlight mine`` with the tiny model and these arguments: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            program()(args=["mine", "--model", str(tiny_checkpoint), *map(str, arguments)], prog_name="quarterlight")
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


def test_tables_and_files(run: Any, tmp_path: Path) -> None:
    code, out, err = run("--data", FIXTURE, "--tasks", "t2i,it2t", "--out", tmp_path)
    assert code == 0
    assert sorted(file.name for file in tmp_path.glob("*.parquet")) == ["easy_vqa.it2t.parquet", "emoji.t2i.parquet"]
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("emoji", "easy_vqa"))}
    assert rows["easy_vqa/it2t"] == ["82", "13", "164", "0", "0", "1.000"]
    assert "easy_vqa/it2t: 82 queries have fewer than 50 candidates, of which the last ones were taken." in err
    assert set(pq.read_table(tmp_path / "easy_vqa.it2t.parquet")["rank"].to_pylist()) == {11, 12}


def test_top_as_json(run: Any, tmp_path: Path) -> None:
    arguments = ("--data", FIXTURE / "easy_vqa", "--top", "--depth", "5", "--sample", "0", "--out", tmp_path, "--json")
    code, out, err = run(*arguments)
    assert code == 0 and not err
    said = json.loads(out)
    assert said["recipe"]["window"] is said["recipe"]["sample"] is None
    assert said["tasks"][0]["num_mined"] == 82 * 5
    assert pq.read_table(tmp_path / "easy_vqa.it2t.parquet")["rank"].to_pylist()[:6] == [1, 2, 3, 4, 5, 1]


def test_mistakes_are_sentences(run: Any, tmp_path: Path) -> None:
    code, _, err = run("--data", FIXTURE, "--window", "5", "500", "--out", tmp_path / "out")
    assert code == 1 and "window must be a first and a last rank from 1 to depth (100)" in err
    code, _, err = run("--data", FIXTURE, "--tasks", "t2x", "--out", tmp_path / "out")
    assert code == 1 and "No dataset has a task 't2x'" in err
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    code, _, err = run("--data", FIXTURE / "emoji", "--out", tmp_path / "out", "--cache", tmp_path / "file" / "cache")
    assert code == 1 and "Mining cannot go on: Not a directory" in err
