"""``quarterlight bench parts``: where the time of embedding an item goes, and a picture of it."""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from quarterlight.cli import console
from quarterlight.cli.measure import ceiling_of, find_dtype, rounds, spread, with_compression
from quarterlight.errors import InputError, did_you_mean
from quarterlight.images import describe

if TYPE_CHECKING:
    from quarterlight.models.embedder import Embedder
    from quarterlight.records import Item

READING, TILES, NORMALISING, TOWER, CONNECTOR, LANGUAGE, REST = PARTS = (
    "reading and decoding",
    "cutting into tiles",
    "normalising",
    "vision tower",
    "connector and compression",
    "language model",
    "the rest",
)
"""In the order in which they come; the rest is the tokenizer, batching, and words and pictures put into one row."""

COLOURS = ("#56B4E9", "#0072B2", "#CC79A7", "#E69F00", "#F0E442", "#009E73", "#999999")
"""Of the parts (Okabe and Ito): apart for every eye."""

CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
ALONE, THREADS = "one thread", "threads read meanwhile"


class Clock:
    """Seconds of named parts of what one thread does.

    A part may lie within another, from which its time is then taken away: the parts add up to the outermost.

    now: the time in seconds; on a GPU it has to wait for what was started.
    seconds: by part.  num_entered: how often a part was begun.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.num_entered = 0
        self._now = now
        self._within = 0.0  # of the part that is open, what belongs to others

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time inside this ``with``."""
        self.num_entered += 1
        within, self._within = self._within, 0.0
        start = self._now()
        try:
            yield
        finally:
            taken = self._now() - start
            self.seconds[name] += taken - self._within
            self._within = within + taken

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose calls are a part."""

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return call

    def take(self) -> dict[str, float]:
        """The seconds so far, from which it starts anew."""
        taken, self.seconds = self.seconds, defaultdict(float)
        return taken


@contextlib.contextmanager
def timing(embedder: Embedder, clock: Clock) -> Iterator[None]:
    """Inside this ``with``, the parts of an embedder's work are timed; what it computes is the same."""
    model: Any = embedder.model
    images, backbone = embedder.processor.image_processor, embedder._backbone
    places = [
        (embedder._formatter, "cut", READING),
        (images, "cut", TILES),
        (images, "normalize_tiles", NORMALISING),
        (backbone, "see", CONNECTOR),
        (model.get_submodule(backbone.eyes[0]), "forward", TOWER),
        (model.language_model, "forward", LANGUAGE),
    ]
    with contextlib.ExitStack() as undo:
        for owner, name, part in places:
            vars(owner)[name] = clock.timed(part, getattr(owner, name))  # past what a module does when it is set
            undo.callback(vars(owner).pop, name)
        yield


class _Case(NamedTuple):
    """Items of a kind with an s."""

    kind: str
    compression: int


class _Round(NamedTuple):
    """Seconds of the parts of one call, and tokens that it did not read because others began alike."""

    seconds: Mapping[str, float]
    tokens_spared: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def bench_parts(
    model: Annotated[str, typer.Option(help="A bundled name, a checkpoint folder or a hub id.")] = "nano",
    shape: Annotated[str | None, typer.Option(help="InternVL3 shape with random weights instead: 1B or 2B.")] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option("--kind", help="text, image or page; may be repeated.", show_default="all"),
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Texts, pictures and pages, of each so many.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; one more warms up.")] = 3,
    timed_by: Annotated[
        str,
        typer.Option("--clock", help="wall, or processor: time of this process alone, for a machine that is shared."),
    ] = "wall",
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the faster here.")] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    threads: Annotated[
        bool, typer.Option(help="Also time it with threads that read meanwhile; not by the processor's clock.")
    ] = True,
    records: Annotated[
        list[Path] | None, typer.Option("--from", help="Measure nothing, draw these records; may be repeated.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the parts into this file, .png or .svg.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON record to this file.")] = None,
) -> None:
    """Measure the parts of the time of embedding generated texts, pictures and pages, with s = 1 and the model's own s.

    Reading and computing take turns in one thread, so that the parts add up. Beside them stands the time with threads
    that read meanwhile, and the least that vision tower and language model could take, their operations at the speed
    of a large matrix product on this machine. Items of a kind are embedded by one call.

    \b
    quarterlight bench parts --out benchmarks/results/parts-nano.json
    quarterlight bench parts --from benchmarks/results/parts-nano.json --plot docs/images/parts.png
    """
    if records:
        if plot is None:
            raise InputError("--from needs --plot: it says what to draw, not where to.")
        _check(plot)
        draw([_read(file) for file in records], plot)
        return
    if plot is not None:
        _check(plot)
    record = _measure(model, shape, kinds, items, repeats, timed_by, dtype, device, threads)
    _print(record)
    console.print_record(record, out)
    if plot is not None:
        draw([record], plot)


