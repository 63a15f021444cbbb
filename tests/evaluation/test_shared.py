"""Embeddings that outlive a run, and processes that share one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tests.evaluation.worker import Hashing, open_task, run, suite
from tests.training.test_distributed import in_two_processes

from quarterlight.errors import DatasetError
from quarterlight.evaluation.benchmark import run_suite
from quarterlight.evaluation.retrieval import RetrievalEvaluator
from quarterlight.models.embedder import Embedder
from quarterlight.records import Candidate, Item, Query
from quarterlight.training import embeddings

ROOT = Path(__file__).parents[2]


def record_of(out: Path, process: int = 0) -> dict[str, object]:
    record = json.loads((out / f"record-{process}.json").read_text())
    record.pop("cost")  # alone in depending on what was kept
    return record


def asked(out: Path, process: int = 0) -> list[str]:
    return (out / f"asked-{process}").read_text().splitlines()


def runs(out: Path) -> dict[str, list[tuple[str, str]]]:
    """The files of runs as pairs of ids in order.  Scores may differ in the last digit that is written."""
    files = sorted((out / "runs").iterdir())
    lines = {file.name: [line.split() for line in file.read_text().splitlines()] for file in files}
    return {name: [(line[0], line[2]) for line in of_file] for name, of_file in lines.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run(out, out / "cache")
    everything = {f"{name} {n}" for name in ("whole", "own") for n in range(45)}
    everything |= {f"candidate {n}" for n in range(60)}
    assert sorted(asked(out)) == sorted(everything)  # the tasks share their candidates
    return out


def test_two_processes_find_what_one_finds(whole: Path, tmp_path: Path) -> None:
    in_two_processes(run, tmp_path, tmp_path / "cache")
    assert record_of(tmp_path, 0) == record_of(tmp_path, 1) == record_of(whole)
    assert runs(tmp_path) == runs(whole)
    shares = [asked(tmp_path, rank) for rank in range(2)]
    assert all(shares) and sorted(shares[0] + shares[1]) == sorted(asked(whole))
    seen, num_read = json.loads((whole / "pictures-0.json").read_text())
    assert num_read == 5 and "missing.png" in seen[2] and len({*seen}) == 5
    pictures = [json.loads((tmp_path / f"pictures-{rank}.json").read_text()) for rank in range(2)]
    assert pictures == [[seen, 2], [seen, 3]]


def killed(folder: Path, cache: Path, blocks: str, number: int, *slowness: str) -> list[Path]:
    """The blocks of a run that was killed once there were so many. slowness: seconds of an embedding and of a pair."""
    command = [sys.executable, "-m", "tests.evaluation.worker", str(folder), str(cache), *slowness]
    running = subprocess.Popen(command, cwd=ROOT)
    until = time.monotonic() + 200
    while len(list(cache.glob(blocks))) < number and time.monotonic() < until and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    return list(cache.glob(blocks))


def test_a_killed_run_goes_on_without_embedding_anything_twice(whole: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    kept = killed(tmp_path / "killed", cache, "**/*.npz", 4, "0.4", "0")
    assert 4 <= len(kept) < 19
    done = sum(len(np.load(file)["key"]) for file in kept)
    run(tmp_path / "again", cache)
    assert len(asked(tmp_path / "again")) == len(asked(whole)) - done
    assert record_of(tmp_path / "again") == record_of(whole)
    assert runs(tmp_path / "again") == runs(whole)


def test_a_killed_run_goes_on_without_scoring_a_pair_twice(whole: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    kept = killed(tmp_path / "killed", cache, "coin/pairs/*.npz", 3, "0", "0.4")
    everything = (whole / "pairs-0").read_text().splitlines()
    assert len(kept) >= 3 and len(set(everything)) == len(everything)
    run(tmp_path / "again", cache)
    asked_again = (tmp_path / "again" / "pairs-0").read_text().splitlines()
    done = sum(len(np.load(file)["key"]) for file in kept)
    assert 0 < done < len(everything)
    assert len(asked_again) == len(everything) - done and set(asked_again) < set(everything)
    assert record_of(tmp_path / "again") == record_of(whole)
    assert runs(tmp_path / "again") == runs(whole)
    kept[0].write_bytes(kept[0].read_bytes()[:90])
    with pytest.raises(DatasetError, match=r"\.npz is damaged .* its pairs are scored again"):
        run(tmp_path / "damaged", cache)


def test_runs_share_embeddings_by_content_instruction_and_tiles(
    tiny_embedder: Embedder, picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(0).save(tmp_path / "a.png")
    picture(0).save(tmp_path / "copy.png")
    calls: list[int] = []
    encode = tiny_embedder.encode_document
    monkeypatch.setattr(tiny_embedder, "encode_document", lambda items: calls.append(len(items)) or encode(items))

    def task(name: str, **more: object) -> object:
        from quarterlight.data.retrieval import RetrievalTask

        pool = [
            Candidate(did="d", item=Item(image=str(tmp_path / name), **more)),
            Candidate(did="e", item=Item(text="another", **more)),
        ]
        asks = [Query(qid="q", item=Item(text="a picture"), positives=("d",))]
        return RetrievalTask(dataset="x", task="t2i", split="test", queries=asks, candidates=pool)

    def scored(name: str, **more: object) -> object:
        return RetrievalEvaluator(tiny_embedder, embeddings=tmp_path / "cache").evaluate(task(name, **more))

    first = scored("a.png")
    assert (first.num_embedded, calls) == (3, [2])
    copy = scored("copy.png")
    assert (copy.num_embedded, calls) == (0, [2]) and copy.scores == first.scores
    assert scored("a.png", instruction="Find it.").num_embedded == 2
    assert scored("a.png", max_tiles=4).num_embedded == 2
    without = RetrievalEvaluator(tiny_embedder).evaluate(task("a.png"))
    assert without.scores.metrics == pytest.approx(first.scores.metrics)


def test_what_cannot_be_read_is_named_from_the_cache_too(tmp_path: Path, picture) -> None:
    made_up = suite()
    bad = tmp_path / "bad.png"
    picture(0).save(bad)
    bad.write_bytes(bad.read_bytes()[:60])

    class Strict(Hashing):
        def encode_document(self, items):
            from quarterlight.images import load_image

            for item in items:
                for one in item.images:
                    load_image(one)
            return self.encode_query(items)

    def opened(task):
        from dataclasses import replace

        plain = open_task(task)
        more = [Candidate(did="bad", item=Item(image=str(bad))), Candidate(did="gone", item=Item(image="gone.png"))]
        queries = [*plain.queries, Query(qid="lost", item=Item(text="lost"), positives=("bad", "gone"))]
        return replace(plain, queries=queries, candidates=[*plain.candidates, *more])

    records = []
    for _ in range(2):
        evaluator = RetrievalEvaluator(Strict(), embeddings=tmp_path / "cache", prepare=lambda task: task)
        records.append(run_suite(evaluator, made_up, made_up.tasks[:1], opened))
    for record in records:
        (one,) = record.tasks
        assert [problem["id"] for problem in one["problems"]] == ["bad", "gone", "lost"]
        assert (one["num_scored"], one["num_queries"]) == (45, 46)
    assert records[0].tasks == records[1].tasks
    assert records[1].cost[0]["num_embedded"] == 0


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    made_up = suite()
    run_suite(RetrievalEvaluator(Hashing(), embeddings=tmp_path), made_up, made_up.tasks, open_task)
    shard = next(tmp_path.rglob("*.npz"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DatasetError, match=r"\.npz is damaged"):
        run_suite(RetrievalEvaluator(Hashing(), embeddings=tmp_path), made_up, made_up.tasks, open_task)


def test_shards_are_those_that_mining_writes(tmp_path: Path) -> None:
    """One store for both: what was embedded to mine is not embedded again to evaluate."""
    made_up = suite()
    encoder = Hashing()
    contents, store = embeddings.Contents(), embeddings.Embeddings(encoder, tmp_path)
    items = [one.item for one in open_task(made_up.tasks[0]).candidates]
    contents.read(items)
    store.add("document", {key: item for item in items if (key := contents.key(item))})
    encoder.asked.clear()
    evaluator = RetrievalEvaluator(encoder, embeddings=tmp_path, prepare=lambda task: task)
    run_suite(evaluator, made_up, made_up.tasks[:1], open_task)
    assert set(encoder.asked) == {f"whole {n}" for n in range(45)}
