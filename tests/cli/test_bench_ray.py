"""Scaling over workers, with engines in this process; real clusters are in tests/search/test_cluster.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.search.fakes import FakeEncoder

from quarterlight.cli import bench_ray
from quarterlight.cli.main import program
from quarterlight.index import ModelIdentity
from quarterlight.search import cluster
from quarterlight.search.embed import Local
from quarterlight.search.encoder import identity_of


@pytest.mark.parametrize("kind", bench_ray.KINDS)
def test_everything_is_embedded_by_each_in_turn(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ray, "ITEMS_PER_SHARD", 50)
    number = 12 if kind == "image" else 120
    corpus = bench_ray._corpus(tmp_path / kind, kind, number)
    encoders = {1: FakeEncoder(), 2: FakeEncoder()}
    order: list[tuple[int, ...]] = []
    engines = {count: Local(encoder) for count, encoder in encoders.items()}
    cells = bench_ray.scaling(
        kind,
        corpus,
        engines,
        identity_of(encoders[1]),
        2,
        lambda: order.append(tuple(encoder.num_encoded // number for encoder in encoders.values())),
    )
    assert [cell["workers"] for cell in cells] == [1, 2]
    assert order == [(1, 0), (1, 1), (1, 2), (2, 2)]
    assert cells[0]["of_linear"] == 1


def test_record(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []

    class Here(Local):
        def check(self) -> None:
            checked.append(len(counts))

        def identity(self) -> ModelIdentity:
            return identity_of(FakeEncoder())

    counts: list[int] = []

    def connect(address: str, _: object, *, num_workers: int) -> Here:
        counts.append(num_workers)
        return Here(FakeEncoder())

    monkeypatch.setattr(cluster.Cluster, "connect", connect)
    monkeypatch.setattr(bench_ray, "_cores", lambda: 2.0)
    arguments = ["bench", "ray", "--items", "120", "--repeats", "1", "--workers", "2", "--workers", "1"]
    result = CliRunner().invoke(program(), [*arguments, "--kind", "text"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout.splitlines()[-1])
    assert checked == [2, 2]
    assert "120 items are too few shards for 2 workers" in result.output and "--items 800" in result.output
    assert counts == [cell["workers"] for cell in record["cases"]] == [1, 2]
    assert all(cell["kind"] == "text" and cell["items_per_s"]["median"] > 0 for cell in record["cases"])


def test_of_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([10.0, 18.0, 19.0, 11.0, 9.0, 17.0])
    monkeypatch.setattr(bench_ray, "_run", lambda *_: (next(rates), 1.0))
    one, two = bench_ray.scaling("text", Path(), {1: None, 2: None}, None, 3)  # type: ignore[arg-type, dict-item]
    assert one["items_per_s"]["median"] == 10 and two["items_per_s"]["median"] == 18
    assert two["of_linear"] == 0.9


def test_unknown_kind() -> None:
    result = CliRunner().invoke(program(), ["bench", "ray", "--kind", "texts"])
    assert result.exit_code == 1 and "Did you mean 'text'" in result.output
