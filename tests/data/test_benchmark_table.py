from __future__ import annotations

from dataclasses import replace

import pytest
from tests.data import benchmark_table
from tests.data.benchmark_table import PAGE, is_tested, page, table

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


def test_a_row_that_no_test_reads_is_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = next(entry for entry in datasets("eval-zeroshot") if entry.name == "CIRCO")
    corpus = next(entry for entry in datasets() if entry.hub_id == "JUNJIE99/MegaPairs")
    talk = next(entry for entry in datasets() if entry.name == "ShareGPT4V" and entry.role == "train-stage1")
    group = next(entry for entry in datasets() if entry.name.endswith("(group)"))
    assert all(map(is_tested, (evaluated, corpus, talk, group)))
    for other in (replace(evaluated, name="in no suite"), replace(group, name="Other (group)")):
        assert not is_tested(other)
    monkeypatch.setattr(benchmark_table, "_opened", list)  # no test opens a task of a suite
    monkeypatch.setattr(benchmark_table, "_asked_for", lambda *names: frozenset())
    assert not any(map(is_tested, (evaluated, corpus, talk)))


def test_every_mmeb_set_has_its_prefixes() -> None:
    for entry in datasets():
        if entry.hub_id == "TIGER-Lab/MMEB-train":
            assert train_prefixes(entry.hub_subset)[0]
        if entry.role == "eval-mmeb":
            assert eval_prefixes(entry.name)[0]
