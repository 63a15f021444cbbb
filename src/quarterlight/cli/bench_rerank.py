"""``quarterlight bench rerank``: a reranker that shares what can be shared against one that reads each pair whole."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quarterlight.cli import console
from quarterlight.cli.measure import ceiling_of, find_dtype, rounds, times_faster
from quarterlight.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    from quarterlight.models.reranker import Reranker
    from quarterlight.records import Item

QUERY = "How do the training losses of both methods compare after ten epochs?"

TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Of scores, by dtype: visual tokens are stored as float16, and sums are made in another order."""

SHARED, READ, WHOLE = "stored tokens, shared prefix", "shared prefix", "each pair whole"
"""The systems: visual tokens from the index; from the pictures; and nothing shared between pairs."""


def bench_rerank(
    shape: Annotated[str, typer.Option(help="InternVL3 shape, for random weights, or a reranker.")] = "2B",
    candidates: Annotated[int, typer.Option(min=1, help="Pictures to rerank for one query of words.")] = 5,
    max_tiles: Annotated[int, typer.Option(min=1, help="Tiles of a picture: 4 and a thumbnail for pages.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs every system once. One more warms up.")] = 3,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the faster here.")] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write the JSON record to this file.")] = None,
) -> None:
    """Time reranking with visual tokens from the index, with pictures, and pair by pair, in one run.

    Pair by pair is how rerankers are usually run: the whole prompt with its picture through the whole model, logits of
    the last position.  All systems give the same scores, which is checked.  The floor is what the arithmetic of the
    first would take at the speed of one large matrix product.

    \b
    quarterlight bench rerank --shape 2B --candidates 5 --max-tiles 4 --out benchmarks/results/rerank-2b.json
    quarterlight bench rerank --shape runs/nano/rerank --candidates 20 --max-tiles 1 --repeats 20
    """
    import numpy as np
    import torch

    chosen = find_dtype(dtype, device)
    with torch.inference_mode(), console.progress("runs") as bar:
        waiting = bar.add_task(f"Building {shape}", total=None)
        ceiling = ceiling_of(device, chosen)
        reranker = _reranker(shape, chosen, device)
        items = _pictures(candidates, max_tiles, reranker)
        seen = reranker.eyes.visual_tokens(items)
        stored = [one.tokens.flatten(0, 1).to(torch.float16).cpu().numpy() for one in seen]
        tiles = sum(sum(one.tiles) for one in seen)
        bar.remove_task(waiting)
        systems = {
            SHARED: lambda: reranker.score(QUERY, items, visual_tokens=stored),
            READ: lambda: reranker.score(QUERY, items),
            WHOLE: lambda: _whole(reranker, items),
        }
        scores: dict[str, np.ndarray] = {}
        line = bar.add_task("Timing", total=(1 + repeats) * len(systems))
        runs = {name: functools.partial(_kept, scores, name, score) for name, score in systems.items()}
        times = rounds(runs, repeats, device, lambda: bar.advance(line))
    differ = max(float(np.abs(scores[name] - scores[WHOLE]).max()) for name in (SHARED, READ))
    if not differ < TOLERANCE[str(chosen).removeprefix("torch.")]:
        raise CheckpointError(f"The systems disagree: their scores differ by {differ:.1e}.")
    floors = _floors(reranker, items, seen, ceiling)
    ratios = {name: times_faster(times[WHOLE], times[name]) for name in (SHARED, READ)}
    title = f"{shape}, {str(chosen).removeprefix('torch.')}, {device}: {candidates} pictures, {tiles} tiles, one query"
    table = console.table(
        "system", "ms", "floor ms", "times faster", title=title, right=("ms", "floor ms", "times faster")
    )
    for name in systems:
        faster = f"{ratios[name]['median']:.2f}" if name in ratios else ""
        table.add_row(name, f"{1e3 * statistics.median(times[name]):,.1f}", f"{floors[name]:,.1f}", faster)
    console.out.print(table)
    console.out.print(
        f"Scores differ by {differ:.1e} at most. Floors from {ceiling['matmul_tflops']:.2f} TFLOP/s.\n", soft_wrap=True
    )
    record = {
        "benchmark": "rerank",
        "settings": {
            "shape": shape,
            "dtype": str(chosen).removeprefix("torch."),
            "device": device,
            "candidates": candidates,
            "max_tiles": max_tiles,
            "tiles": tiles,
            "repeats": repeats,
        },
        "ceiling": {name: round(value, 3) for name, value in ceiling.items()},
        "median_ms": {name: round(1e3 * statistics.median(one), 2) for name, one in times.items()},
        "floor_ms": {name: round(one, 2) for name, one in floors.items()},
        "times_faster": ratios,
        "largest_difference_of_scores": differ,
    }
    console.print_record(record, out)


