"""``quarterlight bench train``: time and memory of optimiser steps, with the trainers that the pipeline uses."""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer

from quarterlight.cli import console
from quarterlight.cli.measure import MemoryPeak, compressed_config, with_compression
from quarterlight.errors import InputError, did_you_mean

_Result = TypeVar("_Result")


class What(StrEnum):
    """What is measured."""

    vtc = "vtc"
    gradcache = "gradcache"
    stages = "stages"


DEFAULTS: Mapping[What, Mapping[str, Any]] = {
    What.vtc: {"shape": "2B", "batch": 4, "max_tiles": 1, "attention": None, "recompute": True, "repeats": 3},
    What.gradcache: {"shape": "nano", "batch": 4096, "attention": None, "chunk_tokens": 2048, "repeats": 3},
    What.stages: {
        "shape": "1B",
        "batch": 2,
        "max_tiles": 1,
        "attention": None,
        "recompute": True,
        "max_tokens": 1024,
    },
}
"""The options that each measurement heeds, and their values when they are not given."""

NEGATIVES = {"warmup": 0, "hard_negatives": 2, "finetune": 12}
"""Hard negatives of a row in each contrastive stage (Magic-MM-Embedding, Table 14)."""

SMALL_BATCH = 64
"""What the large batch of ``gradcache`` is compared with."""

PLAIN_BATCHES = (SMALL_BATCH, 512)
"""Batches of plain backpropagation; the one with the least time per pair stands for it."""


def _shown(name: str) -> str:
    """The defaults of an option, for its help."""
    return ", ".join(f"{what.value} {values[name]}" for what, values in DEFAULTS.items() if name in values)


_TEXT_MAX_TOKENS = 64
_RANK = 16


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Optimiser steps of one kind.

    batch: pairs, each with one picture.  seconds: of a step, median over the rounds.
    peak_gib: the most memory of the process in 2^30 bytes (on a GPU, that torch allocated there) over the rounds, with
    the weights; ``None`` where the system does not tell.
    """

    name: str
    batch: int
    seconds: float
    images_per_s: float
    peak_gib: float | None


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A ratio over the rounds in which both sides ran, one after the other."""

    median: float
    least: float
    most: float


def bench_train(
    what: Annotated[What, typer.Option(help="What is measured.")],
    shape: Annotated[
        str | None, typer.Option(help="InternVL3 shape (1B, 2B, 8B, 14B), or nano.", show_default=_shown("shape"))
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Pairs of a step (gradcache: of the large one).", show_default=_shown("batch")),
    ] = None,
    max_tiles: Annotated[
        int | None,
        typer.Option(
            help="Pictures of one tile (1), or of four and a thumbnail (4).", show_default=_shown("max_tiles")
        ),
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="sdpa or eager.", show_default="sdpa on a GPU, eager on a CPU")
    ] = None,
    recompute: Annotated[
        bool | None,
        typer.Option("--recompute/--keep", help="Gradient checkpointing, or all activations kept.", show_default="on"),
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a chunk, padding included.", show_default=_shown("chunk_tokens")),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a pack of restoration.", show_default=_shown("max_tokens"))
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Rounds; one more warms up.", show_default=_shown("repeats"))
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON record to this file.")] = None,
) -> None:
    """Time optimiser steps and measure their memory, on the GPU if there is one.

    \b
    vtc        a contrastive LoRA step with visual token compression (s = 2) and without, on the same pictures
    gradcache  a batch of any size in the memory of a small one, and what that costs in time
    stages     a step of each stage of the paper's recipe, each in a process of its own

    Weights are random and pictures generated; pairs are a short text and a picture. Every step is one of the pipeline's
    own trainers: data, forward, backward, AdamW.

    \b
    quarterlight bench train --what vtc --shape 2B --out benchmarks/results/train-vtc-2b.json
    quarterlight bench train --what gradcache
    quarterlight bench train --what stages --shape 1B --batch 1
    """
    given = {
        "shape": shape,
        "batch": batch,
        "max_tiles": max_tiles,
        "attention": attention,
        "recompute": recompute,
        "chunk_tokens": chunk_tokens,
        "max_tokens": max_tokens,
        "repeats": repeats,
    }
    settings = _settings(what, {name: value for name, value in given.items() if value is not None})
    measure = {What.vtc: _vtc, What.gradcache: _gradcache, What.stages: _stages}[what]
    record = {"benchmark": f"train-{what.value}", "settings": settings, **measure(settings)}
    console.print_record(record, out)