def _measure(
    model: str,
    shape: str | None,
    kinds: Sequence[str] | None,
    number: int,
    repeats: int,
    timed_by: str,
    wanted_dtype: str | None,
    device: str,
    with_threads: bool,
) -> dict[str, Any]:
    import torch

    from quarterlight.cli.bench_infer import BATCH, _checkpoint, _chosen, _items
    from quarterlight.models.embedder import Embedder

    if timed_by not in CLOCKS:
        raise InputError(f"--clock is wall or processor, got {timed_by!r}. {did_you_mean(timed_by, CLOCKS)}")
    chosen = _chosen(kinds, BATCH, "kind")
    dtype = find_dtype(wanted_dtype, device)
    name_of_dtype = str(dtype).removeprefix("torch.")
    now = CLOCKS[timed_by]

    def waited() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return now()

    with torch.inference_mode(), console.progress("runs") as bar, tempfile.TemporaryDirectory() as scratch:
        waiting = bar.add_task("Building", total=None)
        ceiling = ceiling_of(device, dtype, now)
        folder = _checkpoint(Path(scratch), shape, dtype) if shape else model
        ours = Embedder(folder, dtype=dtype, device=device, num_workers=0)
        own = ours.model.config.visual_token_compression
        alone = {s: ours if s == own else _compressing(ours, s) for s in sorted({1, own})}
        threads = {s: Embedder.from_model(one.model, one.processor, one.settings) for s, one in alone.items()}
        loads = {kind: _items(Path(scratch) / kind, {kind: 1.0}, number)[0][1] for kind in chosen}
        cases = [_Case(kind, s) for kind in loads for s in alone]
        clock = Clock(waited)
        found: dict[_Case, list[_Round]] = {case: [] for case in cases}

        def run(case: _Case, how: str) -> None:
            if how == THREADS:
                threads[case.compression].encode_document(loads[case.kind])
                return
            embedder = alone[case.compression]
            embedder.work = type(embedder.work)()
            with timing(embedder, clock), clock.part(REST):
                embedder.encode_document(loads[case.kind])
            found[case].append(_Round(clock.take(), embedder.work.tokens_spared))

        # what is done meanwhile spares time of the wall, not of the processor
        ways = (ALONE, THREADS) if with_threads and timed_by == "wall" else (ALONE,)
        runs = {(case, how): functools.partial(run, case, how) for case in cases for how in ways}
        bar.remove_task(waiting)
        line = bar.add_task("Timing", total=(1 + repeats) * len(runs))
        times = rounds(runs, repeats, device, lambda: bar.advance(line))
        cells = [
            _cell(case, alone[case.compression], loads[case.kind], found[case][1:], times.get((case, THREADS)), ceiling)
            for case in cases
        ]
    return {
        "benchmark": "parts",
        "settings": {
            "model": shape or model,
            "dtype": name_of_dtype,
            "device": device,
            "items": number,
            "repeats": repeats,
            "clock": timed_by,
            "threads_that_read": getattr(threads[own]._workers, "_max_workers", 0),
        },
        "ceiling": {name: round(value, 4) for name, value in ceiling.items()},
        "clock_ms_per_item": round(_cost(waited) * clock.num_entered / len(cases) / (1 + repeats) / number, 4),
        "cases": cells,
    }


def _compressing(embedder: Embedder, compression: int) -> Embedder:
    """The same weights with another s, in one thread."""
    from quarterlight.models.embedder import Embedder

    model, processor = with_compression(embedder.model, embedder.processor, compression)
    return Embedder.from_model(model, processor, embedder.settings, num_workers=0)


def _cell(
    case: _Case,
    embedder: Embedder,
    items: list[Item],
    found: Sequence[_Round],
    with_threads: Sequence[float] | None,
    ceiling: Mapping[str, float],
) -> dict[str, Any]:
    """What was measured of a case, in ms an item; the parts are those of the round whose time is the median.

    The floor of the vision tower is that of the connector too.
    """
    from quarterlight.cli.bench_infer import PAGE_TILES, _work
    from quarterlight.models.flops import text_flop, vision_flop

    config, each = embedder.model.config, 1e3 / len(items)
    median = statistics.median_low(one.total for one in found)
    typical = next(one for one in found if one.total == median)
    tokens, flop = _work(embedder, [(case.kind, items)])
    vision = len(items) * vision_flop(config, {"text": 0, "image": 1, "page": PAGE_TILES + 1}[case.kind])
    text = flop - vision - typical.tokens_spared * text_flop(config, 1)
    return {
        "kind": case.kind,
        "compression": case.compression,
        "tokens_per_item": round(tokens / len(items), 1),
        "ms_per_item": spread([each * one.total for one in found]),
        "parts_ms": {name: round(each * typical.seconds.get(name, 0.0), 4) for name in PARTS},
        "floor_ms": {
            name: round(each * one / ceiling["matmul_tflops"] / 1e12, 4)
            for name, one in ((TOWER, vision), (LANGUAGE, text))
        },
        "threads_ms_per_item": with_threads and spread([each * one for one in with_threads]),
    }