def _kept(scores: dict[str, Any], name: str, score: Callable[[], Any]) -> None:
    scores[name] = score()


def _reranker(shape: str, dtype: Any, device: str) -> Reranker:
    """A model of the shape with random weights and a tokenizer that has, as InternVL3's, a token for most words of the
    template; or the reranker of that name."""
    from quarterlight.models.internvl_vtc.processing import InternVLVTCImageProcessor, InternVLVTCProcessor
    from quarterlight.models.reranker import Reranker
    from quarterlight.models.settings import RerankerSettings
    from quarterlight.models.shapes import SHAPES, build_random
    from quarterlight.models.tokenizer import train_tokenizer
    from quarterlight.prompts import POINTWISE, QUERY_INSTRUCTIONS

    if shape not in SHAPES:
        return Reranker(shape, dtype=dtype, device=device)
    model = build_random(shape, dtype=dtype, device=device, visual_token_compression=2, language_head=True)
    tokenizer = train_tokenizer([POINTWISE, QUERY, *QUERY_INSTRUCTIONS.values(), "user assistant Candidate:"] * 4, 1000)
    model.config.image_token_id = tokenizer.context_image_token_id
    processor = InternVLVTCProcessor(
        InternVLVTCImageProcessor(), tokenizer, image_seq_length=model.config.image_seq_length
    )
    return Reranker.from_model(model, processor, RerankerSettings(), name=shape)


def _pictures(number: int, max_tiles: int, reranker: Reranker) -> list[Item]:
    """Noise, square or of the shape of a page."""
    import numpy as np
    from PIL import Image

    from quarterlight.records import Item

    side = reranker.processor.image_processor.size.height
    noise = np.random.default_rng(0)
    height, width = (side, side) if max_tiles == 1 else (2 * side, 2 * side)
    return [
        Item(image=Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)), max_tiles=max_tiles)
        for _ in range(number)
    ]


def _whole(reranker: Reranker, items: Sequence[Item]) -> np.ndarray:
    """Each pair as one prompt with its picture through the whole model, one after the other."""
    import numpy as np
    import torch

    from quarterlight.images import load_image
    from quarterlight.models.inputs import TokenizedPrompt
    from quarterlight.records import Item

    formatter, processor, model = reranker.formatter, reranker.processor, reranker.model
    answers = [reranker.answers.yes, reranker.answers.no]
    scores = []
    for item in items:
        prompt = TokenizedPrompt(formatter.prefix(Item(text=QUERY)).runs + formatter.tails([item])[0].runs)
        (picture,) = item.images
        tiles = processor.image_processor.tiles(load_image(picture), formatter.max_tiles(item))
        ids, _ = formatter.tokenize.expand(prompt, [len(tiles)])
        pixels = processor.image_processor.normalize_tiles(torch.from_numpy(tiles).to(model.device))
        logits = model(
            input_ids=torch.tensor([ids], device=model.device),
            pixel_values=pixels.to(model.dtype),
            use_cache=False,
            logits_to_keep=1,
        ).logits
        scores.append(logits[0, -1, answers].float().softmax(0)[0].item())
    return np.array(scores, np.float32)


def _floors(
    reranker: Reranker, items: Sequence[Item], seen: Sequence[Any], ceiling: dict[str, float]
) -> dict[str, float]:
    """Milliseconds that the arithmetic of each system takes at the speed of one large matrix product."""
    from quarterlight.models import flops
    from quarterlight.records import Item

    formatter, config = reranker.formatter, reranker.model.config
    prefix = formatter.prefix(Item(text=QUERY)).num_tokens
    lengths = [
        tail.num_tokens + formatter.tokenize.num_image_tokens(sum(one.tiles))
        for tail, one in zip(formatter.tails(items), seen, strict=True)
    ]
    tower = flops.vision_flop(config, sum(sum(one.tiles) for one in seen))
    alone = flops.text_flop(config, prefix)
    pairs = [flops.text_flop(config, prefix + length) for length in lengths]
    shared = sum(pairs) - len(pairs) * alone  # the template and the query of further searches cost nothing or little
    flop = {SHARED: alone + shared, READ: tower + alone + shared, WHOLE: tower + sum(pairs)}
    return {name: 1e3 * one / ceiling["matmul_tflops"] / 1e12 for name, one in flop.items()}
