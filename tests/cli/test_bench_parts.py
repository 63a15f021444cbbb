"""Where the time goes: parts add up, timing them changes nothing, and the picture shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from quarterlight.cli import bench_infer, bench_parts
from quarterlight.cli.bench_parts import LANGUAGE, NORMALISING, PARTS, READING, REST, TILES, TOWER, Clock, timing
from quarterlight.cli.main import program
from quarterlight.models.embedder import Embedder
from quarterlight.records import Item


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(program(), ["bench", "parts", *arguments])


def test_parts_within_parts_add_up() -> None:
    clock = Clock(iter([0.0, 1.0, 3.0, 3.0, 4.0, 4.5, 7.0, 10.0]).__next__)
    with clock.part("all"):  # 0 to 10
        with clock.part("a"):  # 1 to 3
            pass
        with clock.part("b"):  # 3 to 7
            clock.timed("a", lambda: None)()  # 4 to 4.5
    assert clock.num_entered == 4
    assert clock.take() == {"a": 2.5, "b": 3.5, "all": 4.0}
    assert not clock.seconds


def test_timing_changes_nothing_and_leaves_nothing(tiny_checkpoint: Path, picture: Any) -> None:
    embedder = Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu", num_workers=0)
    items = [Item(text="words"), Item(image=picture(1)), Item(image=picture(2, 160, 160), max_tiles=4)]
    expected = embedder.encode_document(items)
    ticks = iter(range(10_000))
    clock = Clock(lambda: float(next(ticks)))
    with timing(embedder, clock), clock.part(REST):
        timed = embedder.encode_document(items)
    np.testing.assert_array_equal(timed, expected)
    assert set(clock.take()) == set(PARTS), "every part was reached"
    embedder.encode_document(items)
    assert not clock.seconds, "and none is timed afterwards"


def test_record_and_picture(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_parts, "ceiling_of", lambda *_: {"matmul_tflops": 0.1, "read_gb_s": 10.0})
    monkeypatch.setattr(bench_infer, "PICTURE_PIXELS", (60, 80))
    monkeypatch.setattr(bench_infer, "PAGE_PIXELS", (160, 160))
    out, plot = tmp_path / "parts.json", tmp_path / "parts.png"
    arguments = ["--model", str(tiny_checkpoint), "--items", "2", "--repeats", "2", "--dtype", "float32"]
    result = invoke(*arguments, "--out", str(out))
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout.splitlines()[-1])
    assert [(cell["kind"], cell["compression"]) for cell in record["cases"]] == [
        (kind, s) for kind in ("text", "image", "page") for s in (1, 2)
    ]
    for cell in record["cases"]:
        parts = cell["parts_ms"]
        assert list(parts) == list(PARTS)
        assert sum(parts.values()) == pytest.approx(cell["ms_per_item"]["min"], rel=1e-2)  # of two, the lower is taken
        seen = {name for name in (READING, TILES, NORMALISING, TOWER) if parts[name]}
        assert len(seen) == (0 if cell["kind"] == "text" else 4)
        assert parts[LANGUAGE] > 0 and cell["floor_ms"][LANGUAGE] > 0 and cell["threads_ms_per_item"]["median"] > 0
        assert bool(cell["floor_ms"][TOWER]) == bool(seen)
    page_1, page_2 = record["cases"][4:]
    assert page_1["tokens_per_item"] - page_2["tokens_per_item"] == 5 * (16 - 4)
    assert page_1["floor_ms"][TOWER] == pytest.approx(page_2["floor_ms"][TOWER], rel=0.05)  # but for the connector
    assert page_1["floor_ms"][LANGUAGE] > page_2["floor_ms"][LANGUAGE]

    result = invoke("--from", str(out), "--from", str(out), "--plot", str(plot))
    assert result.exit_code == 0, result.output
    with Image.open(plot) as drawn:
        assert drawn.width > 500 and drawn.height > 500


def test_what_cannot_be_done(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"benchmark": "search"}')
    for arguments, message in (
        (["--from", str(other)], "needs --plot"),
        (["--from", str(other), "--plot", str(tmp_path / "a.png")], "is no record of"),
        (["--from", str(tmp_path / "none.json"), "--plot", str(tmp_path / "a.png")], "cannot be read"),
        (["--clock", "moon"], "wall or processor"),
        (["--kind", "pages"], "Did you mean 'page'"),
        (["--model", "nowhere", "--plot", str(tmp_path / "a.gif")], "a .png or .svg file"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1 and message in " ".join(result.output.split()), result.output
