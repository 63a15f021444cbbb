"""The cost table: tokens as in the paper's Table 6, and times of some layers scaled to those of all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from quarterlight.cli import bench_cost
from quarterlight.cli.bench_cost import COLUMNS, INPUTS, SYSTEMS, Build, Input, _Halves, _parts, _tokens
from quarterlight.cli.main import program
from quarterlight.models import shapes
from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig
from quarterlight.models.shapes import shape_config

MODELS = [("2B", 1), ("2B", 2), ("Qwen2-VL-2B", 2)]


@pytest.fixture(autouse=True)
def tiny(tiny_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of 4 layers of 32 columns and tiles of 64 pixels stand in for the real shapes, their pictures being small
    too.  Qwen2-VL keeps its tiles of 28 pixels."""
    parts = {name: {**tiny_values[name], "num_hidden_layers": 4} for name in ("vision_config", "text_config")}
    values = {**tiny_values, **parts}
    monkeypatch.setattr(shapes, "internvl3_config", lambda _, **more: InternVLVTCConfig(**values, **more))
    qwen = shapes.QWEN_SHAPES["Qwen2-VL-2B"]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = {name: tiny_values["text_config"][name] for name in ("hidden_size", "intermediate_size")}
    text |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    eyes = {"depth": 4, "num_heads": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    small_qwen = replace(qwen, vision={**qwen.vision, **eyes}, text={**qwen.text, **text})
    monkeypatch.setattr(shapes, "QWEN_SHAPES", {"Qwen2-VL-2B": small_qwen})
    monkeypatch.setattr(shapes, "shape_config", _eager)
    small = {name: Input(one.side // 7, one.text_tokens) for name, one in INPUTS.items()}
    monkeypatch.setattr(bench_cost, "INPUTS", small)
    monkeypatch.setattr(bench_cost, "ceiling_of", lambda *_: {"matmul_tflops": 0.1, "read_gb_s": 10.0})
    monkeypatch.setattr(torch, "randint", lambda high, size, **more: torch.full(size, 300, **more))  # of fewer words
    bench_cost._weights.cache_clear()


def _eager(shape: str, **more: Any) -> Any:
    """With the attention whose operations torch counts."""
    config = shape_config(shape, **more)
    config._attn_implementation = "eager"
    return config


def build(max_layers: int | None, shape: str = "2B", compression: int = 2) -> Build:
    return Build(shape, compression, max_layers, "cpu", torch.float32)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.label)
def test_tokens_are_those_of_the_paper(system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With s = 2, where the paper has no row, a quarter of those with s = 1."""
    monkeypatch.undo()
    config = shape_config(system.shape, visual_token_compression=system.compression)
    expected = system.paper_tokens or [one / 4 for one in _plain(system).paper_tokens]
    assert [_tokens(config, column) for column in COLUMNS] == pytest.approx(expected)


def _plain(system: Any) -> Any:
    return next(one for one in SYSTEMS if (one.shape, one.compression) == (system.shape, 1))


def test_rows_can_be_told_apart() -> None:
    assert len({system.label for system in SYSTEMS}) == len(SYSTEMS)
    assert {system.size for system in SYSTEMS} == {"2B", "8B"}


@pytest.mark.parametrize(("shape", "compression"), MODELS)
def test_some_layers_scaled_are_all_layers(shape: str, compression: int) -> None:
    """With operations in the place of seconds, which unlike these are exact."""

    def counted(max_layers: int | None) -> tuple[_Halves, dict[Any, list[float]]]:
        bench_cost._weights.cache_clear()
        halves = _Halves(_parts(build(max_layers, shape, compression)))
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
        lengths = {name: one.text_tokens + _visual(shape, name, compression) for name, one in _inputs()}
        later = sum(share * 4 * 2 * lengths[name] ** 2 * 32 for name, share in COLUMNS[column].items())
        # eager attention also computes what it masks; rotary angles are left out
        assert flop == same == pytest.approx(full - later, rel=2e-3)


def _inputs() -> Any:
    return bench_cost.INPUTS.items()


def _visual(shape: str, name: str, compression: int) -> int:
    """64 and 128 pixels are 1 and 5 tiles of an InternVL, and 2 x 2 and 5 x 5 of a Qwen2-VL."""
    side = bench_cost.INPUTS[name].side
    if shape == "2B":
        return {0: 0, 64: 1, 128: 5}[side] * 16 // compression**2
    return ({0: 0, 64: 2, 128: 5}[side] // compression) ** 2


@pytest.mark.parametrize("shape", ["2B", "Qwen2-VL-2B"])
def test_layers_come_back(shape: str) -> None:
    parts = _parts(build(2, shape))
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
    plain, ours, gme, compressed = record["systems"]
    assert record["settings"]["layers"] == 2
    assert (plain["visual_token_compression"], ours["visual_token_compression"]) == (1, 2)
    assert ours["columns"].keys() == COLUMNS.keys()
    cell = ours["columns"]["VisDoc candidate"]
    assert cell["visual_tokens"] * 4 == plain["columns"]["VisDoc candidate"]["visual_tokens"]
    assert cell["paper_times_faster"] == pytest.approx(103.6 / 57.3, abs=1e-3)
    assert cell["times_faster"]["min"] <= cell["times_faster"]["median"] <= cell["times_faster"]["max"]
    assert cell["tflop"] < plain["columns"]["VisDoc candidate"]["tflop"] or cell["tflop"] == 0
    assert [one["name"] for one in (gme, compressed)] == ["GME", "Qwen2-VL-VTC"]
    cell = gme["columns"]["VisDoc candidate"]
    assert (cell["paper_ms"], cell["visual_tokens"]) == (153.8, 25.0)
    cell = compressed["columns"]["VisDoc candidate"]  # not in the paper
    assert (cell["paper_ms"], cell["paper_visual_tokens"], cell["paper_times_faster"]) == (None, None, None)
    assert cell["times_faster"]["median"] > 0


def test_unknown_arguments() -> None:
    for arguments, message in ((["--shape", "3B"], "no size '3B'"), (["--dtype", "int8"], "float32 or bfloat16")):
        result = CliRunner().invoke(program(), ["bench", "cost", *arguments])
        assert result.exit_code == 1
        assert message in result.output
