from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.mining.worker import RECIPE, Hashing, random_task

from quarterlight.data.retrieval import RetrievalDataset, RetrievalTask, with_instructions, with_negatives
from quarterlight.errors import DatasetError, RecipeError
from quarterlight.mining import negatives
from quarterlight.mining.negatives import MineRecipe, TaskCounts, mine, read_mined
from quarterlight.models.embedder import Embedder
from quarterlight.records import Candidate, Item, Query

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "retrieval"
ALL = MineRecipe(depth=1000, window=None, sample=None)


class Line:
    """Puts a text that is a number on the unit circle, at so many degrees: what is near in number is near."""

    model_hash = "line"

    def encode_query(self, items: Sequence[Item], /) -> np.ndarray:
        angle = np.radians([float(item.text or 0) for item in items])
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)

    encode_document = encode_query


def _task(queries: Sequence[Query], texts: Sequence[str]) -> RetrievalTask:
    candidates = [Candidate(did=f"d{n}", item=Item(text=text)) for n, text in enumerate(texts)]
    return RetrievalTask(dataset="line", task="t2t", split="train", queries=list(queries), candidates=candidates)


def _query(qid: str, text: str, *positives: str, **more: Any) -> Query:
    return Query(qid=qid, item=Item(text=text), positives=positives, **more)


def _mine(
    encoder: Any, task: RetrievalTask, folder: Path, recipe: MineRecipe, seed: int = 0
) -> tuple[dict[str, list[tuple[str, int]]], TaskCounts]:
    """qid -> (did, rank) in the order of the file."""
    counts = mine(encoder, [task], folder / "out", recipe, seed=seed, cache=folder / "cache")
    found: dict[str, list[tuple[str, int]]] = {}
    for row in pq.read_table(folder / "out" / f"{task.dataset}.{task.task}.parquet").to_pylist():
        found.setdefault(row["qid"], []).append((row["did"], row["rank"]))
    return found, counts[0]


def test_ranks_are_brute_force(tiny_embedder: Embedder, tmp_path: Path) -> None:
    tasks = [
        with_instructions(RetrievalDataset(FIXTURE / folder).load(name, "train"))
        for folder, name in (("emoji", "t2i"), ("emoji", "it2i"), ("easy_vqa", "it2t"))
    ]
    mine(tiny_embedder, tasks, tmp_path / "out", ALL, seed=0, cache=tmp_path / "cache")
    for task in tasks:
        query_QD = tiny_embedder.encode_query([query.item for query in task.queries]).astype(np.float64)
        candidate_CD = tiny_embedder.encode_document([one.item for one in task.candidates]).astype(np.float64)
        table = pq.read_table(tmp_path / "out" / f"{task.dataset}.{task.task}.parquet")
        assert [str(field.type) for field in table.schema] == ["string", "string", "float", "int32"]
        rows = table.to_pylist()
        assert list(dict.fromkeys(row["qid"] for row in rows)) == [query.qid for query in task.queries]
        asked: dict[Item, set[str]] = {}
        for query in task.queries:
            asked.setdefault(query.item, set()).update(query.positives)
        for query, score_C in zip(task.queries, query_QD @ candidate_CD.T, strict=True):
            score = {one.did: value for one, value in zip(task.candidates, score_C, strict=True)}
            own = [row for row in rows if row["qid"] == query.qid]
            assert {row["did"] for row in own} == score.keys() - asked[query.item]
            assert [row["rank"] for row in own] == list(range(1, len(own) + 1))
            assert [row["score"] for row in own] == pytest.approx([score[row["did"]] for row in own], abs=1e-5)
            best_first = sorted((score[row["did"]] for row in own), reverse=True)
            assert [score[row["did"]] for row in own] == pytest.approx(best_first, abs=1e-5)


def test_known_answers_are_not_in_the_list(tmp_path: Path) -> None:
    queries = [
        _query("a", "0", "d1", also_relevant=("d3",)),
        _query("b", "0", "d4"),  # the question of a, with another answer
        _query("c", "1", "d0"),
    ]
    #                 d0   d1   d2   d3   d4   d5   d6    d7; d2 shows what d1 shows, d7 what d6 shows
    task = _task(queries, ["5", "10", "10", "20", "30", "40", "50", "50"])
    found, counts = _mine(Line(), task, tmp_path, ALL)
    assert found["a"] == found["b"] == [("d0", 1), ("d5", 2), ("d6", 3)]
    assert found["c"] == [("d1", 1), ("d3", 2), ("d4", 3), ("d5", 4), ("d6", 5)]
    assert counts.num_candidates == 6 and counts.num_queries == 3 and counts.num_mined == 11


