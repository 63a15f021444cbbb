"""``quarterlight bench cost``: visual tokens and latency of queries and candidates, as in the paper's Table 6.

The paper is Magic-MM-Embedding, the settings are those of its section 5.3.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from quarterlight.cli import console
from quarterlight.cli.measure import ceiling_of, find_dtype, rounds, spread, times_faster
from quarterlight.errors import InputError, did_you_mean


class Input(NamedTuple):
    """Something to embed. side: of its square picture in pixels, 0 without one.  text_tokens: template and words."""

    side: int
    text_tokens: int


INPUTS = {
    "text query": Input(0, 43),
    "image query": Input(448, 40),
    "page query": Input(896, 40),
    "image candidate": Input(448, 19),
    "page candidate": Input(896, 20),
}
"""Natural pictures have 448 x 448 pixels, pages 896 x 896.  The words are the paper's templates, counted with Qwen2's
tokenizer, and in queries some twelve tokens more; the paper does not give their lengths."""

_PAGES = (99.6 - 64) / (320 - 64)

COLUMNS: Mapping[str, Mapping[str, float]] = {
    "MMEB query": {"image query": 1 - _PAGES, "page query": _PAGES},
    "MMEB candidate": {"image candidate": 1.0},
    "VisDoc query": {"text query": 1.0},
    "VisDoc candidate": {"page candidate": 1.0},
}
"""What each pair of columns of Table 6 is an average of.

13.9 % of MMEB's queries with pictures are taken for pages: the paper does not say so, but with that share all its
rows have the visual tokens that it prints (99.6 of 64 and 320, 398.4 of 256 and 1,280, 362.8 of 256 and 1,024)."""


MAX_TILES = 4
"""Of any picture, as for a page (section 5.2); a natural picture of 448 pixels becomes one all the same."""


@dataclass(frozen=True, kw_only=True)
class System:
    """A row of the table.

    size: as rows are chosen by.  shape: of the model, as :mod:`quarterlight.models.shapes` calls it.
    paper_tokens, paper_ms: by column, as printed, measured on an L20 GPU; ``None`` for what the paper does not have.
    """

    name: str
    backbone: str
    size: str
    shape: str
    compression: int
    paper_tokens: tuple[float, ...] | None = None
    paper_ms: tuple[float, ...] | None = None

    @property
    def label(self) -> str:
        """Short name, with size and s."""
        return f"{self.name} {self.size}, s = {self.compression}"


class Build(NamedTuple):
    """How a system's model is to be built.

    shape, compression: of the row.  max_layers: of vision tower and language model each, ``None`` for all.
    """

    shape: str
    compression: int
    max_layers: int | None
    device: str
    dtype: Any


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model whose two halves can be run apart.

    config: of the whole model.
    vision: of a square picture of so many pixels a side, makes the function that runs tower and connector on it, with
    its operations.
    text: of an input, makes the function that runs the language model on it, with its operations.
    stacks: half -> (object, its attribute that is the list of layers, layers of the whole model).
    """

    config: Any
    vision: Callable[[int], tuple[Callable[[], Any], float]]
    text: Callable[[Input], tuple[Callable[[], Any], float]]
    stacks: Mapping[str, tuple[Any, str, int]]


def _parts(build: Build) -> Parts:
    """A model with random weights, which all s of a shape share."""
    import torch

    from quarterlight.models import flops
    from quarterlight.models.backbones import backbone_of
    from quarterlight.models.shapes import shape_config
    from quarterlight.models.tiles import num_tiles

    whole = shape_config(build.shape, visual_token_compression=build.compression)
    backbone = backbone_of(whole)
    model = copy.copy(_weights(build._replace(compression=1)))
    model.config = copy.deepcopy(model.config)
    model.config.visual_token_compression = build.compression

    def vision(side: int) -> tuple[Callable[[], Any], float]:
        grids = [_grid(whole, side)]
        pixels = torch.randn(backbone.pixels_shape(whole, grids), device=build.device, dtype=build.dtype)
        return functools.partial(backbone.see, model, pixels, grids), flops.vision_flop(whole, num_tiles(grids[0]))

    def text(one: Input) -> tuple[Callable[[], Any], float]:
        visual = _visual_tokens(whole, one.side)
        ids = torch.randint(150_000, (1, one.text_tokens + visual), device=build.device)
        seen = {}
        if visual:
            ids[:, 8 : 8 + visual] = whole.image_token_id
            seen = {"mm_encoder_outputs": backbone.encoder_outputs(whole, vision(one.side)[0]())}
        return functools.partial(model, ids, use_cache=False, **seen), flops.text_flop(whole, ids.shape[1])

    tower, _, layers = backbone.tower_layers.rpartition(".")
    return Parts(
        config=whole,
        vision=vision,
        text=text,
        stacks={
            "vision": (model.get_submodule(tower), layers, backbone.tower(whole).num_layers),
            "text": (model.language_model, "layers", whole.text_config.num_hidden_layers),
        },
    )


