"""The benchmark's arithmetic: operations against torch's own counter, ratios against hand-made times."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from quarterlight.cli import bench_vtc
from quarterlight.models import shapes
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


@pytest.mark.parametrize("name", ["Qwen2-VL-2B", "Qwen3-VL-4B"])
def test_cases_of_a_qwen_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With so few columns and layers that it takes no time, on the picture that is timed."""
    full = shapes.QWEN_SHAPES[name]
    head = {"head_dim": 8} if "head_dim" in full.text else {}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    eyes = {"depth": 2, "num_heads": 2, "hidden_size": 16}
    eyes |= {"embed_dim": 16} if "embed_dim" in full.vision else {"out_hidden_size": 16, "intermediate_size": 32}
    eyes |= {"deepstack_visual_indexes": [0]} if "deepstack_visual_indexes" in full.vision else {}
    text = {**full.text, **small, **head, "intermediate_size": 32, "rope_parameters": rope}
    tiny = replace(full, vision={**full.vision, **eyes}, text=text)
    monkeypatch.setattr(shapes, "QWEN_SHAPES", {name: tiny})
    monkeypatch.setattr(bench_vtc, "MAX_TILES", {"natural image": 1})
    cases = bench_vtc._cases(name, (1, 2), "cpu", 2)
    tokens = {1: 300, 2: 70} if name == "Qwen2-VL-2B" else {1: 221, 2: 48}  # 15 x 20 and 13 x 17 at s = 1
    with torch.inference_mode():
        for (kind, factor), case in cases.items():
            assert bench_vtc._visual_tokens(case.config, kind) == tokens[factor]
            assert case.vision().shape[0] == 2 * tokens[factor]
            assert case.text().last_hidden_state.shape == (2, 19 + tokens[factor], 16)
    (slow, _), (fast, _) = (bench_vtc._work(cases["natural image", s].config, "natural image") for s in (1, 2))
    assert slow == fast  # the tower is the same; what follows it is not