def _settings(what: What, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a measurement. Raises InputError for one that it would ignore, or that cannot be."""
    import torch

    from quarterlight.models.shapes import SHAPES

    for name in given:
        if name not in DEFAULTS[what]:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"--what {what.value} has no use for {flag}: leave it out.")
    settings = {**DEFAULTS[what], **given}
    if settings["shape"] not in (*SHAPES, "nano"):
        known = did_you_mean(settings["shape"], [*SHAPES, "nano"])
        raise InputError(f"There is no shape {settings['shape']!r}. {known}")
    if settings.get("max_tiles", 1) not in (1, 4):
        raise InputError(f"--max-tiles is 1 or 4, got {settings['max_tiles']}.")
    settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    # fused attention is slow backwards on CPUs
    settings["attention"] = settings["attention"] or ("sdpa" if settings["device"] == "cuda" else "eager")
    if settings["attention"] not in ("sdpa", "eager"):
        raise InputError(f"--attention is sdpa or eager, got {settings['attention']!r}.")
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# The three measurements
# ---------------------------------------------------------------------------------------------------------------------


def _vtc(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Steps with s = 2 and s = 1 take turns on one set of weights."""
    factors = (2, 1)
    rounds: dict[int, list[tuple[float, int | None]]] = {factor: [] for factor in factors}
    with tempfile.TemporaryDirectory() as folder, console.progress("steps") as bar:
        waiting = bar.add_task(f"Building {settings['shape']}", total=None)
        model, processor = _build(settings, lora=True)
        side = processor.image_processor.size.height * (1 if settings["max_tiles"] == 1 else 2)
        pairs = _pairs(Path(folder), settings["batch"], side, max_tiles=settings["max_tiles"])
        runs = {factor: _contrast(*with_compression(model, processor, factor), pairs, settings) for factor in factors}
        bar.remove_task(waiting)
        line = bar.add_task("Timing", total=(1 + settings["repeats"]) * len(factors))
        for turn in range(1 + settings["repeats"]):
            for factor in factors if turn % 2 else reversed(factors):
                rounds[factor].append(runs[factor](settings["batch"], 1))
                bar.advance(line)
    steps = {factor: _steps(f"s = {factor}", settings["batch"], rounds[factor][1:]) for factor in factors}
    ratio = _spread(rounds[1][1:], rounds[2][1:])
    arithmetic = _arithmetic(model.config, processor, settings, pairs)
    _print_steps(steps.values(), f"One LoRA step of {settings['shape']}, {settings['device']}")
    memory = _memory_ratio(steps[1], steps[2])
    console.out.print(
        f"s = 2 trains {ratio.median:.2f} times as many images a second ({ratio.least:.2f} to {ratio.most:.2f}); by "
        f"arithmetic alone it would be {arithmetic:.2f}. "
        + (f"s = 1 takes {memory:.2f} times the memory.\n" if memory else "\n"),
        soft_wrap=True,
    )
    return {
        "runs": [asdict(one) for one in steps.values()],
        "images_per_s_ratio": asdict(ratio),
        "arithmetic_ratio": arithmetic,
        "memory_ratio": memory,
    }


def _gradcache(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Memory in a process for each batch; times in one process, taking turns over the same number of pairs."""
    large, small = settings["batch"], SMALL_BATCH
    if large <= max(PLAIN_BATCHES):
        raise InputError(f"--batch of gradcache must be above {max(PLAIN_BATCHES)}, got {large}.")
    chunks = settings["chunk_tokens"]
    ways: list[tuple[str, int, int | None]] = [("in chunks", small, chunks), ("in chunks", large, chunks)]
    plain: list[tuple[str, int, int | None]] = [("plain", one, None) for one in PLAIN_BATCHES]
    rounds: dict[tuple[str, int, int | None], list[tuple[float, int | None]]] = {way: [] for way in (*ways, *plain)}
    with tempfile.TemporaryDirectory() as folder, console.progress("runs") as bar:
        waiting = bar.add_task("Making pictures", total=None)
        model, processor = _build(settings, lora=False)
        side = processor.image_processor.size.height
        pairs = _pairs(Path(folder), large, side, max_tiles=1)
        bar.remove_task(waiting)
        line = bar.add_task("Measuring", total=len(rounds) * (2 + settings["repeats"]))
        peaks = {}
        for way in rounds:
            peaks[way] = _alone(_peak_of, dict(settings), pairs, way)
            bar.advance(line)
        run = _contrast(model, processor, pairs, settings)
        for turn in range(1 + settings["repeats"]):
            for way in rounds if turn % 2 else reversed(list(rounds)):
                _, size, budget = way
                rounds[way].append(run(size, max(1, max(PLAIN_BATCHES) // size), chunk_tokens=budget))
                bar.advance(line)
    steps = {
        way: replace(_steps(way[0], way[1], times[1:]), peak_gib=_in_gib(peaks[way])) for way, times in rounds.items()
    }
    fastest = min(plain, key=lambda way: steps[way].seconds / way[1])
    time_ratio = _spread(rounds[ways[1]][1:], rounds[fastest][1:], large / fastest[1])
    memory = _memory_ratio(steps[ways[1]], steps[ways[0]])
    _print_steps(steps.values(), f"{settings['shape']}, chunks of {chunks:,} tokens")
    if memory:
        console.out.print(f"A batch of {large:,} takes {memory:.2f} times the memory of one of {small:,}.")
    console.out.print(
        f"A pair takes {time_ratio.median:.2f} times as long ({time_ratio.least:.2f} to {time_ratio.most:.2f}) as in "
        f"plain backpropagation of {fastest[1]:,}.\n",
        soft_wrap=True,
    )
    return {
        "runs": [asdict(one) for one in steps.values()],
        "memory_ratio": memory,
        "time_per_pair_ratio": asdict(time_ratio),
        "plain_batch": fastest[1],
    }


def _stages(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A step of each stage in a process of its own."""
    results = []
    with tempfile.TemporaryDirectory() as folder, console.progress("stages") as bar:
        for stage in bar.track(("restore", *NEGATIVES), description="Training"):
            results.append(_alone(_stage, stage, dict(settings), folder))
    columns = ("trained", "rows", "seconds", "peak GiB", "loss")
    title = f"One step of each stage, {settings['shape']}, {settings['device']}"
    table = console.table("stage", *columns, title=title, right=columns)
    for one in results:
        table.add_row(
            one["stage"],
            f"{one['trained_parameters'] / 1e6:,.1f}M",
            one["rows"],
            f"{one['seconds']:,.1f}",
            _gib(one["peak_gib"]),
            f"{one['loss']:.3f}",
        )
    console.out.print(table)
    console.out.print()
    return {"runs": results}


def _stage(stage: str, settings: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """A step of one stage, in this process; one before it warms up, which loads libraries and touches all weights."""
    negatives = NEGATIVES.get(stage, 0)
    batch = settings["batch"]
    model, processor = _build(settings, lora=stage != "restore")
    side = processor.image_processor.size.height * (1 if settings["max_tiles"] == 1 else 2)
    num_pairs = 1 + batch * (1 + negatives) if stage != "restore" else 64
    pairs = _pairs(Path(folder) / stage, num_pairs, side, max_tiles=settings["max_tiles"], num_negatives=negatives)
    losses: list[float] = []
    if stage == "restore":
        rows = f"1 pack of {settings['max_tokens']:,} tokens"
        run = _restore(model, processor, pairs, settings, losses)
    else:
        rows = f"{batch} + {batch * (1 + negatives)} items"
        train = _contrast(model, processor, pairs, settings)
        run = functools.partial(train, batch, 1, num_negatives=negatives, losses=losses)
    _, first_peak = run()
    seconds, peak = run()
    return {
        "stage": stage,
        "trained_parameters": sum(one.numel() for one in model.parameters() if one.requires_grad),
        "rows": rows,
        "seconds": seconds,
        "peak_gib": _in_gib(max((one for one in (first_peak, peak) if one is not None), default=None)),
        "loss": losses[-1],
    }


def _peak_of(settings: Mapping[str, Any], pairs: Any, way: tuple[str, int, int | None]) -> int | None:
    """Peak memory of training on all pairs once, in this process, so that all ways have kept as many pictures."""
    model, processor = _build(settings, lora=False)
    _, size, budget = way
    num_pairs = len(pairs.tasks[0].queries)
    return _contrast(model, processor, pairs, settings)(size, num_pairs // size, chunk_tokens=budget)[1]


def _alone(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """The function's result, from a process of its own, in which no memory was used before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# ---------------------------------------------------------------------------------------------------------------------
# Models, data, steps
# ---------------------------------------------------------------------------------------------------------------------


def _build(settings: Mapping[str, Any], *, lora: bool) -> tuple[Any, Any]:
    """Model and processor of a shape with random weights and nano's tokenizer.

    lora: what the pipeline makes of the recipe: frozen bfloat16 weights with a float32 adapter.  Without it, float32
    weights that all train; of a large shape, with a language head, for restoration.
    """
    import torch

    from quarterlight.models.checkpoint import load_backbone
    from quarterlight.models.internvl_vtc.processing import InternVLVTCImageProcessor, InternVLVTCProcessor
    from quarterlight.models.shapes import build_random
    from quarterlight.training.lora import LoraRecipe, add_lora

    restores = not lora and "max_tokens" in settings
    dtype = torch.bfloat16 if lora else torch.float32
    if settings["shape"] == "nano":
        model, processor = load_backbone("nano", dtype=dtype, device=settings["device"], language_head=restores)
    else:
        model = build_random(
            settings["shape"],
            dtype=dtype,
            visual_token_compression=2,
            device=settings["device"],
            language_head=restores,
        )
        tokenizer = load_backbone("nano")[1].tokenizer
        height, width = model.config.vision_config.image_size
        processor = InternVLVTCProcessor(
            InternVLVTCImageProcessor(size={"height": height, "width": width}),
            tokenizer,
            image_seq_length=model.config.image_seq_length,
        )
        model.config.image_token_id = processor.image_token_id
    model.set_attn_implementation(settings["attention"])
    if lora:
        add_lora(model, LoraRecipe(rank=_RANK), seed=0)
    return model, processor


def _pairs(folder: Path, num_pairs: int, side: int, *, max_tiles: int, num_negatives: int = 0) -> Any:
    """A mixture of one task: a dozen words ask for a generated picture of ``side`` x ``side`` pixels."""
    from PIL import Image

    from quarterlight.data.contrastive import TaskMixture
    from quarterlight.data.retrieval import RetrievalTask, with_instructions
    from quarterlight.records import Candidate, Item, Query

    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    queries, candidates = [], []
    for number in range(num_pairs):
        file = folder / f"{number}.jpg"
        blobs = Image.fromarray(rng.integers(0, 256, size=(6, 6, 3), dtype=np.uint8))
        blobs.resize((side, side), Image.Resampling.BICUBIC).save(file, quality=85)
        candidates.append(Candidate(did=f"d{number}", item=Item(image=str(file), max_tiles=max_tiles)))
        others = [f"d{(number + 1 + other) % num_pairs}" for other in range(num_negatives)]
        text = " ".join(f"{word}" for word in (number, *rng.choice(_WORDS, 11)))
        queries.append(
            Query(qid=f"q{number}", item=Item(text=text), positives=(f"d{number}",), negatives=tuple(others))
        )
    task = RetrievalTask(dataset="generated", task="t2i", split="train", queries=queries, candidates=candidates)
    return TaskMixture(tasks=[with_instructions(task)], weights=[1.0])


_WORDS = ("red", "apple", "on", "a", "wooden", "table", "beside", "two", "green", "pears", "and", "old", "clock", "in")


def _contrast(
    model: Any, processor: Any, pairs: Any, settings: Mapping[str, Any]
) -> Callable[..., tuple[float, int | None]]:
    """A function that trains a few steps: ``run(batch, num_steps, ...)`` gives (seconds of a step, peak bytes)."""
    from quarterlight.models.inputs import InputFormatter
    from quarterlight.models.settings import EmbedderSettings
    from quarterlight.training.collate import Pictures, PromptEncoder
    from quarterlight.training.contrast import ContrastRecipe, train_contrastive
    from quarterlight.training.prompt_embedder import PromptEmbedder

    recompute = settings.get("recompute", False)
    formatter = InputFormatter(processor, EmbedderSettings(text_max_tokens=_TEXT_MAX_TOKENS))
    encode = PromptEncoder(formatter, Pictures(processor.image_processor))
    embedder = PromptEmbedder(model, shared_prefix=not recompute)

    def run(
        batch: int,
        num_steps: int,
        *,
        chunk_tokens: int | None = None,
        num_negatives: int = 0,
        losses: list[float] | None = None,
    ) -> tuple[float, int | None]:
        def train(folder: Path) -> Any:
            return train_contrastive(
                embedder,
                encode=encode,
                mixture=pairs,
                validation=[],
                recipe=ContrastRecipe(batch_size=batch, num_negatives=num_negatives, chunk_tokens=chunk_tokens),
                optimizer=_optimizer(num_steps, recompute=recompute, learning_rate=2e-4),
                folder=folder,
                seed=0,
            )

        return _measured(train, losses)

    return run


def _restore(
    model: Any, processor: Any, pairs: Any, settings: Mapping[str, Any], losses: list[float]
) -> Callable[[], tuple[float, int | None]]:
    """A function that trains one step of restoration on a pack of conversations about the pictures of the pairs."""
    from quarterlight.data.conversations import from_task
    from quarterlight.data.retrieval import RetrievalTask
    from quarterlight.records import Candidate, Item, Query
    from quarterlight.training.restore import RestoreRecipe, train_restore

    (task,) = pairs.tasks
    captions = [Candidate(did=query.qid, item=Item(text=query.item.text)) for query in task.queries]
    shown = [Query(qid=one.did, item=one.item, positives=(f"q{one.did[1:]}",)) for one in task.candidates]
    turned = RetrievalTask(dataset="generated", task="i2t", split="train", queries=shown, candidates=captions)

    def train(folder: Path) -> Any:
        return train_restore(
            model,
            processor,
            sources=[from_task(turned)],
            validation=[],
            recipe=RestoreRecipe(max_tokens=settings["max_tokens"], max_tiles=settings["max_tiles"], eval_every=0),
            optimizer=_optimizer(1, recompute=settings["recompute"], learning_rate=1e-5),
            folder=folder,
            seed=0,
        )

    return lambda: _measured(train, losses)


def _optimizer(num_steps: int, *, recompute: bool, learning_rate: float) -> Any:
    """The optimiser of the recipe, which keeps no checkpoints and says nothing."""
    from quarterlight.training.optimizer import OptimizerRecipe

    class Unsaved(OptimizerRecipe):
        def arguments(self, folder: Path, **options: Any) -> Any:
            return super().arguments(folder, **{**options, "save_strategy": "no", "disable_tqdm": True})

    return Unsaved(
        num_steps=num_steps, learning_rate=learning_rate, gradient_checkpointing=recompute, log_every=num_steps
    )


def _measured(train: Callable[[Path], Any], losses: list[float] | None) -> tuple[float, int | None]:
    """Seconds of a step of the trainer that ``train`` returns when it has run, and most bytes in use meanwhile."""
    import torch

    peak = MemoryPeak("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), peak:
        trainer = train(Path(folder))
    log = trainer.state.log_history
    if losses is not None:
        losses.extend(line["loss"] for line in log if "loss" in line)
    most = None if peak.total_mb is None else round(peak.total_mb * 2**20)
    return log[-1]["train_runtime"] / trainer.state.global_step, most


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and tables
# ---------------------------------------------------------------------------------------------------------------------


def _steps(name: str, batch: int, rounds: Sequence[tuple[float, int | None]]) -> Steps:
    seconds = statistics.median(time for time, _ in rounds)
    peaks = [peak for _, peak in rounds if peak is not None]
    return Steps(
        name=name,
        batch=batch,
        seconds=round(seconds, 4),
        images_per_s=round(batch / seconds, 3),
        peak_gib=_in_gib(max(peaks, default=None)),
    )


def _spread(
    slow: Sequence[tuple[float, int | None]], fast: Sequence[tuple[float, int | None]], scale: float = 1.0
) -> Spread:
    """How many times the seconds of ``fast`` those of ``slow`` are, round by round, divided by ``scale``."""
    ratios = [one[0] / other[0] / scale for one, other in zip(slow, fast, strict=True)]
    return Spread(median=round(statistics.median(ratios), 3), least=round(min(ratios), 3), most=round(max(ratios), 3))


def _in_gib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**30, 3)


def _memory_ratio(one: Steps, other: Steps) -> float | None:
    return round(one.peak_gib / other.peak_gib, 3) if one.peak_gib and other.peak_gib else None


def _arithmetic(config: Any, processor: Any, settings: Mapping[str, Any], pairs: Any) -> float:
    """Operations of a step with s = 1 over those with s = 2.

    The frozen tower runs forwards; the language model forwards (again, when activations are recomputed) and backwards
    to the activations, which is as much; the adapter's own products are left out.
    """
    from quarterlight.models import flops
    from quarterlight.models.inputs import InputFormatter
    from quarterlight.models.settings import EmbedderSettings

    formatter = InputFormatter(processor, EmbedderSettings(text_max_tokens=_TEXT_MAX_TOKENS))
    (task,) = pairs.tasks
    prompts = [formatter.prompt(task.queries[0].item, "query"), formatter.prompt(task.candidates[0].item, "document")]
    query, target = (one.num_tokens for one in formatter.tokenize(prompts))
    tiles = 1 if settings["max_tiles"] == 1 else 5
    passes = 3 if settings["recompute"] else 2
    work = []
    for factor in (1, 2):
        one = compressed_config(config, factor)
        tokens = target + 2 + tiles * one.image_seq_length
        work.append(
            flops.vision_flop(one, tiles) + passes * (flops.text_flop(one, query) + flops.text_flop(one, tokens))
        )
    return round(work[0] / work[1], 3)


def _print_steps(runs: Any, title: str) -> None:
    columns = ("batch", "s / step", "images / s", "peak GiB")
    table = console.table("", *columns, title=title, right=columns)
    for one in runs:
        cells = (f"{one.batch:,}", f"{one.seconds:,.2f}", f"{one.images_per_s:,.2f}", _gib(one.peak_gib))
        table.add_row(one.name, *cells)
    console.out.print(table)


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