@functools.lru_cache(maxsize=4)
def _weights(build: Build) -> Any:
    from quarterlight.models.shapes import build_random

    return build_random(build.shape, dtype=build.dtype, device=build.device, max_layers=build.max_layers)


def _grid(config: Any, side: int) -> Any:
    """How the family's image processor cuts a square picture of so many pixels a side."""
    from quarterlight.models.backbones import backbone_of
    from quarterlight.models.settings import MAX_PIXELS

    return backbone_of(config).image_processor(config).grid_of(side, side, MAX_TILES, MAX_PIXELS)


def _visual_tokens(config: Any, side: int) -> int:
    """Of such a picture, 0 without one."""
    from quarterlight.models.backbones import backbone_of

    backbone = backbone_of(config)
    return backbone.num_rows(config, _grid(config, side)) * backbone.tokens_per_row(config) if side else 0


_QWEN_TOKENS = (362.8, 256.0, 0.0, 1024.0)
_INTERNVL_TOKENS = (398.4, 256.0, 0.0, 1280.0)
_VTC_TOKENS = (99.6, 64.0, 0.0, 320.0)

SYSTEMS = (
    System(
        name="InternVL3",
        backbone="InternVL3",
        size="2B",
        shape="2B",
        compression=1,
        paper_tokens=_INTERNVL_TOKENS,
        paper_ms=(37.1, 29.2, 19.8, 103.6),
    ),
    System(
        name="Magic-MM-Embedding",
        backbone="InternVL3-VTC",
        size="2B",
        shape="2B",
        compression=2,
        paper_tokens=_VTC_TOKENS,
        paper_ms=(29.9, 26.1, 19.7, 57.3),
    ),
    System(
        name="GME",
        backbone="Qwen2-VL",
        size="2B",
        shape="Qwen2-VL-2B",
        compression=1,
        paper_tokens=_QWEN_TOKENS,
        paper_ms=(46.8, 34.5, 19.3, 153.8),
    ),
    System(name="Qwen2-VL-VTC", backbone="Qwen2-VL-VTC", size="2B", shape="Qwen2-VL-2B", compression=2),
    System(
        name="InternVL3",
        backbone="InternVL3",
        size="8B",
        shape="8B",
        compression=1,
        paper_tokens=_INTERNVL_TOKENS,
        paper_ms=(76.7, 55.9, 33.8, 260.4),
    ),
    System(
        name="Magic-MM-Embedding",
        backbone="InternVL3-VTC",
        size="8B",
        shape="8B",
        compression=2,
        paper_tokens=_VTC_TOKENS,
        paper_ms=(50.9, 40.6, 33.8, 94.8),
    ),
    System(
        name="GME",
        backbone="Qwen2-VL",
        size="8B",
        shape="Qwen2-VL-7B",
        compression=1,
        paper_tokens=_QWEN_TOKENS,
        paper_ms=(82.2, 56.7, 26.6, 268.2),
    ),
    System(name="Qwen2-VL-VTC", backbone="Qwen2-VL-VTC", size="8B", shape="Qwen2-VL-7B", compression=2),
)
"""Rows of Table 6 that can be built here, and Qwen2-VL with s = 2, which the paper does not have.

LamRA is left out: most layers of Qwen2.5-VL's tower see a window and some the whole picture, so that a few of them do
not stand for all.  The others (Phi3.5-V, LLaVA, Aquila-VL) are no backbones of ours."""


class Cell(NamedTuple):
    """One column of a system: seconds in each round, and operations."""

    seconds: list[float]
    flop: float