def test_copy_of_a_positive_picture_is_excluded(tiny_embedder: Embedder, picture, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        picture(seed).save(tmp_path / f"{name}.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "copy.png")
    task = RetrievalTask(
        dataset="pictures",
        task="t2i",
        split="train",
        queries=[_query("q", "blocks", "a")],
        candidates=[
            Candidate(did=name, item=Item(image=str(tmp_path / f"{name}.png"))) for name in ("a", "copy", "b", "c")
        ],
    )
    found, _ = _mine(tiny_embedder, task, tmp_path, ALL)
    assert sorted(did for did, _ in found["q"]) == ["b", "c"]


def test_window_and_sample(tmp_path: Path) -> None:
    task = _task([_query(f"q{n}", f"{n / 100}", "d0") for n in range(200)], [str(n) for n in range(61)])
    found, counts = _mine(Line(), task, tmp_path, MineRecipe(depth=60, window=(10, 14), sample=2))
    taken = [rank for pairs in found.values() for _, rank in pairs]
    assert len(taken) == counts.num_mined == 400 and counts.num_short == counts.num_without == 0
    assert all(len(pairs) == 2 and pairs[0][1] < pairs[1][1] for pairs in found.values())
    share = np.bincount(taken, minlength=20) / 400
    assert share[10:15] == pytest.approx(0.2, abs=0.07) and share[10:15].sum() == 1
    other, _ = _mine(Line(), task, tmp_path / "other", MineRecipe(depth=60, window=(10, 14), sample=2), seed=1)
    again, _ = _mine(Line(), task, tmp_path / "again", MineRecipe(depth=60, window=(10, 14), sample=2))
    assert found == again != other
    few = replace(task, queries=task.queries[7:9])
    assert _mine(Line(), few, tmp_path / "few", MineRecipe(depth=60, window=(10, 14), sample=2))[0] == {
        qid: found[qid] for qid in ("q7", "q8")
    }, "what is drawn for a query depends on no other query"


@pytest.mark.parametrize(
    ("window", "sample", "ranks"),
    [
        ((3, 5), None, [3, 4, 5]),
        ((1, 20), None, [*range(1, 10)]),
        ((8, 12), None, [8, 9]),
        ((9, 12), 2, [8, 9]),  # one candidate is behind rank 8: the window begins earlier, to hold two
        ((50, 100), 2, [8, 9]),
        ((50, 100), None, [9]),
        (None, 3, [1, 2, 3]),
        (None, None, [*range(1, 10)]),
    ],
)
def test_windows_of_nine_candidates(
    window: tuple[int, int] | None, sample: int | None, ranks: list[int], tmp_path: Path
) -> None:
    task = _task([_query("q", "0", "d0")], [str(n) for n in range(10)])
    found, counts = _mine(Line(), task, tmp_path, MineRecipe(depth=100, window=window, sample=sample))
    assert found["q"] == [(f"d{rank}", rank) for rank in ranks]
    assert counts.num_short == (window is not None and window[0] > 9)


def test_depth_ends_the_list(tmp_path: Path) -> None:
    task = _task([_query("q", "0", "d0", "d1")], [str(n) for n in range(10)])
    found, _ = _mine(Line(), task, tmp_path, replace(ALL, depth=3))
    assert found["q"] == [("d2", 1), ("d3", 2), ("d4", 3)]


def test_scores_that_look_like_answers_are_left_out(tmp_path: Path) -> None:
    # of the query at 0 degrees; the positives score cos 60 = 0.5 and cos 80, and d0 to d3 more than 0.45 = 0.9 x 0.5
    task = _task([_query("q", "0", "d4", "d6")], ["10", "20", "30", "45", "60", "70", "80", "89"])
    found, _ = _mine(Line(), task, tmp_path / "margin", replace(ALL, margin=0.9))
    assert found["q"] == [("d5", 5), ("d7", 6)], "ranks count what is left out as well"
    found, _ = _mine(Line(), task, tmp_path / "score", replace(ALL, max_score=0.8))
    assert found["q"] == [("d3", 4), ("d5", 5), ("d7", 6)]
    found, _ = _mine(Line(), task, tmp_path / "both", replace(ALL, max_score=0.8, margin=0.9, sample=1))
    assert found["q"] == [("d5", 5)]
    found, counts = _mine(Line(), task, tmp_path / "none", replace(ALL, max_score=-0.5))
    assert found == {} and counts.num_without == 1


def test_pool_of_known_answers_alone(tmp_path: Path) -> None:
    found, counts = _mine(Line(), _task([_query("q", "0", "d0")], ["1"]), tmp_path, MineRecipe())
    assert found == {} and counts.num_without == counts.num_short == 1


def test_mined_ids_become_negatives(tmp_path: Path) -> None:
    task = random_task()
    mine(Hashing(), [task], tmp_path / "out", RECIPE, seed=0, cache=tmp_path / "cache")
    mined = read_mined(tmp_path / "out", task)
    assert all(1 <= len(dids) <= 4 for dids in mined.values()) and len(mined) == len(task.queries)
    trained = with_negatives(task, mined)
    assert [query.negatives for query in trained.queries] == [tuple(mined[query.qid]) for query in task.queries]
    with pytest.raises(DatasetError, match=r"random\.i2i\.parquet, the mined candidates of random/i2i\.train"):
        read_mined(tmp_path / "out", random_task("i2i"))


def test_finished_task_is_kept_and_changed_one_is_not(tmp_path: Path) -> None:
    def run(*tasks: RetrievalTask, recipe: MineRecipe = RECIPE, seed: int = 0) -> tuple[int, list[int]]:
        encoder, out = Hashing(), tmp_path / "out"
        before = {path: path.stat().st_mtime_ns for path in out.glob("*")}
        mine(encoder, tasks, out, recipe, seed=seed, cache=tmp_path / "cache")
        files = sorted(path for path in out.glob("*.parquet"))
        return len(encoder.asked), [before.get(path) != path.stat().st_mtime_ns for path in files]

    a, b = random_task("i2t"), random_task("t2t", num_candidates=70)
    assert run(a, b) == (45 + 70, [True, True]), "texts that two tasks share are embedded once"
    shutil.rmtree(tmp_path / "cache")
    assert run(a, b) == (0, [False, False])
    more = replace(b, candidates=[*b.candidates, Candidate(did="new", item=Item(text="new"))])
    assert run(a, more) == (45 + 71, [False, True])
    assert run(a, more, seed=1) == (0, [True, True])
    assert run(a, more, seed=1, recipe=replace(RECIPE, margin=0.9)) == (0, [True, True])
    fewer = replace(more, queries=[replace(more.queries[0], positives=("d5",)), *more.queries[1:]])
    assert run(a, fewer, seed=1, recipe=replace(RECIPE, margin=0.9)) == (0, [False, True])
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.draft"))
    assert not list(tmp_path.glob("cache/hashing/found/*"))


def test_parts_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, recipe = random_task(), replace(RECIPE, margin=0.99)
    whole, _ = _mine(Hashing(), task, tmp_path / "whole", recipe)
    monkeypatch.setattr(negatives, "PART", 7)
    parts, _ = _mine(Hashing(), task, tmp_path / "parts", recipe)
    assert parts == whole
    assert list(parts) == [query.qid for query in task.queries if query.qid in parts]


def test_interrupted_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(negatives, "PART", 7)
    whole, _ = _mine(Hashing(), random_task(), tmp_path / "whole", RECIPE)
    searched: list[int] = []

    class Stopping(negatives.ExactSearch):
        def search(self, query_QD: np.ndarray, k: int) -> Any:
            if len(searched) == 3:
                searched.append(0)
                raise KeyboardInterrupt
            searched.append(len(query_QD))
            return super().search(query_QD, k)

    monkeypatch.setattr(negatives, "ExactSearch", Stopping)
    with pytest.raises(KeyboardInterrupt):
        _mine(Hashing(), random_task(), tmp_path, RECIPE)
    assert _mine(Hashing(), random_task(), tmp_path, RECIPE)[0] == whole
    assert searched == [7, 7, 7, 0, 7, 7, 7, 3], "what was searched before the stop is not searched again"


def test_large_pool_is_searched_by_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = random_task(num_queries=100, num_candidates=17_000)
    exact, _ = _mine(Hashing(), task, tmp_path, replace(ALL, depth=10))
    monkeypatch.setattr(negatives, "EXACT_LIMIT", 16_999)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found, counts = _mine(Hashing(), task, tmp_path, replace(ALL, depth=10))
    hits = sum(len({did for did, _ in exact[qid]} & {did for did, _ in found[qid]}) for qid in exact)
    assert 0.95 <= counts.recall <= 1
    assert hits / 1000 == pytest.approx(counts.recall, abs=0.01)
    for query in task.queries:
        assert not {*query.positives} & {did for did, _ in found[query.qid]}


@pytest.fixture
def emoji(tmp_path: Path) -> Path:
    """The fixture with its pictures unpacked, to be broken."""
    shutil.copytree(FIXTURE / "emoji", tmp_path / "emoji")
    shutil.unpack_archive(tmp_path / "emoji" / "images.zip", tmp_path / "emoji" / "images")
    (tmp_path / "emoji" / "images.zip").unlink()
    return tmp_path / "emoji"


def test_unreadable_pictures_are_left_out_and_listed(tiny_embedder: Embedder, emoji: Path, tmp_path: Path) -> None:
    task = RetrievalDataset(emoji).load("it2i", "train")
    names = {str(one.item.image): one.did for one in task.candidates}
    gone, broken = (Path(name) for name in list(names)[:2])
    gone.unlink()
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DatasetError, match=rf"1 of .* pictures cannot be read, more than .*1\.00%.*{gone.name}"):
        _mine(tiny_embedder, task, tmp_path, ALL)
    with pytest.raises(DatasetError, match=r"2 of .* pictures cannot be read, more than .*10\.00%"):
        _mine(tiny_embedder, task, tmp_path, replace(ALL, max_unreadable=0.1))
    allowed = replace(ALL, max_unreadable=0.5)
    found, counts = _mine(tiny_embedder, task, tmp_path, allowed)
    lost = {names[str(gone)], names[str(broken)]}
    assert not lost & {did for pairs in found.values() for did, _ in pairs}
    queries = {query.qid for query in task.queries if str(query.item.image) in (str(gone), str(broken))}
    assert found.keys() == {query.qid for query in task.queries} - queries
    listed = (tmp_path / "out" / "unreadable.txt").read_text().splitlines()
    assert len(listed) == counts.num_unreadable == 2 + len(queries)
    assert all(line.startswith("emoji/it2i.train, ") for line in listed)
    assert sum(gone.name in line for line in listed) >= 1 and sum(broken.name in line for line in listed) >= 1

    shutil.unpack_archive(FIXTURE / "emoji" / "images.zip", emoji / "images")  # mended
    found, counts = _mine(tiny_embedder, task, tmp_path, allowed)
    assert counts.num_unreadable == 0 and len(found) == len(task.queries)
    assert not (tmp_path / "out" / "unreadable.txt").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"window": (50, 101)}, r"a first and a last rank from 1 to depth \(100\), got \[50, 101\]"),
        ({"window": (0, 10)}, "window must be"),
        ({"window": (20, 10)}, "window must be"),
        ({"window": (20,)}, "window must be"),
        ({"window": (1, 3), "sample": 4}, "sample must be from 1 to the 3 ranks"),
        ({"sample": 0}, "sample must be"),
        ({"max_score": 1.5}, "max_score must be a cosine"),
        ({"margin": 0.0}, "margin must be above 0"),
        ({"max_unreadable": 2.0}, "max_unreadable must be a share"),
    ],
)
def test_impossible_recipes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        MineRecipe(**settings)


