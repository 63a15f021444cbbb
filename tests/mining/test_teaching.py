"""Lists of a teacher: from which pool, with the positive in them, scored once however often it is stopped."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.mining.test_negatives import ALL, Line

from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError, RecipeError
from quarterlight.mining import negatives, teaching
from quarterlight.mining.negatives import MineRecipe, mine, read_mined
from quarterlight.mining.teaching import TeachRecipe, read_taught, teach
from quarterlight.records import Candidate, Item, Query


class Judge:
    """Says a tenth of the number that a candidate is; counts the pairs that it is asked about."""

    model_hash = "judge"

    def __init__(self, last: int = 1 << 30) -> None:
        self.asked = 0
        self.last = last

    def predict(self, pairs: Sequence[tuple[Item, Item]], /) -> np.ndarray:
        if self.asked >= self.last:
            raise KeyboardInterrupt
        self.asked += len(pairs)
        return np.array([float(item.text or 0) / 100 for _, item in pairs], np.float32)


def task(name: str, numbers: Sequence[int], positive: str = "d0", queries: int = 1) -> RetrievalTask:
    """Queries near 0 degrees, candidates at so many."""
    return RetrievalTask(
        dataset="line",
        task=name,
        split="train",
        queries=[Query(qid=f"q{n}", item=Item(text=str(n / 10)), positives=(positive,)) for n in range(queries)],
        candidates=[Candidate(did=f"d{n}", item=Item(text=str(number))) for n, number in enumerate(numbers)],
    )


OWN = task("t2t", [80, 10, 20, 30, 40])  # the positive is the farthest
OTHER = task("t2i", [5, 15, 10, 60])  # d2 shows what d1 of the other task shows


def taught(folder: Path, recipe: TeachRecipe, judge: Any = None) -> Any:
    tasks = [OWN, OTHER]
    teach(Line(), judge or Judge(), tasks, folder / "out", recipe, seed=0, cache=folder / "cache")
    return [read_taught(folder / "out", one) for one in tasks]


def test_the_pool_is_the_task_all_tasks_or_half_of_each(tmp_path: Path) -> None:
    found = {}
    for pool in ("local", "global", "mixed"):
        one = TeachRecipe(depth=4, share=1.0, pool=pool, include_positive=False)
        found[pool] = taught(tmp_path / pool, one)[0]["q0"]
    assert found["local"].dids == ("d1", "d2", "d3", "d4")
    assert found["global"].dids == ("line/t2i/d0", "d1", "line/t2i/d1", "d2")
    assert set(found["mixed"].dids) == {"d1", "d2", "line/t2i/d0", "line/t2i/d1"}
    assert found["local"].recall == pytest.approx(np.cos(np.radians([10, 20, 30, 40])), abs=1e-6)
    assert found["global"].rerank == pytest.approx([0.05, 0.1, 0.15, 0.2], abs=1e-6)


def test_a_positive_is_always_in_the_list(tmp_path: Path) -> None:
    own, other = taught(tmp_path, TeachRecipe(depth=4, share=1.0))
    assert own["q0"].dids == ("d1", "d2", "d3", "d0")
    assert own["q0"].recall[-1] == pytest.approx(np.cos(np.radians(80)), abs=1e-6)
    assert other["q0"].dids == ("d0", "d2", "d1", "d3")  # where it is found anyway, it stands in its place
    own, _ = taught(tmp_path / "near", TeachRecipe(depth=4, share=1.0, max_score=0.9))
    assert own["q0"].dids == ("d3", "d4", "d0")


def test_what_scores_too_high_makes_room_for_the_next(tmp_path: Path) -> None:
    """Of twenty candidates at 5, 10, ... degrees the first five have a cosine of 0.9 and more."""
    many = task("t2t", range(5, 105, 5), positive="d19", queries=2)

    def go(**more: Any) -> tuple[Any, Any]:
        recipe = TeachRecipe(depth=4, share=1.0, max_score=0.9, include_positive=False, **more)
        folder = tmp_path / str(more)
        (counts,) = teach(Line(), Judge(), [many], folder / "out", recipe, seed=0, cache=folder / "cache")
        return read_taught(folder / "out", many)["q0"].dids, counts

    dids, counts = go()
    assert dids == ("d5", "d6", "d7", "d8")
    assert (counts.num_queries, counts.num_pairs, counts.num_short, counts.num_without_positive) == (2, 8, 0, 2)
    dids, counts = go(search_depth=7)
    assert dids == ("d5", "d6", "d19") and counts.num_short == 2 and counts.num_without_positive == 0


def test_a_share_of_the_queries_is_drawn(tmp_path: Path) -> None:
    many = task("t2t", range(10, 60, 5), queries=20)
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        recipe = TeachRecipe(depth=3, share=0.25)
        teach(Line(), Judge(), [many, OTHER], folder / "out", recipe, seed=seed, cache=folder / "cache")
    drawn = [set(read_taught(tmp_path / str(seed) / "out", many)) for seed in (0, 1)]
    assert [len(some) for some in drawn] == [5, 5] and drawn[0] != drawn[1]
    assert set(read_taught(tmp_path / "0" / "out", OTHER)) == {"q0"}  # at least one
    alone = tmp_path / "alone"
    teach(Line(), Judge(), [many], alone / "out", TeachRecipe(depth=3, share=0.25), seed=0, cache=alone / "cache")
    assert set(read_taught(alone / "out", many)) == drawn[0]


def test_a_stopped_run_asks_about_no_pair_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "PART", 4)
    many = task("t2t", range(10, 60, 5), queries=12)
    recipe = TeachRecipe(depth=3, share=1.0)

    def go(judge: Judge) -> Any:
        teach(Line(), judge, [many], tmp_path / "out", recipe, seed=0, cache=tmp_path / "cache")
        return read_taught(tmp_path / "out", many)

    stopped, rest, again = Judge(last=13), Judge(), Judge()
    with pytest.raises(KeyboardInterrupt):
        go(stopped)
    with pytest.raises(DatasetError, match=r"t2t\.parquet, the teacher scores of line/t2t.train, cannot be read"):
        read_taught(tmp_path / "out", many)
    found = go(rest)
    assert stopped.asked + rest.asked == 36 and len(found) == 12
    go(again)
    assert again.asked == 0


def test_global_mining_names_what_comes_from_elsewhere(tmp_path: Path) -> None:
    """A copy of an answer is none the less an answer when it comes from another task."""
    copy = task("t2i", [80, 15])
    everywhere = MineRecipe(depth=1000, window=None, sample=None, pool="global")
    mine(Line(), [OWN, copy], tmp_path / "out", everywhere, seed=0, cache=tmp_path / "cache")
    assert read_mined(tmp_path / "out", OWN)["q0"] == ["d1", "line/t2i/d1", "d2", "d3", "d4"]
    mine(Line(), [OWN, copy], tmp_path / "own", ALL, seed=0, cache=tmp_path / "cache")
    assert read_mined(tmp_path / "own", OWN)["q0"] == ["d1", "d2", "d3", "d4"]


def test_one_global_pool_exists_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the candidates of all tasks, so that all together would be the square of them."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most: list[int] = []
    make = negatives._Pool.__init__

    def note(self: Any, *arguments: Any) -> None:
        alive.add(self)
        most.append(len(alive))
        make(self, *arguments)

    monkeypatch.setattr(negatives._Pool, "__init__", note)
    tasks = [task(name, [80, 10, 20], positive=f"d{n}") for n, name in enumerate(("t2t", "t2i", "i2t"))]
    everywhere = MineRecipe(depth=9, window=None, sample=None, pool="global")
    counts = mine(Line(), tasks, tmp_path / "out", everywhere, seed=0, cache=tmp_path / "cache")
    assert [one.num_candidates for one in counts] == [3, 3, 3]  # of all nine, copies once
    assert len(most) >= len(tasks) and max(most) == 1


def test_what_cannot_be_is_refused() -> None:
    for wrong, message in (
        ({"depth": 1}, "at least 2"),
        ({"share": 0.0}, "share must be above 0"),
        ({"max_score": 2.0}, "max_score"),
        ({"search_depth": 49, "max_score": 0.7}, r"search_depth must be at least depth \(50\)"),
        ({"search_depth": 100}, "of no use without max_score"),
    ):
        with pytest.raises(RecipeError, match=message):
            TeachRecipe(**wrong)