def bench_cost(
    sizes: Annotated[
        list[str] | None,
        typer.Option("--shape", help="2B or 8B; may be repeated.", show_default="all"),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs every system once. One more warms up.")] = 3,
    layers: Annotated[
        int | None,
        typer.Option(min=0, help="Layers that are run of each half, 0 for all.", show_default="2 on a CPU, else all"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the faster here.")] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write the JSON record to this file.")] = None,
) -> None:
    """Count visual tokens and time queries and candidates, one at a time, next to Table 6 of the paper.

    InternVL3 and Qwen2-VL (GME), each with s = 1 and s = 2, have the real shapes and random weights; both s of a model
    share them, and all take turns.  Latency is that of vision tower, connector and language model, without reading of
    files.  Layers are alike, so some of them are enough: with --layers, a half is run with so many and with none, and
    the difference is scaled to all.  A dash stands for what the paper does not have.

    \b
    quarterlight bench cost --shape 2B --repeats 2 --out benchmarks/results/cost-2b.json
    quarterlight bench cost --device cuda --repeats 200 --out benchmarks/results/cost-gpu.json
    """
    import torch

    known = {system.size for system in SYSTEMS}
    for name in sizes or ():
        if name not in known:
            raise InputError(f"There is no size {name!r} in the table. {did_you_mean(name, known)}")
    chosen = find_dtype(dtype, device)
    max_layers = (2 if torch.device(device).type == "cpu" else None) if layers is None else (layers or None)
    systems = [system for system in SYSTEMS if not sizes or system.size in sizes]
    with torch.inference_mode(), console.progress("runs") as bar:
        waiting = bar.add_task("Building", total=None)
        ceiling = ceiling_of(device, chosen)
        parts = {one.label: _parts(Build(one.shape, one.compression, max_layers, device, chosen)) for one in systems}
        halves = {name: _Halves(one) for name, one in parts.items()}
        # what is compared stands side by side: a round over everything may take minutes
        every = dict.fromkeys(run for one in halves.values() for run in one.runs)  # not all have as many layers
        runs = {(name, *run): one.runs[run] for run in every for name, one in halves.items() if run in one.runs}
        bar.remove_task(waiting)
        line = bar.add_task("Timing", total=(1 + repeats) * len(runs))
        times = rounds(runs, repeats, device, lambda: bar.advance(line))
    _weights.cache_clear()
    cells = {
        (name, column): one.cell(column, {run: times[name, *run] for run in one.runs})
        for name, one in halves.items()
        for column in COLUMNS
    }
    name_of_dtype = str(chosen).removeprefix("torch.")
    depth = "all layers" if max_layers is None else f"{max_layers} layers of each half measured, scaled to all"
    recorded = [
        _recorded(one, next(base for base in systems if base.shape == one.shape), parts[one.label], cells, ceiling)
        for one in systems
    ]
    _print(systems, recorded, f"Table 6: {name_of_dtype}, {device}, one at a time, {depth}")
    record = {
        "benchmark": "cost",
        "settings": {"dtype": name_of_dtype, "device": device, "repeats": repeats, "layers": max_layers or "all"},
        "ceiling": {name: round(value, 3) for name, value in ceiling.items()},
        "inputs": {name: one._asdict() for name, one in INPUTS.items()},
        "columns": {name: {one: round(share, 4) for one, share in mix.items()} for name, mix in COLUMNS.items()},
        "systems": recorded,
    }
    console.out.print(
        f"Ceiling: {ceiling['matmul_tflops']:.2f} TFLOP/s ({name_of_dtype}, 4096^3). "
        "Times are without reading files and making tiles; faster is against the same model with s = 1.\n",
        soft_wrap=True,
    )
    console.print_record(record, out)


class _Halves:
    """Everything of one system that is timed, and what its columns cost.

    runs: (half, what it is run on, how deep) -> the function; depth is "layers", and "none" where it is not the whole.
    """

    def __init__(self, parts: Parts) -> None:
        self.runs: dict[tuple[str, Any, str], Callable[[], Any]] = {}
        self._flop: dict[tuple[str, Any], float] = {}
        self._scale: dict[str, float] = {}
        sides = sorted({one.side for one in INPUTS.values() if one.side})
        built = {("vision", side): parts.vision(side) for side in sides}
        built |= {("text", one): parts.text(one) for one in INPUTS.values()}
        for half, (owner, name, total) in parts.stacks.items():
            self._scale[half] = total / max(1, len(getattr(owner, name)))
        for (half, what), (call, flop) in built.items():
            self._flop[half, what] = flop
            self.runs[half, what, "layers"] = call
            if self._scale[half] > 1:
                owner, name, _ = parts.stacks[half]
                self.runs[half, what, "none"] = functools.partial(_run_without, owner, name, call)

    def cell(self, column: str, times: Mapping[tuple[str, Any, str], list[float]]) -> Cell:
        """What a column takes; times are scaled from the layers that were run to all of them."""
        number = len(next(iter(times.values())))
        seconds, flop = [0.0] * number, 0.0
        for name, share in COLUMNS[column].items():
            one = INPUTS[name]
            for half, what in (("vision", one.side), ("text", one)):
                if half == "vision" and not one.side:
                    continue
                deep = times[half, what, "layers"]
                none = times.get((half, what, "none"), [0.0] * number)
                scale = self._scale[half]
                for row in range(number):
                    seconds[row] += share * (none[row] + scale * (deep[row] - none[row]))
                flop += share * self._flop[half, what]
        return Cell(seconds, flop)


def _run_without(owner: Any, name: str, call: Callable[[], Any]) -> None:
    with _without_layers(owner, name):
        call()


@contextlib.contextmanager
def _without_layers(owner: Any, name: str) -> Iterator[None]:
    """The layers are taken out meanwhile, so that only what stands around them is run."""
    from torch import nn

    layers = getattr(owner, name)
    setattr(owner, name, nn.ModuleList())
    try:
        yield
    finally:
        setattr(owner, name, layers)


def _tokens(config: Any, column: str) -> float:
    """Visual tokens, on average."""
    return sum(share * _visual_tokens(config, INPUTS[name].side) for name, share in COLUMNS[column].items())


def _recorded(
    system: System,
    base: System,
    parts: Parts,
    cells: Mapping[tuple[str, str], Cell],
    ceiling: Mapping[str, float],
) -> dict[str, Any]:
    """A system as the JSON has it, compared with the first of the same shape."""
    columns: dict[str, dict[str, Any]] = {}
    for place, column in enumerate(COLUMNS):
        cell = cells[system.label, column]
        ms = spread([1e3 * one for one in cell.seconds], 2)
        columns[column] = {
            "visual_tokens": round(_tokens(parts.config, column), 1),
            "paper_visual_tokens": system.paper_tokens[place] if system.paper_tokens else None,
            "ms": ms,
            "paper_ms": system.paper_ms[place] if system.paper_ms else None,
            "tflop": round(cell.flop / 1e12, 4),
            "of_ceiling": round(cell.flop / 1e9 / ms["median"] / ceiling["matmul_tflops"], 3),
        }
        if base is not system:
            columns[column] |= {
                "times_faster": times_faster(cells[base.label, column].seconds, cell.seconds),
                "paper_times_faster": round(base.paper_ms[place] / system.paper_ms[place], 3)
                if base.paper_ms and system.paper_ms
                else None,
            }
    return {
        "name": system.name,
        "backbone": system.backbone,
        "size": system.size,
        "shape": system.shape,
        "visual_token_compression": system.compression,
        "columns": columns,
    }


def _print(systems: Sequence[System], recorded: Sequence[Mapping[str, Any]], title: str) -> None:
    numbers = ("visual tokens", "ms", "ms on L20", "of ceiling", "times faster", "on L20")
    table = console.table("system", "input", *numbers, title=title, right=numbers)
    for system, one in zip(systems, recorded, strict=True):
        for column, cell in one["columns"].items():
            faster = cell.get("times_faster")
            table.add_row(
                system.label,
                column,
                f"{cell['visual_tokens']:,.1f}",
                f"{cell['ms']['median']:,.1f}",
                _printed(cell["paper_ms"], 1),
                f"{cell['of_ceiling']:.2f}",
                f"{faster['median']:.2f} ({faster['min']:.2f} to {faster['max']:.2f})" if faster else "",
                _printed(cell["paper_times_faster"], 2) if faster else "",
            )
    console.out.print(table)


def _printed(value: float | None, digits: int) -> str:
    """What the paper has, a dash for what it does not."""
    return "-" if value is None else f"{value:,.{digits}f}"
