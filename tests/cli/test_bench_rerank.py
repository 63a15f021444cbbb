"""The bench of reranking: all systems give the same scores, and their floors are what torch counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from quarterlight.cli import bench_rerank
from quarterlight.cli.main import program
from quarterlight.models.checkpoint import load_backbone
from quarterlight.models.reranker import Reranker
from quarterlight.models.settings import RerankerSettings
from quarterlight.records import Item


@pytest.fixture
def reranker(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Reranker:
    model, processor = load_backbone(tiny_checkpoint, language_head=True)
    model.set_attn_implementation("eager")
    tiny = Reranker.from_model(model, processor, RerankerSettings())
    monkeypatch.setattr(bench_rerank, "_reranker", lambda *_: tiny)
    monkeypatch.setattr(bench_rerank, "ceiling_of", lambda *_: {"matmul_tflops": 0.1, "read_gb_s": 10.0})
    return tiny


def test_run(reranker: Reranker, tmp_path: Path) -> None:
    out = tmp_path / "rerank.json"
    arguments = ["bench", "rerank", "--candidates", "3", "--repeats", "2", "--dtype", "float32", "--out", str(out)]
    result = CliRunner().invoke(program(), arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    assert record["largest_difference_of_scores"] < 1e-3  # stored tokens are float16
    assert record["settings"]["tiles"] == 15
    floors = record["floor_ms"]
    assert floors[bench_rerank.SHARED] < floors[bench_rerank.READ] < floors[bench_rerank.WHOLE]
    assert record["times_faster"].keys() == {bench_rerank.SHARED, bench_rerank.READ}


def test_floor_of_whole_pairs_is_what_torch_counts(reranker: Reranker) -> None:
    items = bench_rerank._pictures(2, 4, reranker)
    seen = reranker.eyes.visual_tokens(items)
    floors = bench_rerank._floors(reranker, items, seen, {"matmul_tflops": 1e-12})  # so that 1 ms is 1/1000 operation
    with torch.inference_mode(), FlopCounterMode(display=False) as counted:
        bench_rerank._whole(reranker, items)
    text = reranker.model.config.text_config
    prefix = reranker.formatter.prefix(Item(text=bench_rerank.QUERY)).num_tokens
    tails = reranker.formatter.tails(items)
    tokens = [prefix + tail.num_tokens + 2 + 5 * reranker.processor.image_seq_length for tail in tails]
    # eager attention also computes what it masks, and the head works out all words of the last position
    beyond = sum(text.num_hidden_layers * 2 * n**2 * text.hidden_size for n in tokens)
    head = len(items) * 2 * text.hidden_size * text.vocab_size
    assert floors[bench_rerank.WHOLE] / 1e3 == pytest.approx(counted.get_total_flops() - beyond - head, rel=3e-3)


def test_unknown_dtype(reranker: Reranker) -> None:
    result = CliRunner().invoke(program(), ["bench", "rerank", "--dtype", "int4"])
    assert result.exit_code == 1
    assert "float32 or bfloat16, got 'int4'" in result.output
