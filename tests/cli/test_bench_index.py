"""``quarterlight bench index`` on a handful of generated files, with the real command in a process of its own."""

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
    arguments = ["bench", "index", "--images", "6", "--pages", "0", "--model", str(tiny_checkpoint)]
    result = CliRunner().invoke(program(), arguments)
    assert result.exit_code == 0, result.stderr
    (run,) = json.loads(result.stdout.splitlines()[-1])["runs"]
    assert (run["corpus"], run["rows"], run["problems"]) == ("6 pictures", 6, 0)
    assert run["rows_per_s"] == pytest.approx(6 / run["seconds"]) and run["peak_mb"] > 50


def test_folder_that_cannot_be_indexed(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    result = CliRunner().invoke(
        program(), ["bench", "index", str(tmp_path / "missing"), "--model", str(tiny_checkpoint)]
    )
    assert result.exit_code == 1 and "cannot be indexed" in result.stderr
