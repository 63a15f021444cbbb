from __future__ import annotations

from tests.data.benchmark_table import PAGE, page, table

from quarterlight.data.benchmarks.mmeb import eval_prefixes, train_prefixes
from quarterlight.data.registry import datasets


def test_the_page_has_every_dataset_as_it_is() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "Run: python -m tests.data.benchmark_table"
    assert len(table().splitlines()) == 2 + len(datasets()) == 241


def test_every_evaluation_row_is_read_by_a_test() -> None:
    rows = [line.split(" | ") for line in table().splitlines()[2:]]
    assert not [row[0] for row in rows if row[1].startswith("eval") and not row[-1].startswith("yes")]
    untested = [
        row[0].removeprefix("| ") for row in rows if row[1] in ("train-stage2", "train-stage3") and "no" in row[-1]
    ]
    assert not untested


def test_every_mmeb_set_has_its_prefixes() -> None:
    for entry in datasets():
        if entry.hub_id == "TIGER-Lab/MMEB-train":
            assert train_prefixes(entry.hub_subset)[0]
        if entry.role == "eval-mmeb":
            assert eval_prefixes(entry.name)[0]
