"""``quarterlight bench train`` on nano with a handful of pairs, and the arithmetic of its ratios."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from quarterlight.cli import bench_train
from quarterlight.cli.bench_train import What, _settings
from quarterlight.cli.main import program
from quarterlight.cli.measure import with_compression
from quarterlight.errors import InputError

LORA_NANO = (
    4
    * 16
    * (  # layers, rank, and inputs + outputs of each matrix: 256 columns, 128 of keys, 768 within
        (256 + 256) * 2 + (256 + 128) * 2 + (256 + 768) * 3
    )
)


def bench(*arguments: str, out: Path) -> dict[str, Any]:
    result = CliRunner().invoke(program(), ["bench", "train", *arguments, "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record == json.loads(out.read_text())
    return record


def run_here(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def test_steps_with_and_without_compression(tmp_path: Path) -> None:
    record = bench(
        "--what", "vtc", "--shape", "nano", "--batch", "2", "--repeats", "1", out=tmp_path / "results" / "vtc.json"
    )
    assert record["settings"]["recompute"] is True and record["settings"]["batch"] == 2
    assert [one["name"] for one in record["runs"]] == ["s = 2", "s = 1"]
    fast, slow = record["runs"]
    assert record["images_per_s_ratio"]["median"] == pytest.approx(slow["seconds"] / fast["seconds"], rel=1e-2)
    assert 1 < record["arithmetic_ratio"] < 4


def test_batches_in_chunks_and_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "SMALL_BATCH", 2)
    monkeypatch.setattr(bench_train, "PLAIN_BATCHES", (2,))
    monkeypatch.setattr(bench_train, "_alone", run_here)  # below is a test of the real one
    record = bench(
        "--what", "gradcache", "--batch", "3", "--chunk-tokens", "100", "--repeats", "1", out=tmp_path / "cache.json"
    )
    assert [(one["name"], one["batch"]) for one in record["runs"]] == [
        ("in chunks", 2),
        ("in chunks", 3),
        ("plain", 2),
    ]
    _, large, plain = record["runs"]
    assert record["plain_batch"] == plain["batch"]
    expected = large["seconds"] / large["batch"] / (plain["seconds"] / plain["batch"])
    assert record["time_per_pair_ratio"]["median"] == pytest.approx(expected, rel=1e-2)


def test_a_step_of_a_stage_trains_what_the_stage_trains(tmp_path: Path) -> None:
    settings = _settings(What.stages, {"shape": "nano", "batch": 1, "max_tokens": 64})
    restore = bench_train._stage("restore", settings, str(tmp_path))
    assert restore["trained_parameters"] > 9e6 and restore["rows"] == "1 pack of 64 tokens"
    assert 5 < restore["loss"] < 15  # nats of one of 12,288 words, never trained to write
    finetune = bench_train._stage("finetune", settings, str(tmp_path))
    assert finetune["trained_parameters"] == LORA_NANO
    assert finetune["rows"] == "1 + 13 items" and finetune["seconds"] > 0


def test_compression_changes_over_the_same_weights() -> None:
    settings = _settings(What.vtc, {"shape": "nano"})
    model, processor = bench_train._build(settings, lora=True)
    plain, its_processor = with_compression(model, processor, 1)
    assert (processor.image_seq_length, its_processor.image_seq_length) == (4, 16)
    tile = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        assert model.get_image_features(tile).pooler_output.shape[1] == 4
        assert plain.get_image_features(tile).pooler_output.shape[1] == 16
    assert all(a is b for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_arithmetic_counts_the_language_model_more_when_it_runs_more_often(tmp_path: Path) -> None:
    settings = _settings(What.vtc, {"shape": "nano", "recompute": False})
    model, processor = bench_train._build(settings, lora=False)
    pairs = bench_train._pairs(tmp_path, 1, 64, max_tiles=1)
    kept = bench_train._arithmetic(model.config, processor, settings, pairs)
    recomputed = bench_train._arithmetic(model.config, processor, settings | {"recompute": True}, pairs)
    pages = bench_train._arithmetic(model.config, processor, settings | {"max_tiles": 4}, pairs)
    assert 1 < kept < recomputed and kept < pages


def test_options_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(InputError, match="--what vtc has no use for --chunk-tokens"):
        _settings(What.vtc, {"chunk_tokens": 100})
    with pytest.raises(InputError, match="no shape '3B'"):
        _settings(What.stages, {"shape": "3B"})
    with pytest.raises(InputError, match="--max-tiles is 1 or 4, got 2"):
        _settings(What.stages, {"max_tiles": 2})
    with pytest.raises(InputError, match="sdpa or eager, got 'flash'"):
        _settings(What.gradcache, {"attention": "flash"})
    with pytest.raises(InputError, match="must be above 512, got 64"):
        bench_train._gradcache({"batch": 64})


def test_ratios_pair_the_times_of_a_round() -> None:
    slow: list[tuple[float, int | None]] = [(8.0, None), (9.0, None), (20.0, None)]
    fast: list[tuple[float, int | None]] = [(2.0, None), (3.0, None), (4.0, None)]
    ratio = bench_train._spread(slow, fast, scale=2.0)
    assert (ratio.least, ratio.median, ratio.most) == (1.5, 2.0, 2.5)
    steps = bench_train._steps("plain", 6, [(2.0, 2**30), (3.0, 2**31), (9.0, 2**29)])
    assert (steps.seconds, steps.images_per_s, steps.peak_gib) == (3.0, 2.0, 2.0)
    assert bench_train._steps("plain", 6, slow).peak_gib is None


def test_alone_is_another_process() -> None:
    assert bench_train._alone(os.getpid) != os.getpid()
