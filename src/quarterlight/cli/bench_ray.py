"""``quarterlight bench ray``: how the speed of bulk embedding grows with the workers of a Ray cluster."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from quarterlight.cli import console
from quarterlight.cli.measure import spread
from quarterlight.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from quarterlight.index import ModelIdentity
    from quarterlight.search.embed import Engine

KINDS = ("text", "image")
"""A list of texts, which nobody has to decode, and a folder of pictures."""

WARM = 0.25
"""Share of the items that are done before the clock starts: until then models are loaded and queues filled."""

ITEMS_PER_SHARD = 100
SHARDS_PER_WORKER = 4
"""Fewer are embedded too, but some workers then have one more than others, and the speed tells of that alone."""

WORDS_PER_TEXT = 30

BAR = 0.85
"""What at least is left of the speed that so many workers should have by that of the fewest."""


def bench_ray(
    workers: Annotated[
        list[int] | None, typer.Option(min=1, help="Copies of the model; may be repeated.", show_default="1, 2")
    ] = None,
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="text or image; may be repeated.", show_default="both")
    ] = None,
    items: Annotated[int, typer.Option(min=20, help="Texts and pictures, of each so many.")] = 1500,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs every number of workers once.")] = 2,
    model: Annotated[str, typer.Option(help="A bundled name, a checkpoint folder or a hub id.")] = "nano",
    address: Annotated[str, typer.Option("--ray", help="A cluster as for `embed`; `local` starts one here.")] = "local",
    out: Annotated[Path | None, typer.Option(help="Also write the JSON record to this file.")] = None,
) -> None:
    """Embed generated texts and pictures as `quarterlight embed --ray` does, by more and more workers.

    The speed is that of the last three quarters of the items, when all workers have their models. Workers share the
    cores with whoever decodes pictures and writes shards, so pictures tell when the cores run out; texts need no
    decoding.

    \b
    quarterlight bench ray --out benchmarks/results/ray-nano.json
    quarterlight bench ray --ray auto --workers 1 --workers 2 --workers 4 --workers 8 --items 20000
    """
    from quarterlight.search.cluster import Cluster, embedder_opener

    for name in kinds or ():
        if name not in KINDS:
            raise InputError(f"There is no kind {name!r}. {did_you_mean(name, KINDS)}")
    counts = sorted(set(workers or (1, 2)))
    chosen = [kind for kind in KINDS if not kinds or kind in kinds]
    with tempfile.TemporaryDirectory() as scratch, console.progress("runs") as bar:
        line = bar.add_task("Generating", total=len(chosen) * repeats * len(counts))
        corpora = {kind: _corpus(Path(scratch) / kind, kind, items) for kind in chosen}
        engines = {count: Cluster.connect(address, embedder_opener(model), num_workers=count) for count in counts}
        for engine in engines.values():
            engine.check()  # rather than when it is its turn
        bar.update(line, description="Embedding")
        identities = [engine.identity() for engine in engines.values()]  # each opens the model before its time runs
        identity = identities[0]
        cores = _cores()
        cells = [
            cell
            for kind, corpus in corpora.items()
            for cell in scaling(kind, corpus, engines, identity, repeats, lambda: bar.advance(line))
        ]
    columns = ("workers", "items/s", "seconds in all", "of linear")
    table = console.table("items", *columns, title=f"{model} on a Ray cluster of {cores:g} CPUs", right=columns)
    for cell in cells:
        rate = cell["items_per_s"]
        table.add_row(
            cell["kind"],
            str(cell["workers"]),
            f"{rate['median']:,.1f} ({rate['min']:,.1f} to {rate['max']:,.1f})",
            f"{cell['seconds']['median']:,.1f}",
            f"{cell['of_linear']:.2f}",
        )
    console.out.print(table)
    if items < (enough := SHARDS_PER_WORKER * ITEMS_PER_SHARD * counts[-1]):
        few = f"{items:,} items are too few shards for {counts[-1]} workers to have equal shares"
        console.out.print(f"{few}: give --items {enough} or more.", soft_wrap=True)
    record = {
        "benchmark": "ray",
        "settings": {
            "model": model,
            "items": items,
            "repeats": repeats,
            "cpus_of_the_cluster": cores,
            "items_per_shard": ITEMS_PER_SHARD,
        },
        "cases": cells,
        "bar": BAR,
    }
    console.print_record(record, out)


def scaling(
    kind: str,
    corpus: Path,
    engines: Mapping[int, Engine],
    identity: ModelIdentity,
    repeats: int,
    on_run: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Items per second of a corpus by each engine, in turns, and what that is of the first one's times the workers.

    engines: by their number of workers, fewest first.
    """
    rates: dict[int, list[float]] = {count: [] for count in engines}
    whole: dict[int, list[float]] = {count: [] for count in engines}
    for turn in range(repeats):
        for count in list(engines)[:: 1 if turn % 2 == 0 else -1]:
            rate, taken = _run(corpus, engines[count], identity)
            rates[count].append(rate)
            whole[count].append(taken)
            on_run()
    fewest = next(iter(engines))
    of_one = spread(rates[fewest])["median"] / fewest
    return [
        {
            "kind": kind,
            "workers": count,
            "items_per_s": spread(rates[count], 2),
            "seconds": spread(whole[count], 1),
            "of_linear": round(spread(rates[count])["median"] / count / of_one, 3),
        }
        for count in engines
    ]


def _run(corpus: Path, engine: Engine, identity: ModelIdentity) -> tuple[float, float]:
    """Items per second once it is warm, and seconds of the whole."""
    from quarterlight.index.shards import ShardFolder
    from quarterlight.search.embed import EmbedConfig, embed

    seen: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        report = embed(
            [corpus],
            ShardFolder.create(Path(folder) / "shards", identity),
            engine,
            config=EmbedConfig(items_per_shard=ITEMS_PER_SHARD),
            on_progress=lambda done, _: seen.append((done, time.perf_counter())),
        )
    if report.problems:
        raise InputError(f"{len(report.problems)} items were not embedded, first {report.problems[0]}.")
    return steady_rate(seen), report.seconds


def steady_rate(seen: Sequence[tuple[int, float]]) -> float:
    """Items per second after the first quarter, or of all of them where no later one is known.

    seen: items done, and when, from the beginning to the end.

    >>> steady_rate([(0, 0.0), (20, 9.0), (40, 10.0), (60, 11.0), (100, 12.0)])
    30.0
    """
    total, end = seen[-1]
    begun, start = next((done, at) for done, at in seen if done >= WARM * total)
    if begun == total:
        begun, start = seen[0]
    return (total - begun) / (end - start)


def _corpus(folder: Path, kind: str, number: int) -> Path:
    """A list of texts, or a folder of pictures."""
    from quarterlight.cli.generated import write_picture
    from quarterlight.prompts import QUERY_INSTRUCTIONS

    folder.mkdir()
    if kind == "image":
        for place in range(number):
            write_picture(folder / f"{place}.jpg", place)
        return folder
    vocabulary = " ".join(QUERY_INSTRUCTIONS.values()).split()
    rng = np.random.default_rng(0)
    lines = (
        json.dumps({"id": place, "text": " ".join(rng.choice(vocabulary, WORDS_PER_TEXT))}) for place in range(number)
    )
    file = folder / "texts.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def _cores() -> float:
    import ray

    return float(ray.cluster_resources().get("CPU", 0))
