"""What the tables share: short runs that branch off one trunk, and the mean P@1 of what comes out of them.

The trunk is the first stages of ``recipes/nano.yaml`` (``start`` to ``restore``), made once in ``--trunk`` and used by
every table; a finished run of nano serves as well.  Every variant is that recipe with other values and far fewer steps.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from quarterlight.data.retrieval import RetrievalDataset
from quarterlight.evaluation.retrieval import RetrievalEvaluator, sample_queries
from quarterlight.manifest import environment
from quarterlight.models.embedder import Embedder
from quarterlight.pipeline import run
from quarterlight.recipe import load_recipe

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parents[1] / "recipes" / "nano.yaml"
RESULTS = HERE.parent / "results" / "reproduce"

TASKS = {
    "emoji": ("t2i", "i2t", "i2i", "it2i"),
    "icons_mdi": ("t2i", "i2t", "it2i"),
    "easy_vqa": ("it2t",),
}
"""Trained and measured on: what a model of this size can learn from random weights."""

TRUNK = ("start", "teacher", "tower", "restore")
QUERIES = 400
"""of each test task, always the same; the pools are whole."""


def arguments(text: str | None, *, trunk: bool = True, judged: bool = False, **defaults: Any) -> argparse.Namespace:
    """The options that every table has.

    trunk, judged: whether it needs the first stages of a run, or those up to ``judge``.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="directory with the datasets emoji, icons_mdi, easy_vqa"
    )
    if trunk:
        parser.add_argument(
            "--trunk", type=Path, required=True, help="run of recipes/nano.yaml; its first stages are made there"
        )
    if judged:
        parser.add_argument("--judged", type=Path, required=True, help="run of a recipe, finished up to `judge`")
    parser.add_argument("--out", type=Path, required=True, help="directory of the short runs; stopped ones are resumed")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default: {value}")
    return parser.parse_args()


def recipe_values(**more: Any) -> list[str]:
    """Overrides for a short run: the tasks above, few steps, no validation."""
    tasks: list[dict[str, Any]] = [{"dataset": d, "task": t} for d, names in TASKS.items() for t in names]
    tasks[0]["where"] = {"lang": "en"}
    values: dict[str, Any] = {
        "mixture": tasks,
        "validation": None,
        "warmup.weights": {},
        "hard_negatives.weights": {},
        "finetune.weights": {},
        "warmup.optimizer": {"num_steps": 250, "learning_rate": 1e-3, "warmup_steps": 25, "save_every": 100},
        "warmup.loss.batch_size": 128,
        "hard_negatives.optimizer": {"num_steps": 100, "learning_rate": 5e-4, "warmup_steps": 10, "save_every": 50},
        "hard_negatives.loss.batch_size": 96,
        "finetune.optimizer": {"num_steps": 100, "learning_rate": 5e-4, "warmup_steps": 10, "save_every": 50},
        "finetune.loss.batch_size": 64,
    } | more
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def trunk(arguments: argparse.Namespace, last: str = "restore") -> Path:
    """The folder of the trunk, made if it is not there."""
    wanted = TRUNK[: TRUNK.index(last) + 1]
    if not all((arguments.trunk / stage / "manifest.json").is_file() for stage in wanted):
        run(load_recipe(RECIPE), arguments.data, arguments.trunk, last=last, report=print)
    return arguments.trunk


def variant(base: Path, stages: Sequence[str], folder: Path, data: Path, last: str, **values: Any) -> Path:
    """A run that takes ``stages`` from ``base`` and goes on with other values; returns the folder of ``last``."""
    begin(base, stages, folder)
    recipe = load_recipe(RECIPE, recipe_values(**values))
    return run(recipe, data, folder, first=recipe.stages[len(stages)], last=last, report=print)


def begin(base: Path, stages: Sequence[str], folder: Path) -> Path:
    """A folder of a run that has some stages of another."""
    for stage in stages:
        if not (folder / stage).exists():
            draft = folder / f".{stage}"
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(base / stage, draft)
            draft.replace(folder / stage)
    return folder


def score(folder: Path, data: Path) -> dict[str, float]:
    """P@1 on ``test`` of the model in a folder by ``dataset/task``, and their ``mean``; kept beside the model."""
    file = folder / "p1.json"
    if file.is_file():
        return json.loads(file.read_text())
    embedder = Embedder(folder)
    values = {}
    for name, tasks in TASKS.items():
        dataset, evaluator = RetrievalDataset(data / name), RetrievalEvaluator(embedder)
        for task in tasks:
            result = evaluator.evaluate(sample_queries(dataset.load(task, "test"), QUERIES))
            values[f"{name}/{task}"] = result.scores.metrics["precision@1"]
    values["mean"] = statistics.mean(values.values())
    file.write_text(json.dumps(values, indent=1))
    return values


def one_label_each(data: Path, folder: Path) -> Path:
    """A copy of the datasets in which every training query keeps one of its positives, as in data that people labelled.

    What is hidden from training stays a false negative for whoever mines by rank alone.
    """
    for name in TASKS:
        target = folder / name
        if target.exists():
            continue
        draft = folder / f".{name}"
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(data / name, draft, ignore=shutil.ignore_patterns("images.zip"))
        (draft / "images.zip").symlink_to((data / name / "images.zip").resolve())
        for file in (draft / "queries").glob("*.train.jsonl.gz"):
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines]
            with gzip.open(file, "wt", encoding="utf-8") as lines:
                for row in rows:
                    lines.write(json.dumps(row | {"pos_cand_list": row["pos_cand_list"][:1]}) + "\n")
        draft.replace(target)
    return folder


def spread(values: Sequence[float]) -> str:
    """``0.512 ± 0.004``: mean and standard deviation of several seeds."""
    more = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{more}"


def finish(name: str, table: str, record: Mapping[str, Any], draw: Any) -> None:
    """Prints a table, and writes it, the record and the plot that ``draw(axes)`` makes to ``results/reproduce``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    print("\n" + table)
    (RESULTS / f"{name}.md").write_text(table.rstrip() + "\n", encoding="utf-8")
    (RESULTS / f"{name}.json").write_text(json.dumps({**record, **environment()}, indent=1) + "\n", encoding="utf-8")
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    draw(axes)
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    plt.close(figure)
