"""Memory of few and many items, in the real processes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from quarterlight.cli.main import program


def test_record(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    arguments = ["bench", "memory", "--items", "20", "--items", "10", "--model", str(tiny_checkpoint)]
    result = CliRunner().invoke(program(), arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout.splitlines()[-1])
    assert [run["items"] for run in record["runs"]] == [10, 20]
    for run in record["runs"]:
        assert run["peak_mb"] is None or 100 < run["more_mb"] + 100 < run["peak_mb"]
    assert record["growth"] is None or 0.7 < record["growth"] < 1.5
