"""``quarterlight bench search`` on a small table, above and below the size from which there is a vector index."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from quarterlight.cli import bench_search
from quarterlight.cli.main import program
from quarterlight.index import VECTOR_PRECISIONS, ModelIdentity, Row, store
from quarterlight.index.shards import ShardFolder


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


def test_precisions_and_real_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelIdentity(name="m", hash="ab" * 32, dimension=16)
    vectors = np.random.default_rng(0).normal(size=(160, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    row = Row(uri="file:///a", kind="image", part=0, size=1, mtime_ns=1, content_hash="c")
    folder = ShardFolder.create(tmp_path / "shards", model)
    folder.write("a", [row] * 160, vectors, ids=["x"] * 160, pieces=["a"] * 160, done=["a"], failed=[], problems=[])
    arguments = ["bench", "search", "--from", str(tmp_path / "shards"), "--queries", "5"]
    for precision in VECTOR_PRECISIONS:
        arguments += ["--precision", precision]
    result = CliRunner().invoke(program(), arguments)
    assert result.exit_code == 0, result.stderr
    latencies = json.loads(result.stdout.splitlines()[-1])["latencies"]
    assert [one["precision"] for one in latencies] == list(VECTOR_PRECISIONS)
    assert all(one["rows"] == 150 for one in latencies)
    assert [round(one["vector_mb"] * 2**20) for one in latencies] == [9600, 4800, 2700, 300]
    assert latencies[0]["recall_at_10"] == 1 and latencies[2]["recall_at_10"] >= 0.9
    few = CliRunner().invoke(program(), [*arguments[:4], "--queries", "80"])
    record = json.loads(few.stdout.splitlines()[-1])
    assert (record["settings"]["queries"], record["latencies"][0]["rows"]) == (25, 110)
    monkeypatch.setattr(bench_search, "LEAST_ROWS", 159)
    result = CliRunner().invoke(program(), arguments[:4])
    assert result.exit_code == 1 and "has 160 distinct vectors, and a search cannot be timed on fewer" in result.stderr
