"""Quality against cost: fewer visual tokens behind the tower (s), and fewer patches inside it, on nano.

    python benchmarks/reproduce/pareto.py --data DATASETS --out runs/reproduce

Rows are s = 1, 2, 4 without merging, and s = 2 with two shares of the patches merged inside the vision tower.  Each
is the bundled nano, measured as it is with that setting, and after the same short training of all its weights with it;
as nano was made with s = 2, the trained row of s = 2 without merging says what the training alone does.  Quality is the
mean P@1 of some tasks of the suite mini (``TASKS``), on a sample of their test queries, in whole pools.  Cost is the
time and the operations of embedding a picture: all settings take turns in one process.

Whatever is finished is kept in ``--out`` and not done again; a stopped training goes on.  With other options, ``--out``
must be another folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

from quarterlight.cli.measure import spread, times_faster
from quarterlight.data.retrieval import RetrievalDataset
from quarterlight.evaluation.retrieval import RetrievalEvaluator, sample_queries
from quarterlight.images import load_image
from quarterlight.models.embedder import Embedder
from quarterlight.models.flops import text_flop, vision_flop
from quarterlight.pipeline import run
from quarterlight.recipe import Recipe, parse
from quarterlight.records import Item

TASKS = {"emoji": ("i2t",), "icons_mdi": ("i2t",), "easy_vqa": ("it2t",)}
"""Trained and measured on: queries are pictures, and nano is far above chance."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A row. s: visual token compression.  merging: share of the patches that are merged inside the tower."""

    s: int
    merging: float = 0.0

    @property
    def id(self) -> str:
        return f"s{self.s}" + (f"-merging{round(100 * self.merging)}" if self.merging else "")

    @property
    def name(self) -> str:
        return f"s = {self.s}" + (f", {self.merging:.0%} merged" if self.merging else "")

    def open(self, model: str | Path) -> Embedder:
        return Embedder(model, visual_token_compression=self.s, vision_token_merging=self.merging, num_workers=0)


SETTINGS = (Setting(s=1), Setting(s=2), Setting(s=2, merging=0.5), Setting(s=2, merging=0.75), Setting(s=4))
CONTROL = SETTINGS[1]
STATES = AS_IT_IS, TRAINED = "as_it_is", "trained"


def recipe(arguments: argparse.Namespace, setting: Setting) -> Recipe:
    """A short contrastive stage from nano, of all weights."""
    values = {
        "name": setting.id,
        "seed": 0,
        "mixture": [{"dataset": name, "task": task} for name, tasks in TASKS.items() for task in tasks],
        "validation": None,
        "model": {
            "checkpoint": "nano",
            "visual_token_compression": setting.s,
            "vision_token_merging": setting.merging,
            "attn_implementation": "eager",
            "text_max_tokens": 64,
        },
        "warmup": {
            "optimizer": {
                "num_steps": arguments.steps,
                "learning_rate": arguments.rate,
                "warmup_ratio": 0.1,
                "save_every": 8,
                "log_every": 4,
                "num_workers": 0,
            },
            "loss": {"batch_size": arguments.batch, "temperature": 0.05, "eval_every": 0},
        },
    }
    return parse(Recipe, values, where=setting.id)


