"""The cost table: tokens as in the paper's Table 6, and times of some layers scaled to those of all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from quarterlight.cli import bench_cost
from quarterlight.cli.bench_cost import COLUMNS, INPUTS, SYSTEMS, Build, Input, _Halves, _internvl, _tokens
from quarterlight.cli.main import program
from quarterlight.models import shapes
from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig


@pytest.fixture(autouse=True)
def tiny(tiny_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of 4 layers of 32 columns and tiles of 64 pixels stand in for the real shapes."""
    parts = {name: {**tiny_values[name], "num_hidden_layers": 4} for name in ("vision_config", "text_config")}
    values = {**tiny_values, **parts, "attn_implementation": "eager"}  # whose operations torch counts
    monkeypatch.setattr(shapes, "internvl3_config", lambda _, **more: InternVLVTCConfig(**values, **more))
    small = {name: Input(one.side // 7, one.text_tokens) for name, one in INPUTS.items()}
    monkeypatch.setattr(bench_cost, "INPUTS", small)
    monkeypatch.setattr(bench_cost, "ceiling_of", lambda *_: {"matmul_tflops": 0.1, "read_gb_s": 10.0})
    monkeypatch.setattr(torch, "randint", lambda high, size, **more: torch.full(size, 300, **more))  # of fewer words
    bench_cost._weights.cache_clear()


def build(max_layers: int | None, compression: int = 2) -> Build:
    return Build("2B", compression, max_layers, "cpu", torch.float32)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.label)
def test_tokens_are_those_of_the_paper(system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with torch.device("meta"):
        monkeypatch.setattr(bench_cost, "_weights", lambda one: shapes.AutoModel.from_config(_config(one.shape)))
        parts = system.build(Build(system.shape, system.compression, 1, "meta", torch.float32))
    assert [_tokens(parts, column) for column in COLUMNS] == pytest.approx(system.paper_tokens)


def _config(shape: str) -> Any:
    config = shapes.internvl3_config(shape)
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = config.text_config.layer_types[:1]
    return config


@pytest.mark.parametrize("compression", [1, 2])
def test_some_layers_scaled_are_all_layers(compression: int) -> None:
    """With operations in the place of seconds, which unlike these are exact."""

    def counted(max_layers: int | None) -> tuple[_Halves, dict[Any, list[float]]]:
        bench_cost._weights.cache_clear()
        halves = _Halves(_internvl(build(max_layers, compression)))
        found = {}
        for run, call in halves.runs.items():
            with torch.inference_mode(), FlopCounterMode(display=False) as counter:
                call()
            found[run] = [float(counter.get_total_flops())]
        return halves, found

    (some, times), (whole, all_times) = counted(1), counted(None)
    assert len(some.runs) == 2 * len(whole.runs)
    for column in COLUMNS:
        (scaled,), flop = some.cell(column, times)
        (full,), same = whole.cell(column, all_times)
        assert scaled == pytest.approx(full, rel=1e-9)
        lengths = {name: one.text_tokens + _visual(name, compression) for name, one in bench_cost.INPUTS.items()}
        later = sum(share * 4 * 2 * lengths[name] ** 2 * 32 for name, share in COLUMNS[column].items())
        # eager attention also computes what it masks; rotary angles are left out
        assert flop == same == pytest.approx(full - later, rel=2e-3)


def _visual(name: str, compression: int) -> int:
    tiles = {0: 0, 64: 1, 128: 5}[bench_cost.INPUTS[name].side]
    return tiles * 16 // compression**2


def test_layers_come_back() -> None:
    parts = _internvl(build(2))
    halves = _Halves(parts)
    for run, call in halves.runs.items():
        if run[2] == "none":
            call()
    assert [len(getattr(owner, name)) for owner, name, _ in parts.stacks.values()] == [2, 2]


def test_run(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    arguments = ["bench", "cost", "--shape", "2B", "--repeats", "2", "--dtype", "float32", "--out", str(out)]
    result = CliRunner().invoke(program(), arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    assert record == json.loads(result.stdout.splitlines()[-1])
    plain, ours = record["systems"]
    assert record["settings"]["layers"] == 2
    assert (plain["visual_token_compression"], ours["visual_token_compression"]) == (1, 2)
    assert ours["columns"].keys() == COLUMNS.keys()
    cell = ours["columns"]["VisDoc candidate"]
    assert cell["visual_tokens"] * 4 == plain["columns"]["VisDoc candidate"]["visual_tokens"]
    assert cell["paper_times_faster"] == pytest.approx(103.6 / 57.3, abs=1e-3)
    assert cell["times_faster"]["min"] <= cell["times_faster"]["median"] <= cell["times_faster"]["max"]
    assert cell["tflop"] < plain["columns"]["VisDoc candidate"]["tflop"] or cell["tflop"] == 0


def test_unknown_arguments() -> None:
    for arguments, message in ((["--shape", "3B"], "no size '3B'"), (["--dtype", "int8"], "float32 or bfloat16")):
        result = CliRunner().invoke(program(), ["bench", "cost", *arguments])
        assert result.exit_code == 1
        assert message in result.output
