"""The benchmark's arithmetic: operations against torch's own counter, ratios against hand-made times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from quarterlight.cli import bench_vtc
from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig
from quarterlight.models.internvl_vtc.modeling import InternVLVTCModel


@pytest.mark.parametrize("factor", [1, 2])
def test_operations_are_those_that_torch_counts(
    tiny_values: dict[str, Any], factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = InternVLVTCConfig(**tiny_values, visual_token_compression=factor, attn_implementation="eager")
    model = InternVLVTCModel(config).eval()
    tiles, prompt = 3, 7
    monkeypatch.setattr(bench_vtc, "MAX_TILES", {"page": tiles - 1})  # and a thumbnail
    monkeypatch.setattr(bench_vtc, "PROMPT_TOKENS", {"page": prompt})
    (vision_flop, _), (text_flop, _) = bench_vtc._work(config, "page")

    visual = tiles * config.image_seq_length
    ids = torch.full((1, prompt + visual), 0)
    ids[:, :visual] = config.image_token_id
    with torch.inference_mode(), FlopCounterMode(display=False) as counted_vision:
        features = model.get_image_features(torch.zeros(tiles, 3, 64, 64), return_dict=True)
    with torch.inference_mode(), FlopCounterMode(display=False) as counted_text:
        model(ids, mm_encoder_outputs={"image": features}, use_cache=False)

    tokens, text = prompt + visual, config.text_config
    future = text.num_hidden_layers * 4 * tokens**2 * text.hidden_size / 2  # eager attention computes what it masks
    assert vision_flop == counted_vision.get_total_flops()
    assert text_flop + future == pytest.approx(counted_text.get_total_flops(), rel=2e-3)  # and rotary angles


def test_ratio_pairs_the_times_of_a_round() -> None:
    slow, fast = [(2.0, 2.0), (4.0, 4.0), (3.0, 1.0)], [(2.0, 1.0), (2.0, 2.0), (1.0, 1.0)]
    ratio = bench_vtc._ratio("page", 2, slow, fast)
    assert (ratio.vision, ratio.text) == (2.0, 2.0)
    assert (ratio.total_min, ratio.total, ratio.total_max) == (4 / 3, 2.0, 2.0)


def test_floor_is_arithmetic_or_reading(tiny_values: dict[str, Any]) -> None:
    config = InternVLVTCConfig(**tiny_values, visual_token_compression=2)
    case = bench_vtc.Case("natural image", config, lambda: None, lambda: None)
    slow_arithmetic = bench_vtc._timing(case, [(0.5, 0.25)], {"matmul_tflops": 1e-9, "read_gb_s": 1e9}, 1)
    slow_reading = bench_vtc._timing(case, [(0.5, 0.25)], {"matmul_tflops": 1e9, "read_gb_s": 1e-9}, 1)
    (vision_flop, vision_bytes), _ = bench_vtc._work(config, "natural image")
    assert slow_arithmetic.vision_floor_ms == pytest.approx(vision_flop)
    assert slow_reading.vision_floor_ms == pytest.approx(vision_bytes * 1e3)
    assert (slow_reading.vision_ms, slow_reading.text_ms, slow_reading.total_ms) == (500.0, 250.0, 750.0)