def test_window_of_a_yaml_list() -> None:
    assert MineRecipe(window=[10, 50]).window == (10, 50)  # type: ignore[arg-type]


def test_tasks_of_one_name(tmp_path: Path) -> None:
    tasks = [random_task(), replace(random_task(), split="val")]
    with pytest.raises(DatasetError, match=r"Two tasks would be written to random\.t2t\.parquet"):
        mine(Hashing(), tasks, tmp_path, RECIPE, seed=0, cache=tmp_path)


def _start(folder: Path, seconds: float = 0.0, **environment: str) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.mining.worker", str(folder), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment)


def test_killed_run_goes_on_and_processes_share_the_work(tmp_path: Path) -> None:
    killed, shared = tmp_path / "killed", tmp_path / "shared"
    process = _start(killed, seconds=0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
    pair = [_start(shared, RANK=rank, LOCAL_RANK=rank, **together) for rank in ("0", "1")]

    deadline = time.monotonic() + 120
    while len(list(killed.rglob("*.npz"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = list(killed.rglob("*.npz"))
    assert 2 <= len(done) < 14 and not (killed / "out").exists()
    torn = done[0].with_name("0" * 32 + ".part")
    torn.write_bytes(done[0].read_bytes()[:500])
    assert _start(killed).wait(120) == 0
    assert all(one.wait(120) == 0 for one in pair)

    asked = [(shared / f"asked-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert len(asked[0]) + len(asked[1]) == len({*asked[0], *asked[1]}) == 105
    assert min(map(len, asked)) >= 40
    assert len((killed / "asked-0").read_text().splitlines()) <= 105 - 2 * 8 + 8

    alone = tmp_path / "alone"
    mine(Hashing(), [random_task()], alone / "out", RECIPE, seed=1, cache=alone / "cache")
    tables = [pq.read_table(folder / "out" / "random.t2t.parquet") for folder in (alone, killed, shared)]
    assert tables[0].num_rows == 45 * 4
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])
