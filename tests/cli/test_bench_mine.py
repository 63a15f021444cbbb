from __future__ import annotations

import pytest

from quarterlight.cli.bench_mine import Mining, _run, extrapolate


def _mining(rows: int, seconds: float, peak_mb: float) -> Mining:
    zero = dict.fromkeys(("pairs_per_s", "gflop_per_s", "base_mb"), 0.0)
    return Mining(queries=rows, candidates=rows, seconds=seconds, peak_mb=peak_mb, **zero)


def test_extrapolation_of_a_known_law() -> None:
    law = {rows: 1e-4 * 2 * rows + 1e-9 * rows**2 for rows in (25_000, 100_000, 1_000_000)}
    runs = [_mining(rows, law[rows], 100 + rows / 1000) for rows in (25_000, 100_000)]
    estimate = extrapolate(runs[0], runs[1], 256)
    assert estimate.hours == pytest.approx(law[1_000_000] / 3600)
    assert estimate.memory_mb == pytest.approx(1100)
    assert estimate.disk_gib == pytest.approx(2 * 256 * 4e6 / 2**30)


def test_noise_is_never_a_negative_time() -> None:
    estimate = extrapolate(_mining(100, 2.0, 100.0), _mining(400, 1.0, 90.0), 8)
    assert estimate.hours == pytest.approx(1.0 * (1_000_000 / 400) ** 2 / 3600)
    assert estimate.memory_mb == 90.0


def test_run_is_a_whole_mining() -> None:
    run = _run(400, 16, 100)
    assert run.queries == run.candidates == 400
    assert run.pairs_per_s == pytest.approx(400**2 / run.seconds)
    assert run.gflop_per_s == pytest.approx(run.pairs_per_s * 32e-9)
    assert run.peak_mb >= run.base_mb > 50
