from __future__ import annotations

import pytest

from quarterlight.cli.bench_evaluate import measure


def test_both_find_the_same_and_are_timed_as_often() -> None:
    run = measure(30, 2000, 16, 10, 2)
    assert len(run.seconds) == len(run.faiss_seconds) == 2
    assert run.same_first == 1.0
    assert run.ratio[0] <= run.ratio[1] <= run.ratio[2]
    assert run.gflop_per_s == pytest.approx(2e-9 * 30 * 2000 * 16 / (sum(run.seconds) / 2))
    assert run.above_mb >= 0
