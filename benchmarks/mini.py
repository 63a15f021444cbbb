"""The project's scoreboard: ``results/mini.md``, every shipped checkpoint on the suite ``mini``, next to chance.

    python benchmarks/mini.py --data DATA            evaluates what has changed and writes the page anew
    python benchmarks/mini.py                        writes the page anew from the results that are there
    python benchmarks/mini.py --data DATA --model runs/nano/finetune=finetune
    python benchmarks/mini.py --data DATA --quantization int8

``--model FOLDER=NAME`` adds a checkpoint, such as a stage of a run, or replaces one; results are kept in
``results/mini/NAME.json``, without what a run on another machine would have differently.  ``--quantization KIND``
evaluates the same checkpoints with quantised weights, as NAME-KIND.  With embeddings to be made, nano takes minutes on
two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from quarterlight.cli.evaluate import run_suite_command
from quarterlight.evaluation.benchmark import RESULTS, num_asked, read_record
from quarterlight.evaluation.page import Block, Heading, Paragraph, Table, to_markdown
from quarterlight.evaluation.report import percent
from quarterlight.evaluation.suites import load_suite
from quarterlight.files import replace_file
from quarterlight.models.quantized import QUANTIZATIONS, Quantization

HERE = Path(__file__).resolve().parent
KEPT = HERE / "results" / "mini"
PAGE = HERE / "results" / "mini.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of the datasets; without it nothing is evaluated")
    parser.add_argument("--model", action="append", default=[], help="FOLDER=NAME of one more checkpoint")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the weights of layers")
    parser.add_argument("--cache", type=Path, help="folder of the embeddings; default: a new one, so that time is cold")
    options = parser.parse_args()
    shipped = Path(str(files("quarterlight"))) / "checkpoints"
    models = {one.parent.name: one.parent.name for one in sorted(shipped.glob("*/config.json"))} | {
        name: folder for folder, _, name in (one.partition("=") for one in options.model)
    }
    if options.data is not None:
        for name, folder in models.items():
            if options.quantization:
                name = f"{name}-{options.quantization}"
            evaluate(name, folder, options.data, options.cache, options.quantization)
    write_page()


def evaluate(name: str, model: str, data: Path, cache: Path | None, quantization: Quantization | None = None) -> None:
    """Writes the record of a model."""
    with tempfile.TemporaryDirectory() as scratch:
        started = time.monotonic()
        out = run_suite_command(
            "mini",
            None,
            data,
            model=model,
            out=Path(scratch) / "out",
            cache=cache or Path(scratch) / "cache",
            quantization=quantization,
        )
        record = read_record(out / RESULTS)
        record["seconds"] = None if cache else time.monotonic() - started
    replace_file(KEPT / f"{name}.json", json.dumps(record, indent=1) + "\n")


def write_page() -> None:
    """The table of all records that are kept."""
    records = {file.stem: read_record(file) for file in sorted(KEPT.glob("*.json"))}
    suite = load_suite("mini")
    rows = [_row(one, records) for one in [*suite.tasks, *suite.averages]]
    blocks: list[Block] = [
        Heading("The suite mini", 1),
        Paragraph(
            "P@1 in percent on the test split of every task of this project's data, exact search over the whole pool. "
            "Made by `python benchmarks/mini.py --data DATA`; chance is what candidates in random order would get. "
            "Averages are unweighted means over tasks."
        ),
        Table(
            columns=["task", "queries scored", "candidates", "chance", *records],
            rows=rows,
            ours=frozenset(range(len(suite.tasks), len(rows))),
        ),
        Heading("Checkpoints"),
        Table(
            columns=["checkpoint", "weights and settings", "made with", "hardware", "time"], rows=_made(records), left=4
        ),
    ]
    blocks += [Paragraph(f"{name}: {record['note']}") for name, record in records.items() if record.get("note")]
    replace_file(PAGE, to_markdown(blocks))


def _row(one: Any, records: Mapping[str, Any]) -> list[str]:
    found = {
        name: next((row for row in (*record["tasks"], *record["averages"]) if row["name"] == one.name), None)
        for name, record in records.items()
    }
    task = next((row for row in found.values() if row and "num_scored" in row), None)
    cells = ["", "", ""]
    if task is not None:
        cells = [
            f"{task['num_scored']:,} of {num_asked(task):,}",
            f"{task['num_scored_candidates']:,} of {task['num_candidates']:,}",
            percent(task["chance"]["precision@1"]),
        ]
    return [one.name, *cells, *(percent(row["score"]) if row else "–" for row in found.values())]


def _made(records: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, record in records.items():
        environment = record["environment"]
        hardware, versions = environment["hardware"], environment["versions"]
        commit = (environment["commit"] or "no commit")[:10]
        seconds = record.get("seconds")
        rows.append(
            [
                name,
                record["model"]["hash"][:12],
                f"quarterlight {versions.get('quarterlight') or ''} ({commit}), torch {versions['torch']}",
                ", ".join(hardware["gpus"]) or f"{hardware['cpu_cores']} cores of {hardware['cpu']}",
                f"{seconds / 60:.1f} min" if seconds else "",
            ]
        )
    return rows


if __name__ == "__main__":
    main()
