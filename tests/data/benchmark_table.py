"""The table of docs/benchmarks.md: every row of the registry with its loader, its fixture and whether it is tested.

python -m tests.data.benchmark_table     writes it anew between the marks of the page
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from tests.data.layouts import CORPUS_WRITERS, WRITERS, opened_tasks

from quarterlight.data.benchmarks import LOADERS
from quarterlight.data.conversion import LAYOUTS
from quarterlight.data.corpora import CORPORA
from quarterlight.data.registry import DatasetEntry, datasets
from quarterlight.evaluation.suites import SUITES, SuiteTask, load_suite

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

# Repository or name -> layout of `data convert`, of the training sets whose layout some source describes
_CORPORA = {
    "TIGER-Lab/MMEB-train": "mmeb_train",
    "intfloat/mmE5-synthetic": "mme5",
    "JUNJIE99/MegaPairs": "megapairs",
    "vidore/colpali_train_set": "pages",
    "openbmb/VisRAG-Ret-Train-In-domain-data": "pages",
    "openbmb/VisRAG-Ret-Train-Synthetic-data": "pages",
    "HuggingFaceM4/Docmatix": "docmatix",
    "TIGER-Lab/M-BEIR": "mbeir",
    "BAAI-MTP": "pairs",
    "BLIP Bootstrapped Image-Text Pairs": "captions",
    "ImageNet-1K (image pairs)": "classes",
    "NLI for SimCSE": "nli",
    "CC3M (LLaVA 595K subset)": "cc3m",
}
_CONVERSATIONS = {
    "Bunny-v1.1": "llava",
    "LLaVA Visual Instruct 150K": "llava",
    "LVIS-Instruct4V": "llava",
    "ShareGPT4V": "llava",
    "Infinity Instruct": "sharegpt",
    "ShareGPT-Chinese-English-90k": "sharegpt",
    "firefly-train-1.1M": "instruction",
    "COIG-CQIA": "instruction",
}
_AVERAGES = {f"SugarCrepe/{group} (group)" for group in ("Replace", "Swap", "Add")}
"""Rows that are no data of their own: means of other rows, which ``tests/evaluation/test_suites.py`` checks."""

_WHOLE = {"mmeb": "write_mmeb", "mmeb_v2": "write_mmeb_v2", "mbeir": "write_mbeir"}


def table() -> str:
    """One line for each row of the registry."""
    lines = [
        "| dataset | used for | direction | loader | fixture | metric | tested |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in datasets():
        loader, fixture, metric = _facts(entry)
        tested = "yes" if is_tested(entry) else "no"
        role = entry.role
        lines.append(f"| {entry.name} | {role} | {entry.direction} | {loader} | {fixture} | {metric} | {tested} |")
    return "\n".join(lines) + "\n"


def is_tested(entry: DatasetEntry) -> bool:
    """Whether a test reads data in the layout of a row: by what tests open and call, not by what this module says."""
    if entry.role.startswith("eval"):
        if entry.name in _AVERAGES:
            return True
        tasks = [task for name in SUITES for task in load_suite(name).tasks if task.entry == entry]
        return bool(tasks) and all(task in _opened() for task in tasks)
    if layout := _CORPORA.get(entry.hub_id) or _CORPORA.get(entry.name):
        return layout in _asked_for("test_corpora.py", "convert", "write_folder")
    return _CONVERSATIONS.get(entry.name) in _asked_for("test_conversion.py", "run")


@cache
def _opened() -> list[SuiteTask]:
    return [task for name in SUITES for task in opened_tasks(name, with_videos=True)]


@cache
def _asked_for(module: str, *functions: str) -> frozenset[str]:
    """The strings that the tests of a module hand to these functions, here the names of layouts."""
    tree = ast.parse((Path(__file__).parent / module).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    given = [value for call in calls if call.func.id in functions for value in call.args]  # type: ignore[attr-defined]
    return frozenset(one.value for one in given if isinstance(one, ast.Constant) and isinstance(one.value, str))


def page() -> str:
    """The page as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}{END}{after}"


def _facts(entry: DatasetEntry) -> tuple[str, str, str]:
    """Loader, fixture and metric of a row; a dash where there is none."""
    if entry.role.startswith("eval"):
        tasks = {task.loader: task.metric for name in SUITES for task in load_suite(name).tasks if task.entry == entry}
        if entry.name in _AVERAGES:
            return "average of the suite", "tests/evaluation/test_suites.py", "mean of accuracy"
        if not tasks:
            return "-", "-", "-"
        assert set(tasks) <= set(LOADERS)
        names = [_WHOLE.get(loader) or _writer(loader) for loader in tasks]
        return ", ".join(tasks), ", ".join(names), ", ".join(dict.fromkeys(tasks.values()))
    if layout := _CORPORA.get(entry.hub_id) or _CORPORA.get(entry.name):
        assert layout in CORPORA
        return f"`data convert --to retrieval --from {layout}`", CORPUS_WRITERS[layout].__name__, "-"
    if layout := _CONVERSATIONS.get(entry.name):
        assert layout in LAYOUTS
        return f"`data convert --from {layout}`", "tests/data/test_conversion.py", "-"
    if entry.hub_id.startswith("none (private)"):
        return "- (private)", "-", "-"
    if entry.meta_task == "Grounding":
        return "`data convert --from grounding`, once in that layout", "-", "-"
    return "- (no source says its layout)", "-", "-"


def _writer(loader: str) -> str:
    return WRITERS[loader].__name__


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