def _cost(now: Callable[[], float]) -> float:
    """Milliseconds that timing a part takes."""
    clock = Clock(now)
    empty = clock.timed("nothing", lambda: None)
    start = now()
    for _ in range(1000):
        empty()
    return now() - start


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{describe(file)} cannot be read as a record: {error}.") from error
    if not isinstance(record, dict) or record.get("benchmark") != "parts":
        raise InputError(f"{describe(file)} is no record of `quarterlight bench parts --out`.")
    return record


def _name(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    return f"{settings['model']}, {settings['dtype']}, {settings['device']}"


def _print(record: Mapping[str, Any]) -> None:
    columns = ("read", "tiles", "normalise", "tower", "connector", "language", "rest", "in all", "threaded", "floor")
    table = console.table("items", "s", *columns, title=f"{_name(record)}: ms an item", right=("s", *columns))
    for cell in record["cases"]:
        with_threads = cell["threads_ms_per_item"]
        table.add_row(
            cell["kind"],
            str(cell["compression"]),
            *(f"{cell['parts_ms'][name]:,.2f}" for name in PARTS),
            f"{cell['ms_per_item']['median']:,.2f}",
            f"{with_threads['median']:,.2f}" if with_threads else "",
            f"{sum(cell['floor_ms'].values()):,.2f}",
        )
    console.out.print(table)
    console.out.print(
        f"Floor: operations of vision tower, connector and language model at {record['ceiling']['matmul_tflops']:.3f} "
        f"TFLOP/s. Timing itself takes {record['clock_ms_per_item']:.3f} ms an item.",
        soft_wrap=True,
    )


def _check(plot: Path) -> None:
    """Raises what would go wrong when it is drawn, which is after minutes of measuring."""
    import matplotlib.figure  # noqa: F401

    if plot.suffix.lower() not in (".png", ".svg"):
        raise InputError(f"--plot draws a .png or .svg file, got {describe(plot)}.")


def draw(records: Sequence[Mapping[str, Any]], file: Path) -> None:
    """A row of panels for each record and a panel for each kind of item: a bar for each s, its floor beside it."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    kinds = list(dict.fromkeys(cell["kind"] for record in records for cell in record["cases"]))
    size = (2.1 + 2.3 * len(kinds), 0.6 + 2.7 * len(records))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(records), len(kinds), squeeze=False)
    for row, record in zip(panels, records, strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            cells = [cell for cell in record["cases"] if cell["kind"] == kind]
            unit, scale = ("s", 1e3) if any(cell["ms_per_item"]["median"] > 2e3 for cell in cells) else ("ms", 1.0)
            for place, cell in enumerate(cells):
                _bar(axes, place, cell, scale)
            axes.set_title(f"{record['settings']['model']}: {kind}", fontsize=10)
            axes.set_xticks(range(len(cells)), [f"s = {cell['compression']}" for cell in cells])
            axes.set_xlim(-0.6, len(cells) - 0.2)
            axes.set_ylabel(unit)
            axes.spines[["top", "right"]].set_visible(False)
    legend: list[Any] = [Patch(color=colour, label=name) for name, colour in zip(PARTS, COLOURS, strict=True)][::-1]
    legend.append(Patch(facecolor="white", edgecolor="#555555", hatch="////", label="floor of both models"))
    if any(cell["threads_ms_per_item"] for record in records for cell in record["cases"]):
        from matplotlib.lines import Line2D

        legend.append(Line2D([], [], color="black", linestyle="--", label="threads read meanwhile"))
    figure.legend(handles=legend, loc="outside right center", fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _bar(axes: Any, place: float, cell: Mapping[str, Any], scale: float) -> None:
    bottom = 0.0
    for name, colour in zip(PARTS, COLOURS, strict=True):
        height = cell["parts_ms"][name] / scale
        axes.bar(place, height, 0.5, bottom, color=colour)
        bottom += height
    bottom = 0.0
    for name, height in cell["floor_ms"].items():
        colour = COLOURS[PARTS.index(name)]
        axes.bar(place + 0.37, height / scale, 0.16, bottom, facecolor="white", edgecolor=colour, hatch="////")
        bottom += height / scale
    if with_threads := cell["threads_ms_per_item"]:
        height = with_threads["median"] / scale
        axes.plot([place - 0.3, place + 0.3], [height, height], color="black", linestyle="--", linewidth=1.2)
