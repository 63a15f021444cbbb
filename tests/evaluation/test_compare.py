from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quarterlight.errors import InputError
from quarterlight.evaluation.benchmark import file_name
from quarterlight.evaluation.compare import bootstrap, compare

Values = dict[str, dict[str, float | None]]


def write_run(
    folder: Path, values: Values, *, suite: str = "mini", reranked: Values | None = None, **more: object
) -> Path:
    """A run with these values by task and query; ``None`` for a query that was not scored."""
    (folder / "queries").mkdir(parents=True)
    after = 0.5 if reranked else None
    tasks = [{"name": name, "metric": "precision@1", "ties": "expected", "reranked": after, **more} for name in values]
    for name, of_query in values.items():
        table = {
            "qid": list(of_query),
            "scored": [value is not None for value in of_query.values()],
            "precision@1": pa.array(list(of_query.values()), pa.float64()),
        }
        if reranked:
            table["precision@1_reranked"] = pa.array(list(reranked[name].values()), pa.float64())
        pq.write_table(pa.table(table), folder / "queries" / f"{file_name(name)}.parquet")
    file = folder / "results.json"
    file.write_text(json.dumps({"suite": suite, "tasks": tasks, "averages": []}))
    return file


def random_values(seed: int, number: int, share: float) -> dict[str, float | None]:
    hits = np.random.default_rng(seed).random(number) < share
    return {f"q{n}": float(hit) for n, hit in enumerate(hits)}


def test_bootstrap_is_that_of_drawn_queries() -> None:
    """Counts of values drawn against queries drawn one by one, and against the formula of the standard error."""
    difference = np.random.default_rng(0).choice([-1.0, 0.0, 0.5, 1.0], size=400, p=[0.1, 0.6, 0.1, 0.2])
    drawn = bootstrap(difference, seed=1, draws=20_000)
    rows = np.random.default_rng(2).integers(0, 400, size=(20_000, 400))
    by_query = difference[rows].mean(axis=1)
    for quantile in (0.025, 0.5, 0.975):
        assert np.quantile(drawn, quantile) == pytest.approx(np.quantile(by_query, quantile), abs=0.004)
    assert drawn.std() == pytest.approx(difference.std() / 20, rel=0.03)
    np.testing.assert_array_equal(drawn, bootstrap(difference, seed=1, draws=20_000))
    assert not np.array_equal(drawn, bootstrap(difference, seed=3, draws=20_000))
    assert (bootstrap(np.full(7, 0.25), seed=0) == 0.25).all()


def test_many_values_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from quarterlight.evaluation import compare as module

    monkeypatch.setattr(module, "_NUMBERS", 1000)
    drawn = bootstrap(np.random.default_rng(0).normal(size=300), seed=0, draws=500)
    assert len(drawn) == 500 and drawn.std() == pytest.approx(1 / 300**0.5, rel=0.2)


def test_what_is_better_and_what_is_noise(tmp_path: Path) -> None:
    base = random_values(0, 500, 0.4)
    better = {qid: 1.0 if int(qid[1:]) % 4 == 0 else value for qid, value in base.items()}
    a = write_run(tmp_path / "a", {"jose_pages/t2vd": base, "wtq_tables/t2vd": random_values(1, 300, 0.5)})
    b = write_run(tmp_path / "b", {"wtq_tables/t2vd": random_values(2, 300, 0.5), "jose_pages/t2vd": better})
    clear, noise, average = compare(a, tmp_path / "b")
    assert (clear.name, clear.num_queries, clear.num_only, clear.is_clear) == ("jose_pages/t2vd", 500, 0, True)
    assert clear.difference == pytest.approx(np.mean(list(better.values())) - np.mean(list(base.values())))
    assert clear.low < clear.difference < clear.high
    assert not noise.is_clear
    # of the suite's averages only this one is over tasks that were all compared
    assert (average.name, average.metric, average.num_queries) == ("t2vd", "average", 800)
    assert average.difference == pytest.approx((clear.difference + noise.difference) / 2)
    width = ((clear.high - clear.low) ** 2 + (noise.high - noise.low) ** 2) ** 0.5 / 2
    assert average.high - average.low == pytest.approx(width, rel=0.1)
    assert compare(a, b) == compare(a, b) != compare(a, b, seed=1)
    back = compare(b, a)
    assert {one.name: one.difference for one in back}["jose_pages/t2vd"] == pytest.approx(-clear.difference)


