"""Table 9: warm-up with visual token compression against without, on nano: time, quality, largest batch.

    python benchmarks/reproduce/table9.py --data DATASETS --trunk runs/nano --out runs/reproduce

Both models start from the trunk's vision tower and a random language model, and take the same steps.  Time is that of
training steps on the same batches, taken in turns; memory is the growth of a process that takes one step.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import common
import torch

from quarterlight.data.retrieval import RetrievalDataset, with_instructions
from quarterlight.losses.info_nce import info_nce
from quarterlight.models.checkpoint import load_backbone, load_settings
from quarterlight.models.inputs import InputFormatter
from quarterlight.records import Item
from quarterlight.training.prompt_embedder import PromptEmbedder

BATCHES = (64, 128, 256, 512)
MEMORY_GB = 2.0
PAPER = {1: ("52 h 44 min", 62.9, 68.4, 6144), 2: ("22 h 57 min", 63.7, 68.5, 3456)}
"""Training time, MMEB, VisDoc, global batch, as printed; the batch sizes seem to be swapped."""


class Step:
    """One training step of a model on pictures and their names."""

    def __init__(self, folder: Path, data: Path, s: int) -> None:
        self.model, processor = load_backbone(folder, visual_token_compression=s)
        self.model.set_attn_implementation("eager")
        self.model.train()
        self.formatter = InputFormatter(processor, load_settings(folder))
        task = with_instructions(RetrievalDataset(data / "emoji").load("i2t", "train"))
        column = {one.did: one.item for one in task.candidates}
        self.pairs: list[tuple[Item, Item]] = [(one.item, column[one.positives[0]]) for one in task.queries]

    def inputs(self, batch: int) -> tuple[Any, Any]:
        queries, targets = zip(*self.pairs[:batch], strict=True)
        return self.formatter(queries, "query"), self.formatter(targets, "document")

    def __call__(self, inputs: tuple[Any, Any]) -> None:
        embed = PromptEmbedder(self.model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            query_BD, target_BD = (embed(one) for one in inputs)
        info_nce(query_BD, target_BD, temperature=0.05).backward()
        self.model.zero_grad(set_to_none=True)


def growth(folder: Path, data: Path, s: int, batch: int) -> float:
    """GB by which a new process grows when it takes a step of so many rows."""
    step = Step(folder, data, s)
    inputs = step.inputs(batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(inputs)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def main() -> None:
    arguments = common.arguments(__doc__, rounds=5)
    base = common.trunk(arguments, last="tower")
    scores, steps = {}, {}
    for s in (1, 2):
        values = {"model.visual_token_compression": s, "restore": None}
        folder = arguments.out / "table9" / f"s{s}"
        common.variant(base, common.TRUNK[:3], folder, arguments.data, "warmup", **values)
        scores[s] = common.score(folder / "warmup", arguments.data)
        steps[s] = Step(base / "tower", arguments.data, s)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    inputs = {s: steps[s].inputs(128) for s in steps}
    for turn in range(arguments.rounds + 1):
        for s in (1, 2):
            started = time.perf_counter()
            steps[s](inputs[s])
            if turn:  # the first warms up
                seconds[s].append(time.perf_counter() - started)
    ratio = statistics.median(one / two for one, two in zip(seconds[1], seconds[2], strict=True))
    memory = {}
    for s in (1, 2):
        jobs = [(base / "tower", arguments.data, s, batch) for batch in BATCHES]
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            memory[s] = dict(zip(BATCHES, pool.starmap(growth, jobs, chunksize=1), strict=True))
    rows = len(steps[1].pairs)
    epoch = {s: rows / 128 * statistics.median(seconds[s]) for s in seconds}
    # memory grows by a constant amount a row
    per_row = {s: (memory[s][BATCHES[-1]] - memory[s][BATCHES[0]]) / (BATCHES[-1] - BATCHES[0]) for s in memory}
    largest = {s: int((MEMORY_GB - memory[s][BATCHES[0]]) / per_row[s] + BATCHES[0]) for s in memory}
    head = f"| s | epoch of {rows:,} pictures | mean P@1 | largest batch in {MEMORY_GB:g} GB"
    lines = [f"{head} | paper: time | MMEB | VisDoc | batch |", "| --- " * 8 + "|"]
    for s in (1, 2):
        time_, mmeb, visdoc, batch = PAPER[s]
        ours = f"{epoch[s]:.0f} s | {scores[s]['mean']:.3f} | {largest[s]}"
        lines.append(f"| {s} | {ours} | {time_} | {mmeb} | {visdoc} | {batch} |")
    lines.append(f"\nA step with s = 2 is {ratio:.2f} times as fast (paper: {52.73 / 22.95:.2f}).")
    record = {"table": 9, "seconds": seconds, "ratio": ratio, "scores": scores, "growth_gb": memory, "largest": largest}

    def draw(axes: Any) -> None:
        for s in (1, 2):
            axes.plot(BATCHES, [memory[s][batch] for batch in BATCHES], "o-", label=f"s = {s}")
        axes.set(xlabel="batch", ylabel="growth of memory, GB", title=f"Table 9 on nano: {ratio:.2f} times as fast")
        axes.legend()

    common.finish("table9", "\n".join(lines), record, draw)


if __name__ == "__main__":
    main()