def precision(embedder: Embedder, arguments: argparse.Namespace) -> dict[str, float]:
    """P@1 by ``dataset/task``, and their ``mean``."""
    values = {}
    evaluator = RetrievalEvaluator(embedder, group_by=())
    for name, tasks in TASKS.items():
        dataset = RetrievalDataset(arguments.data / name)
        for task in tasks:
            result = evaluator.evaluate(sample_queries(dataset.load(task, "test"), arguments.queries))
            values[f"{name}/{task}"] = result.scores.metrics["precision@1"]
    return {**values, "mean": statistics.mean(values.values())}


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file says, which is made if it is not there."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(make(), indent=1))
        draft.replace(file)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def costs(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Milliseconds and operations of a picture of one tile, by setting.

    Pictures are in memory.  ``wall_ms`` passes on the clock, ``cpu_ms`` is what the process itself takes, all threads
    together, and does not rise when the machine is busy with other work.
    """
    task = RetrievalDataset(arguments.data / "icons_mdi").load("i2t", "test")
    sources = [one for query in task.queries[: arguments.pictures] for one in query.item.images]
    items = [Item(image=load_image(one)) for one in sources]
    embedders = {one.id: one.open("nano") for one in SETTINGS}
    wall: dict[str, list[float]] = {name: [] for name in embedders}
    cpu: dict[str, list[float]] = {name: [] for name in embedders}
    for turn in range(arguments.rounds + 1):
        for name in embedders if turn % 2 else reversed(list(embedders)):
            started, used = time.perf_counter(), time.process_time()
            embedders[name].encode_document(items)
            if turn:  # the first warms up
                cpu[name].append(1e3 * (time.process_time() - used) / len(items))
                wall[name].append(1e3 * (time.perf_counter() - started) / len(items))
    found = {}
    for name, embedder in embedders.items():
        work, config = embedder.work, embedder.model.config
        length = (work.tokens + work.tokens_spared) / work.rows
        found[name] = {
            "wall_ms": spread(wall[name]),
            "cpu_ms": spread(cpu[name]),
            "times_faster": times_faster(cpu[CONTROL.id], cpu[name]),
            "visual_tokens": config.image_seq_length,
            "tokens": round(length, 1),
            "tower_mflop": round(vision_flop(config, 1) / 1e6, 1),
            "mflop": round((vision_flop(config, 1) + text_flop(config, length)) / 1e6, 1),
        }
    return found


def main() -> None:
    arguments = common.arguments(
        __doc__, trunk=False, steps=12, batch=32, rate=2e-4, queries=200, pictures=64, rounds=6
    )
    root = arguments.out / "pareto"
    claim(root, arguments)
    cost = kept(root / "cost.json", lambda: costs(arguments))
    scores: dict[str, dict[str, dict[str, float]]] = {one.id: {} for one in SETTINGS}
    # what is compared most closely first, so that a run that is stopped has something to say
    order = sorted(SETTINGS, key=lambda one: (one.s != CONTROL.s, one.merging))
    for one in order:
        file = root / one.id / f"{AS_IT_IS}.json"
        scores[one.id][AS_IT_IS] = kept(file, lambda one=one: precision(one.open("nano"), arguments))
        write(scores, cost, arguments)
    for one in order:
        model = run(recipe(arguments, one), arguments.data, root / one.id, report=print)
        file = root / one.id / f"{TRAINED}.json"
        scores[one.id][TRAINED] = kept(file, lambda one=one, model=model: precision(one.open(model), arguments))
        write(scores, cost, arguments)


OPTIONS = ("steps", "batch", "rate", "queries", "pictures", "rounds")


def claim(root: Path, arguments: argparse.Namespace) -> None:
    """Refuses a folder that was begun with other options, data or weights, of which results are kept in it."""
    made = {name: getattr(arguments, name) for name in OPTIONS}
    made |= {"data": str(arguments.data.resolve()), "start": Embedder("nano").model_hash}
    file = root / "options.json"
    if not file.exists():
        if (root / "cost.json").exists():
            raise SystemExit(f"{root} does not say with which options it was begun: choose another --out.")
        root.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(made, indent=1))
    elif (before := json.loads(file.read_text())) != made:
        raise SystemExit(f"{root} was begun with {before}, not {made}: choose another --out.")


def write(
    scores: Mapping[str, Mapping[str, Mapping[str, float]]],
    cost: Mapping[str, Mapping[str, Any]],
    arguments: argparse.Namespace,
) -> None:
    """The results so far."""
    record = {
        "benchmark": "pareto",
        "settings": {name: getattr(arguments, name) for name in OPTIONS},
        "rows": {
            one.id: {"s": one.s, "merging": one.merging, "p@1": scores[one.id], "cost": cost[one.id]}
            for one in SETTINGS
        },
    }
    common.finish("pareto", table(scores, cost, arguments), record, lambda axes: draw(axes, scores, cost))


def table(
    scores: Mapping[str, Mapping[str, Mapping[str, float]]],
    cost: Mapping[str, Mapping[str, Any]],
    arguments: argparse.Namespace,
) -> str:
    """The table, in Markdown."""
    tasks = [f"{name}/{task}" for name, some in TASKS.items() for task in some]
    head = ["setting", "visual tokens", "MFLOP a picture", "of these tower", "ms a picture", "times as fast as s = 2"]
    head += ["P@1 as it is", f"P@1 after {arguments.steps} steps", *tasks]
    lines = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    for one in SETTINGS:
        price, found = cost[one.id], scores[one.id]
        faster = price["times_faster"]
        cells = [
            one.name,
            str(price["visual_tokens"]),
            f"{price['mflop']:.0f}",
            f"{price['tower_mflop']:.0f}",
            f"{price['cpu_ms']['median']:.2f}",
            f"{faster['median']:.2f} ({faster['min']:.2f} to {faster['max']:.2f})",
            *(f"{found[state]['mean']:.3f}" if state in found else "–" for state in STATES),
            *(" / ".join(f"{found[state][task]:.3f}" for state in STATES if state in found) for task in tasks),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    note = (
        f"P@1 is the mean of {len(tasks)} tasks, {arguments.queries} test queries of each at most; one seed. The last "
        "columns are as it is / after training, a dash stands for what has not been run. ms is processor time of one "
        f"picture in memory, of a batch of {arguments.pictures}, median of {arguments.rounds} rounds in which all "
        "settings take turns."
    )
    return "\n".join([*lines, "", note])


def draw(
    axes: Any, scores: Mapping[str, Mapping[str, Mapping[str, float]]], cost: Mapping[str, Mapping[str, Any]]
) -> None:
    """P@1 by milliseconds: hollow as it is, filled after training."""
    for index, one in enumerate(SETTINGS):
        ms, marker = cost[one.id]["cpu_ms"]["median"], "s" if one.merging else "o"
        means = {state: found["mean"] for state, found in scores[one.id].items()}
        axes.plot([ms] * len(means), list(means.values()), "-", color=f"C{index}", linewidth=1)
        for state, fill in {AS_IT_IS: "none", TRAINED: "full"}.items():
            if state in means:
                axes.plot([ms], [means[state]], marker, color=f"C{index}", fillstyle=fill)
        axes.plot([], [], marker, color=f"C{index}", label=one.name)
    axes.set(
        xlabel="processor time of a picture, ms", ylabel="mean P@1", title="nano: as it is (hollow), trained (filled)"
    )
    axes.legend()


if __name__ == "__main__":
    main()