def test_queries_that_one_alone_has_scored_are_counted(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"emoji/t2i": {"q0": 1.0, "q1": 0.0, "q2": None, "q3": 1.0}})
    b = write_run(tmp_path / "b", {"emoji/t2i": {"q0": 1.0, "q1": 1.0, "q2": 1.0, "q4": 1.0}})
    (one,) = compare(a, b)
    assert (one.a, one.b, one.num_queries, one.num_only) == (0.5, 1.0, 2, 3)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"emoji/t2i": {"q0": 1.0}})
    other = write_run(tmp_path / "other", {"emoji/t2i": {"q0": 1.0}}, suite="mmeb")
    with pytest.raises(InputError, match=r"suite mini, .* one of mmeb"):
        compare(a, other)
    with pytest.raises(InputError, match="no task in common"):
        compare(a, write_run(tmp_path / "b", {"emoji/i2t": {"q0": 1.0}}))
    with pytest.raises(InputError, match="scored no query in common"):
        compare(a, write_run(tmp_path / "c", {"emoji/t2i": {"q1": 1.0}}))
    lost = write_run(tmp_path / "d", {"emoji/t2i": {"q0": 1.0}})
    next((tmp_path / "d" / "queries").iterdir()).unlink()
    with pytest.raises(InputError, match=r"emoji\.t2i\.parquet cannot be read"):
        compare(a, lost)
    record = json.loads(a.read_text())
    record["tasks"][0]["metric"] = "hit@5"
    (tmp_path / "a" / "other.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"metric precision@1 in .* and hit@5"):
        compare(a, tmp_path / "a" / "other.json")
    record["tasks"][0] |= {"metric": "precision@1", "ties": "strict"}
    (tmp_path / "a" / "other.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"has the ties expected in .* and strict in"):
        compare(a, tmp_path / "a" / "other.json")


def test_both_orders_of_runs_that_have_both(tmp_path: Path) -> None:
    names = ["jose_pages/t2vd", "wtq_tables/t2vd"]
    values = {name: random_values(number, 50, 0.5) for number, name in enumerate(names)}
    better = {name: dict.fromkeys(values[name], 1.0) for name in names}
    a = write_run(tmp_path / "a", values, reranked=values)
    b = write_run(tmp_path / "b", values, reranked=better)
    found = compare(a, b)
    assert [(one.name, one.reranked) for one in found] == [
        (name, reranked) for reranked in (False, True) for name in (*names, "t2vd")
    ]
    assert [one.difference for one in found[:3]] == [0, 0, 0]
    assert found[3].b == found[5].b == 1.0 and found[3].difference > 0.2
    without = write_run(tmp_path / "c", values)
    assert not any(one.reranked for one in compare(a, without))


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("revision", "f" * 40, "revision"),
        ("pictures_revision", "f" * 40, "pictures"),
        ("rows_sha256", "1", "rows"),
        ("max_tiles", [4], "tiles"),
        ("instructions", {"query": ["Find it."], "document": []}, "instructions"),
    ],
)
def test_tasks_that_were_not_asked_the_same_are_marked(tmp_path: Path, key: str, value: object, name: str) -> None:
    values = {"jose_pages/t2vd": {"q0": 1.0}, "wtq_tables/t2vd": {"q0": 1.0}}
    asked = {
        "revision": None,
        "pictures_revision": None,
        "rows_sha256": "0",
        "max_tiles": [1],
        "instructions": {"query": [], "document": []},
    }
    a = write_run(tmp_path / "a", values, **(asked | {"revision": "0" * 40, "pictures_revision": "0" * 40}))
    assert all(not one.unlike for one in compare(a, write_run(tmp_path / "b", values, **asked)))
    record = json.loads(a.read_text())
    record["tasks"][0][key] = value
    (tmp_path / "a" / "other.json").write_text(json.dumps(record))
    assert [one.unlike for one in compare(a, tmp_path / "a" / "other.json")] == [(name,), (), (name,)]
