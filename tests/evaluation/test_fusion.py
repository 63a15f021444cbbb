"""The weight of a reranker is found on validation queries, and on nothing else."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quarterlight.cli.main import program
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import CheckpointError, InputError
from quarterlight.evaluation.benchmark import run_suite
from quarterlight.evaluation.fusion import by_direction, tune_fusion
from quarterlight.evaluation.retrieval import RetrievalEvaluator
from quarterlight.evaluation.suites import Suite, SuiteTask
from quarterlight.metrics.fusion import RERANK
from quarterlight.models.checkpoint import load_reranker_settings, save_fusion_weights
from quarterlight.models.reranker import Reranker
from quarterlight.models.settings import RerankerSettings
from quarterlight.records import Candidate, Item, Query

FIXTURE = Path(__file__).parents[1] / "fixtures" / "retrieval"
OPENED: list[str] = []
"""Files that were opened; noted by the interpreter itself, of which nothing that opens a file knows."""


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and OPENED and isinstance(arguments[0], str):
        OPENED.append(arguments[0])


sys.addaudithook(_note)


class Angles:
    """Puts a text that is a number on the unit circle, at so many degrees."""

    def encode_query(self, items: Sequence[Item], /) -> np.ndarray:
        angle = np.radians([float(item.text or 0) for item in items])
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)

    encode_document = encode_query


class Liking:
    """Likes some candidates more than others, by their number; counts what it is asked."""

    def __init__(self, likes: dict[str, float], **settings: Any) -> None:
        self.settings = RerankerSettings(**settings)
        self.likes = likes
        self.asked = 0

    def predict(self, pairs: Sequence[tuple[Item, Item]], /) -> np.ndarray:
        self.asked += len(pairs)
        return np.array([self.likes.get(item.text or "", 0.0) for _, item in pairs], np.float32)


def task(name: str, positive: str, split: str = "val", dataset: str = "set") -> RetrievalTask:
    """Cosines of 1, 0.985 and 0.5 with a query at 0 degrees."""
    texts = {"a": "0", "b": "10", "c": "60"}
    return RetrievalTask(
        dataset=dataset,
        task=name,
        split=split,
        queries=[Query(qid="q", item=Item(text="0"), positives=(positive,))],
        candidates=[Candidate(did=did, item=Item(text=text)) for did, text in texts.items()],
    )


def test_the_best_weight_of_each_task_and_of_equal_ones_the_smallest() -> None:
    # b is first once w * 0.2 outweighs (1 - w) * 0.015: from about 0.07 on, so at 0.1; c likewise from 0.34 on
    judge = Liking({"10": 0.2, "60": 1.0})
    right = [task("x", "a"), task("y", "b"), task("z", "c")]
    tuned = tune_fusion(Angles(), judge, right, rerank=2)
    assert [(one.label, one.weight) for one in tuned] == [("set/x", 0.0), ("set/y", 0.1), ("set/z", 0.0)]
    assert judge.asked == 6  # both pairs once for each task, however many weights ask for them; c is out of reach
    assert tuned[1].scores[0.05] == 0.5 and tuned[1].scores[0.1] == tuned[1].scores[1.0] == 1.0
    (third,) = tune_fusion(Angles(), judge, right[2:], rerank=3, weights=(0.3, 0.4, 1.0), metric="precision@1")
    assert third.weight == 0.4 and third.scores == {0.3: 0.0, 0.4: 1.0, 1.0: 1.0}
    for split in ("test", "train", "test_unseen"):
        with pytest.raises(InputError, match=f"on the split 'val' alone, got '{split}'"):
            tune_fusion(Angles(), judge, [task("x", "a", split)], rerank=2)
    with pytest.raises(InputError, match=r"no metric 'mmr'\. Did you mean 'mrr'"):
        tune_fusion(Angles(), judge, right, rerank=2, metric="mmr")


def test_an_evaluation_takes_the_weight_of_its_task() -> None:
    judge = Liking({"10": 1.0}, fusion_weight=0.0, fusion_weights={"set/y": 1.0, "x": 1.0})
    found = {}
    for name in ("x", "y", "z"):
        result = RetrievalEvaluator(Angles(), reranker=judge, rerank=3).evaluate(task(name, "b", "test"))
        assert result.reranked is not None
        found[name] = result.reranked.metrics["precision@1"], result.fusion_weight
    assert found == {"x": (1.0, 1.0), "y": (1.0, 1.0), "z": (0.0, 0.0)}
    given = RetrievalEvaluator(Angles(), reranker=judge, rerank=3, fusion_weight=0.5).evaluate(task("x", "b", "test"))
    assert given.fusion_weight == given.to_json()["fusion_weight"] == 0.5
    assert RetrievalEvaluator(Angles()).evaluate(task("x", "b", "test")).fusion_weight is None
    assert RerankerSettings.from_dict(judge.settings.to_dict()) == judge.settings
    with pytest.raises(CheckpointError, match=r"from 0 to 1, got 2.0 for 'x'"):
        RerankerSettings.from_dict({"fusion_weights": {"x": 2.0}})


def test_a_direction_has_the_weight_that_is_best_over_its_datasets() -> None:
    # by itself, a wants no reranker; b wants it from about 0.07 on, and c, with three candidates, from 0.34 on
    judge = Liking({"10": 0.2, "60": 1.0})
    asked = [task("t2i", "a", dataset="one"), task("t2i", "b", dataset="two"), task("i2t", "b", dataset="two")]
    tuned = tune_fusion(Angles(), judge, [*asked, task("t2i", "c", dataset="three")], rerank=2, metric="precision@1")
    assert [one.weight for one in tuned] == [0.0, 0.1, 0.1, 0.0]
    words, pictures = by_direction(tuned)
    # 1/3 of the queries are right at any weight, in one dataset or the other: of equal ones the smallest
    assert (words.label, words.weight, words.num_queries) == ("t2i", 0.0, 3)
    assert words.scores[0.0] == words.scores[1.0] == pytest.approx(1 / 3)
    assert (pictures.label, pictures.weight, pictures.scores) == ("i2t", 0.1, tuned[2].scores)  # of a single dataset
    more = tune_fusion(Angles(), judge, [*asked[:2], task("t2i", "b", dataset="four")], rerank=2)
    (several,) = by_direction(more)  # reciprocal ranks: (1 + 1/2 + 1/2) / 3 below 0.1, (1/2 + 1 + 1) / 3 from there on
    assert several.weight == 0.1 and several.scores[0.0] == pytest.approx(2 / 3)
    assert several.scores[0.1] == pytest.approx(5 / 6)


def test_a_suite_takes_the_weight_of_the_direction() -> None:
    """Its tasks are called otherwise than the folders that weights were tuned on."""
    declared = SuiteTask(
        name="M-BEIR/MSCOCO task0",
        loader="none",
        metric="precision@1",
        ties="expected",
        group="",
        in_distribution="",
        entry=None,
        direction="t2i",
        split="test",
    )
    asked = task("t2i", "b", "test", dataset=declared.name)
    suite = Suite(name="one", title="One", tasks=(declared,), averages=(), reference_table=None)
    tuned = tune_fusion(Angles(), Liking({"10": 1.0}), [task("t2i", "b", dataset="mscoco")], rerank=3)
    weights = {one.label: one.weight for one in (*tuned, *by_direction(tuned))}
    judge = Liking({"10": 1.0}, fusion_weight=0.0, fusion_weights=weights)
    evaluator = RetrievalEvaluator(Angles(), reranker=judge, rerank=3)
    (record,) = run_suite(evaluator, suite, suite.tasks, lambda _: asked).to_json()["tasks"]
    assert record["score"] == 0.0 and record["reranked"] == 1.0
    assert record["fusion_weight"] == tuned[0].weight != judge.settings.fusion_weight


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "emoji"
    shutil.copytree(FIXTURE / "emoji", folder)
    for part in ("queries", "pools"):
        shutil.copy(folder / part / "t2i.train.jsonl", folder / part / "t2i.val.jsonl")
    return folder


def test_the_command_saves_what_it_found_and_opens_no_test_file(
    data: Path, tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_pair, model)
    before = Reranker(model).model_hash

    def call(*more: str) -> int:
        with pytest.raises(SystemExit) as left:
            arguments = ["tune-fusion", str(data), "--model", str(model), "--rerank", "4", "--json", *more]
            program()(args=arguments, prog_name="quarterlight")
        return int(left.value.code or 0)

    OPENED.append("begin")
    try:
        assert call("--dry-run", "--rerank") == 0
        assert load_reranker_settings(model / "reranker").fusion_weights == {}
        assert call() == 0
    finally:
        seen = {Path(name).name for name in OPENED}
        OPENED.clear()
    assert "t2i.val.jsonl" in seen and not any(".test" in name or ".train" in name for name in seen)
    dry, said = map(json.loads, capsys.readouterr().out.splitlines())
    assert (dry["rerank"], said["rerank"]) == (RERANK, 4)
    settings = load_reranker_settings(model / "reranker")
    found = said["tasks"]["emoji/t2i"]
    assert settings.fusion_weights == dict.fromkeys(("emoji/t2i", "t2i"), found["weight"])
    assert settings.weight_of("t2i") == settings.weight_of("t2i", "M-BEIR/MSCOCO task0") == found["weight"]
    assert said["directions"] == {"t2i": {**found, "dataset": None}}
    assert settings.weight_of("t2i", "emoji") == found["weight"] and settings.weight_of("i2t", "emoji") == 1.0
    content = json.loads((model / "reranker" / "quarterlight.json").read_text())
    assert content["fusion"]["split"] == "val" and content["fusion"]["tasks"]["emoji/t2i"] == found
    assert Reranker(model).model_hash == before  # scores are what they were
    assert call("--split", "test") == 1
    assert "on the split 'val' alone" in capsys.readouterr().err


def test_weights_are_added_to_older_ones(tiny_pair: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reranker"
    shutil.copytree(tiny_pair / "reranker", folder)
    save_fusion_weights(folder, {"a/x": 0.5, "b/y": 0.5}, {})
    new = save_fusion_weights(folder, {"b/y": 0.25}, {"split": "val"})
    assert new.fusion_weights == {"a/x": 0.5, "b/y": 0.25} == load_reranker_settings(folder).fusion_weights
    assert new == replace(load_reranker_settings(tiny_pair / "reranker"), fusion_weights=new.fusion_weights)
    assert not list(folder.glob("*.part"))
    with pytest.raises(CheckpointError, match="holds no reranker"):
        save_fusion_weights(tiny_pair, {"a/x": 0.5}, {})
