"""``quarterlight bench search`` on a small table, above and below the size from which there is a vector index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from quarterlight.cli.main import program
from quarterlight.index import store


def test_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_FLAT_ROWS", 500)
    arguments = ["bench", "search", "--rows", "300", "--rows", "1000", "--dimension", "16", "--queries", "5"]
    result = CliRunner().invoke(program(), [*arguments, "--out", str(tmp_path / "results" / "search.json")])
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record == json.loads((tmp_path / "results" / "search.json").read_text())
    assert [one["rows"] for one in record["latencies"]] == [300, 1000]
    for one in record["latencies"]:
        assert one["recall_at_10"] >= 0.9 and one["filtered_recall_at_10"] >= 0.9
        assert 0 < one["p50_ms"] <= one["p95_ms"]
