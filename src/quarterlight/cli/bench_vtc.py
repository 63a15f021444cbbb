"""``quarterlight bench vtc``: what visual token compression saves, vision tower and language model apart."""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from quarterlight.cli import console
from quarterlight.cli.measure import ceiling_of, rounds
from quarterlight.errors import InputError

PROMPT_TOKENS = {"natural image": 19, "document page": 20}
"""Tokens of the paper's candidate template around the visual tokens, counted with Qwen2's tokenizer."""

MAX_TILES = {"natural image": 1, "document page": 4}
"""Of a candidate, as large as it may be: for an InternVL a tile, or four and a thumbnail (Magic-MM-Embedding, section
5.2); for a Qwen-VL as many times the pixels of a picture."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One kind of candidate at one s.  Times in ms per candidate, medians over the rounds; floors are what the machine
    could do."""

    candidate: str
    compression: int
    tokens: int
    vision_ms: float
    text_ms: float
    total_ms: float
    vision_tflop: float
    text_tflop: float
    vision_floor_ms: float
    text_floor_ms: float


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times faster s is than s = 1: median, least and most over rounds that ran both, one after the other."""

    candidate: str
    compression: int
    vision: float
    text: float
    total: float
    total_min: float
    total_max: float


@dataclass(frozen=True)
class Case:
    """A kind of candidate at one s, and functions that run the vision half and the language half of embedding it."""

    kind: str
    config: Any
    vision: Callable[[], Any]
    text: Callable[[], Any]


def bench_vtc(
    shape: Annotated[str, typer.Option(help="InternVL3 shape (1B, 2B, 8B, 14B) or Qwen-VL (Qwen2-VL-2B, ...).")] = "2B",
    compression: Annotated[int, typer.Option(help="The s that is compared with s = 1: 2 or 4.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Candidates that are embedded together.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs every case once. One more warms up.")] = 5,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write the JSON record to this file.")] = None,
) -> None:
    """Time candidates with visual token compression and without, in one run; times are per candidate.

    The model has the real shape, random weights and bfloat16; s = 1 and the other s share the weights and take turns.
    A floor is the time that the arithmetic, or reading the weights once, would take at the speed that this machine
    reached on one large matrix product and one large sum.

    \b
    quarterlight bench vtc --shape 2B --repeats 9 --out benchmarks/results/vtc-2b.json
    quarterlight bench vtc --shape 2B --batch 4 --out benchmarks/results/vtc-2b-batch-4.json
    """
    if compression not in (2, 4):
        raise InputError(f"--compression is 2 or 4, got {compression}; s = 1 is what it is compared with.")
    import torch

    with torch.inference_mode(), console.progress("runs") as bar:
        waiting = bar.add_task(f"Building {shape}", total=None)
        ceiling = ceiling_of(device, torch.bfloat16)
        cases = _cases(shape, (1, compression), device, batch)
        bar.remove_task(waiting)
        halves = {(key, half): getattr(case, half) for key, case in cases.items() for half in ("vision", "text")}
        line = bar.add_task("Timing", total=(1 + repeats) * len(halves))
        taken = rounds(halves, repeats, device, lambda: bar.advance(line))
    samples = {
        key: [
            (vision / batch, text / batch)
            for vision, text in zip(taken[key, "vision"], taken[key, "text"], strict=True)
        ]
        for key in cases
    }
    timings = [_timing(case, samples[key], ceiling, batch) for key, case in cases.items()]
    ratios = [_ratio(kind, compression, samples[kind, 1], samples[kind, compression]) for kind in MAX_TILES]
    title = shape if "VL" in shape else f"InternVL3-{shape}"
    _print(timings, ratios, ceiling, title=f"{title}, bfloat16, {device}, {batch} together, ms per candidate")
    record = {
        "benchmark": "vtc",
        "settings": {"shape": shape, "dtype": "bfloat16", "device": device, "batch": batch, "repeats": repeats},
        "ceiling": _rounded(ceiling),
        "timings": [_rounded(asdict(timing)) for timing in timings],
        "ratios": [_rounded(asdict(ratio)) for ratio in ratios],
    }
    console.print_record(record, out)


def _cases(shape: str, factors: tuple[int, ...], device: str, batch: int) -> dict[tuple[str, int], Case]:
    """(kind of candidate, s) -> what is timed; all share one set of weights."""
    import torch

    from quarterlight.models.backbones import backbone_of
    from quarterlight.models.shapes import build_random, shape_config

    weights = build_random(shape, device=device)
    backbone = backbone_of(weights.config)
    cases = {}
    for kind in MAX_TILES:
        for factor in factors:
            model = copy.copy(weights)
            model.config = config = shape_config(shape, visual_token_compression=factor)
            grids = [_grid(config, kind)] * batch
            shape_of_pixels = backbone.pixels_shape(config, grids)
            pixels = torch.randn(shape_of_pixels, device=device, dtype=torch.bfloat16)
            visual = _visual_tokens(config, kind)
            ids = torch.randint(150_000, (batch, PROMPT_TOKENS[kind] + visual), device=device)
            ids[:, 8 : 8 + visual] = config.image_token_id
            vision = functools.partial(backbone.see, model, pixels, grids)
            seen = backbone.encoder_outputs(config, vision())
            text = functools.partial(model, ids, mm_encoder_outputs=seen, use_cache=False)
            cases[kind, factor] = Case(kind, config, vision, text)
    return cases


def _grid(config: Any, kind: str) -> Any:
    """The picture of a candidate."""
    from quarterlight.models.backbones import backbone_of
    from quarterlight.models.settings import MAX_PIXELS

    return backbone_of(config).largest(config, MAX_TILES[kind], MAX_PIXELS)


def _visual_tokens(config: Any, kind: str) -> int:
    """Of a candidate."""
    from quarterlight.models.backbones import backbone_of

    backbone = backbone_of(config)
    return backbone.num_rows(config, _grid(config, kind)) * backbone.tokens_per_row(config)


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}


def _work(config: Any, kind: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """(floating-point operations, bytes of weights) of the vision half and of the language half for one candidate."""
    from quarterlight.models import flops
    from quarterlight.models.tiles import num_tiles

    tokens = PROMPT_TOKENS[kind] + _visual_tokens(config, kind)
    vision = flops.vision_flop(config, num_tiles(_grid(config, kind))), 2.0 * flops.vision_weights(config)
    return vision, (flops.text_flop(config, tokens), 2.0 * flops.text_weights(config))


def _timing(case: Case, rounds: list[tuple[float, float]], ceiling: dict[str, float], batch: int) -> Timing:
    floors = [
        1e3 * max(flop / ceiling["matmul_tflops"] / 1e12, size / batch / ceiling["read_gb_s"] / 1e9)
        for flop, size in _work(case.config, case.kind)
    ]
    return Timing(
        candidate=case.kind,
        compression=case.config.visual_token_compression,
        tokens=PROMPT_TOKENS[case.kind] + _visual_tokens(case.config, case.kind),
        vision_ms=1e3 * statistics.median(vision for vision, _ in rounds),
        text_ms=1e3 * statistics.median(text for _, text in rounds),
        total_ms=1e3 * statistics.median(vision + text for vision, text in rounds),
        vision_tflop=_work(case.config, case.kind)[0][0] / 1e12,
        text_tflop=_work(case.config, case.kind)[1][0] / 1e12,
        vision_floor_ms=floors[0],
        text_floor_ms=floors[1],
    )


def _ratio(kind: str, factor: int, plain: list[tuple[float, float]], ours: list[tuple[float, float]]) -> Ratio:
    pairs = list(zip(plain, ours, strict=True))
    totals = [sum(slow) / sum(fast) for slow, fast in pairs]
    return Ratio(
        candidate=kind,
        compression=factor,
        vision=statistics.median(slow[0] / fast[0] for slow, fast in pairs),
        text=statistics.median(slow[1] / fast[1] for slow, fast in pairs),
        total=statistics.median(totals),
        total_min=min(totals),
        total_max=max(totals),
    )


def _print(timings: list[Timing], ratios: list[Ratio], ceiling: dict[str, float], title: str) -> None:
    columns = ("s", "tokens", "vision ms", "floor", "text ms", "floor ", "total ms")
    table = console.table("candidate", *columns, title=title, right=columns)
    for one in timings:
        times = (one.vision_ms, one.vision_floor_ms, one.text_ms, one.text_floor_ms, one.total_ms)
        table.add_row(one.candidate, f"{one.compression}", f"{one.tokens}", *(f"{time:,.0f}" for time in times))
    console.out.print(table)
    for ratio in ratios:
        console.out.print(
            f"{ratio.candidate}: s = {ratio.compression} is {ratio.total:.2f} times faster "
            f"({ratio.total_min:.2f} to {ratio.total_max:.2f}); vision {ratio.vision:.2f}, text {ratio.text:.2f}.",
            soft_wrap=True,
        )
    console.out.print(
        f"Floors from {ceiling['matmul_tflops']:.2f} TFLOP/s (bfloat16, 4096^3) and {ceiling['read_gb_s']:.1f} GB/s.\n",
        soft_wrap=True,
    )
