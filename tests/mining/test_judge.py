from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quarterlight.data.retrieval import RetrievalDataset, RetrievalTask, with_negatives
from quarterlight.errors import DatasetError, JudgeError, RecipeError
from quarterlight.mining.judge import EXEMPT, JudgeRecipe, judge, judgment_instruction, read_judged
from quarterlight.mining.judges import Judge, Pair, Verdict
from quarterlight.mining.judges.labels import LabelJudge
from quarterlight.recipe import parse

FIXTURE = Path(__file__).parents[1] / "fixtures" / "retrieval"
LABELS = JudgeRecipe(backend="labels")


@pytest.fixture(scope="module")
def whole() -> RetrievalTask:
    """Every query, made to have two positives at least."""
    task = RetrievalDataset(FIXTURE / "emoji").load("t2i", "train")
    return replace(task, queries=[query for query in task.queries if len(query.positives) == 2])


@pytest.fixture(scope="module")
def task(whole: RetrievalTask) -> RetrievalTask:
    """The same with one of them."""
    return replace(whole, queries=[replace(query, positives=query.positives[:1]) for query in whole.queries])


@pytest.fixture
def retrieved(tmp_path: Path, whole: RetrievalTask) -> Path:
    """Six candidates for each query: the first positive in the second place, the other in the fourth."""
    rows: list[tuple[str, str, float, int]] = []
    for query in whole.queries:
        others = [one.did for one in whole.candidates if one.did not in query.positives]
        dids = [others[3], query.positives[0], others[0], query.positives[1], others[2], others[1]]
        rows += [(query.qid, did, 1.0 / rank, rank) for rank, did in enumerate(dids, 1)]
    return write(tmp_path / "retrieved", "emoji.t2i", rows)


def write(folder: Path, stem: str, rows: Sequence[tuple[str, str, float, int]]) -> Path:
    folder.mkdir(exist_ok=True)
    columns = dict(zip(("qid", "did", "score", "rank"), map(list, zip(*rows, strict=True)), strict=True))
    types = pa.schema([("qid", pa.string()), ("did", pa.string()), ("score", pa.float32()), ("rank", pa.int32())])
    pq.write_table(pa.table(columns, schema=types), folder / f"{stem}.parquet")
    return folder


class Stopping:
    """Another judge, one pair at a time, that is stopped after some or fails at some; it notes what it is asked."""

    def __init__(self, other: Judge, *, after: int = 1_000_000, fails: Iterable[tuple[str, str]] = ()) -> None:
        self.other = other
        self.name = other.name
        self.after = after
        self.fails = set(fails)
        self.asked: list[tuple[str, str]] = []

    def judge(self, pairs: Iterable[Pair]) -> Iterator[Sequence[Verdict]]:
        for pair in pairs:
            ids = pair.query.qid, pair.candidate.did
            if len(self.asked) == self.after:
                raise KeyboardInterrupt
            self.asked.append(ids)
            yield [Verdict(*ids, failed="asleep")] if ids in self.fails else next(self.other.judge([pair]))


def test_judged_candidates_are_told_apart(
    whole: RetrievalTask, task: RetrievalTask, retrieved: Path, tmp_path: Path
) -> None:
    counts = judge([task], retrieved, tmp_path / "judged", LABELS, by=LabelJudge([whole]))
    number = len(task.queries)
    assert vars(counts["emoji/t2i"]) == {"yes": number, "no": 4 * number, "undecided": 0, "failed": 0}
    negatives, relevant = read_judged(tmp_path / "judged", task)
    for query in whole.queries:
        others = [one.did for one in whole.candidates if one.did not in query.positives]
        assert relevant[query.qid] == [query.positives[1]]
        assert negatives[query.qid] == [others[3], others[0], others[2], others[1]]
    curated = with_negatives(task, negatives, also_relevant=relevant)
    assert curated.queries[0].also_relevant == (whole.queries[0].positives[1],)


def test_the_file_is_as_the_design_says(task: RetrievalTask, retrieved: Path, tmp_path: Path) -> None:
    judge([task], retrieved, tmp_path / "judged", LABELS)
    table = pq.read_table(tmp_path / "judged" / "emoji.t2i.parquet")
    assert table.column_names == ["qid", "did", "yes_logit", "no_logit", "relevant", "judge"]
    assert table.slice(0, 1).to_pylist()[0] | {"did": ""} == {
        "qid": task.queries[0].qid,
        "did": "",
        "yes_logit": -1.0,
        "no_logit": 1.0,
        "relevant": False,
        "judge": "labels",
    }
    assert sorted(path.name for path in (tmp_path / "judged").iterdir()) == [
        "emoji.t2i.parquet",
        "report.html",
        "report.json",
    ]


def test_truth_can_lie_in_another_directory(
    whole: RetrievalTask, task: RetrievalTask, retrieved: Path, tmp_path: Path
) -> None:
    counts = judge([task], retrieved, tmp_path / "judged", replace(LABELS, truth=str(FIXTURE)))
    assert counts["emoji/t2i"].yes == len(whole.queries)


def test_a_stopped_run_goes_on_without_asking_again(
    whole: RetrievalTask, task: RetrievalTask, retrieved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "judged"
    first, second = Stopping(LabelJudge([whole]), after=7), Stopping(LabelJudge([whole]))
    with pytest.raises(KeyboardInterrupt):
        judge([task], retrieved, folder, LABELS, by=first)
    with (folder / "emoji.t2i.jsonl").open("a") as journal:
        journal.write('["101:1", "101')  # the line at which it was killed
    judge([task], retrieved, folder, LABELS, by=second)
    assert len(first.asked) == 7
    assert len({*first.asked, *second.asked}) == len(first.asked) + len(second.asked) == 5 * len(task.queries)
    judge([task], retrieved, tmp_path / "at once", LABELS, by=LabelJudge([whole]))
    names = "emoji.t2i.parquet", "report.json", "report.html"
    for resumed, whole_run in ((folder / name, tmp_path / "at once" / name) for name in names):
        assert resumed.read_bytes() == whole_run.read_bytes()
    third = Stopping(LabelJudge([whole]))
    judge([task], retrieved, folder, LABELS, by=third)
    assert third.asked == []


def test_pairs_that_failed_are_asked_again(
    whole: RetrievalTask, task: RetrievalTask, retrieved: Path, tmp_path: Path
) -> None:
    folder, query = tmp_path / "judged", whole.queries[1]
    bad = Stopping(LabelJudge([whole]), fails=[(query.qid, query.positives[1])])
    with pytest.raises(JudgeError, match=r"1 of \d+ pairs have no answer, more than max_failed = 0 .*asleep"):
        judge([task], retrieved, folder, replace(LABELS, max_failed=0.0), by=bad)
    assert query.qid not in read_judged(folder, task)[1]
    report = json.loads((folder / "report.json").read_text())["tasks"]["emoji/t2i"]
    assert (report["failed"], report["failures"]) == (1, {"asleep": 1})
    good = Stopping(LabelJudge([whole]))
    counts = judge([task], retrieved, folder, replace(LABELS, max_failed=0.0), by=good)
    assert good.asked == [(query.qid, query.positives[1])] and counts["emoji/t2i"].failed == 0
    assert read_judged(folder, task)[1][query.qid] == [query.positives[1]]


def test_a_judge_that_never_answers_is_not_asked_for_ever(
    whole: RetrievalTask, task: RetrievalTask, retrieved: Path, tmp_path: Path
) -> None:
    many = [(query.qid, one.did, 0.5, 1) for query in task.queries for one in task.candidates]
    dead = Stopping(LabelJudge([whole]), fails=[(qid, did) for qid, did, _, _ in many])
    with pytest.raises(JudgeError, match=r"gave no answer 64 times in a row; the last: .*asleep.*start the same"):
        judge([task], write(tmp_path / "many", "emoji.t2i", many), tmp_path / "judged", LABELS, by=dead)
    assert len(dead.asked) == 64


def test_what_can_never_be_judged_keeps_nothing_waiting(
    whole: RetrievalTask, task: RetrievalTask, retrieved: Path, tmp_path: Path
) -> None:
    """A stretch of pairs that no judge can answer stops a run once; the next one does the others first."""
    many = [(query.qid, one.did, 0.5, 1) for query in task.queries for one in task.candidates]
    known = {(query.qid, did) for query in task.queries for did in query.positives}
    pairs = [(qid, did) for qid, did, _, _ in many if (qid, did) not in known]
    many, folder = write(tmp_path / "many", "emoji.t2i", many), tmp_path / "judged"
    lenient = replace(LABELS, max_failed=1.0)
    first, second = (Stopping(LabelJudge([whole]), fails=pairs[:64]) for _ in range(2))
    with pytest.raises(JudgeError, match="64 times in a row"):
        judge([task], many, folder, lenient, by=first)
    counts = judge([task], many, folder, lenient, by=second)
    assert second.asked == pairs[64:] + pairs[:64]
    assert counts["emoji/t2i"].failed == 64
    third = Stopping(LabelJudge([whole]), fails=pairs[:64])
    judge([task], many, folder, lenient, by=third)
    assert third.asked == pairs[:64]


def test_verdicts_of_another_judge_are_not_mixed_in(
    whole: RetrievalTask, task: RetrievalTask, retrieved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "judged"
    with pytest.raises(KeyboardInterrupt):
        judge([task], retrieved, folder, LABELS, by=Stopping(LabelJudge([whole]), after=2))
    told = replace(LABELS, instructions={"emoji/t2i": "Say yes."})
    with pytest.raises(JudgeError, match=r"emoji.t2i.jsonl was made with the instruction .*'Say yes.' now"):
        judge([task], retrieved, folder, told)
    judge([task], retrieved, folder, LABELS)
    other = Stopping(LabelJudge([whole]))
    other.name = "oracle"
    with pytest.raises(JudgeError, match=r"emoji.t2i.parquet was made with the judge 'labels', which is 'oracle' now"):
        judge([task], retrieved, folder, LABELS, by=other)


def test_exempt_tasks_are_not_judged(
    whole: RetrievalTask, task: RetrievalTask, retrieved: Path, tmp_path: Path
) -> None:
    nobody = Stopping(LabelJudge([whole]))
    judge([task], retrieved, tmp_path / "judged", replace(LABELS, exempt=["emoji/t2i"]), by=nobody)
    negatives, relevant = read_judged(tmp_path / "judged", task)
    assert nobody.asked == [] and relevant == {}
    assert all(len(dids) == 5 for dids in negatives.values())  # the known positive is still none
    assert set(pq.read_table(tmp_path / "judged" / "emoji.t2i.parquet")["judge"].to_pylist()) == {EXEMPT}


def test_the_undecided_are_neither(task: RetrievalTask, retrieved: Path, tmp_path: Path) -> None:
    judge([task], retrieved, tmp_path / "judged", replace(LABELS, incomplete=["emoji/t2i"]))
    assert read_judged(tmp_path / "judged", task) == ({}, {})


def test_nothing_retrieved_is_nothing_judged(task: RetrievalTask, tmp_path: Path) -> None:
    empty = pa.table({"qid": pa.array([], pa.string()), "did": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "emoji.t2i.parquet")
    counts = judge([task], tmp_path, tmp_path / "judged", LABELS)
    assert counts["emoji/t2i"].pairs == 0 and read_judged(tmp_path / "judged", task) == ({}, {})


def test_a_full_disk_is_a_sentence_and_keeps_what_was_judged(
    whole: RetrievalTask, task: RetrievalTask, retrieved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "judged"
    with pytest.raises(KeyboardInterrupt):
        judge([task], retrieved, folder, LABELS, by=Stopping(LabelJudge([whole]), after=3))
    os.link(folder / "emoji.t2i.jsonl", tmp_path / "kept")
    (folder / "emoji.t2i.jsonl").unlink()
    (folder / "emoji.t2i.jsonl").symlink_to("/dev/full")
    with pytest.raises(JudgeError, match=r"cannot be written: No space left on device.*start the same command again"):
        judge([task], retrieved, folder, LABELS)
    (folder / "emoji.t2i.jsonl").unlink()
    (tmp_path / "kept").rename(folder / "emoji.t2i.jsonl")
    rest = Stopping(LabelJudge([whole]))
    judge([task], retrieved, folder, LABELS, by=rest)
    assert len(rest.asked) == 5 * len(task.queries) - 3


def test_bad_input_is_a_sentence(task: RetrievalTask, retrieved: Path, tmp_path: Path) -> None:
    strange = write(tmp_path / "strange", "emoji.t2i", [(task.queries[0].qid, "7:7", 0.5, 1)])
    with pytest.raises(DatasetError, match=r"emoji.t2i.parquet names '7:7', which emoji/t2i.train does not have"):
        judge([task], strange, tmp_path / "judged", LABELS)
    with pytest.raises(DatasetError, match=r"emoji.t2i.parquet"):
        judge([task], tmp_path / "nowhere", tmp_path / "judged", LABELS)
    with pytest.raises(DatasetError, match=r"is not there: judge this task first"):
        read_judged(tmp_path / "nowhere", task)
    (tmp_path / "emoji.t2i.parquet").write_bytes(b"PAR")
    with pytest.raises(DatasetError, match=r"is no Parquet file of verdicts"):
        read_judged(tmp_path, task)
    folder = tmp_path / "damaged"
    folder.mkdir()
    asked = {"judge": "labels", "instruction": judgment_instruction("emoji/t2i", {})}
    (folder / "emoji.t2i.jsonl").write_text(json.dumps(asked) + "\nnot a verdict\n")
    with pytest.raises(JudgeError, match=r"holds a line that is no verdict"):
        judge([task], retrieved, folder, LABELS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backend": "label"}, "no judge 'label'. Did you mean 'labels'"),
        ({"backend": "endpoint", "model": "m"}, "'endpoint' needs url"),
        ({"backend": "transformers"}, "'transformers' needs model"),
        ({"backend": "labels", "model": "m"}, "'labels' has no use for model"),
        ({"backend": "transformers", "model": "m", "url": "http://u"}, "'transformers' has no use for url"),
        ({"backend": "endpoint", "model": "m", "url": "u", "truth": "d"}, "'endpoint' has no use for truth"),
        ({"backend": "labels", "concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"backend": "labels", "max_failed": 2}, "max_failed must be a share from 0 to 1, got 2.0"),
        ({"backend": "labels", "tempo": 2}, "unknown key 'tempo'"),
    ],
)
def test_impossible_recipes_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(JudgeRecipe, values, where="judge")


def test_recipes_are_parsed() -> None:
    values = {"backend": "labels", "same": {"emoji/t2i": ["concept"]}, "exempt": ["a/i2t"]}
    assert parse(JudgeRecipe, values, where="judge").same == {"emoji/t2i": ("concept",)}


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("mmeb_mscoco/i2t", "Determine whether the given text can serve as a caption for the given image."),
        ("MSCOCO/t2i", "Determine whether the given query text is relevant to the given image."),
        ("ok_vqa/it2t", "Given a reference image and a question, determine whether the provided answer is correct."),
        ("mmeb_hatefulmemes/i2t", None),
        ("emoji/t2t", "Determine whether the given query text is relevant to the given text."),
        ("emoji/sounds", "Determine whether the given target is relevant to the given query."),
    ],
)
def test_instructions_are_those_of_the_paper_or_of_the_direction(name: str, instruction: str | None) -> None:
    assert judgment_instruction(name, {}) == instruction
    assert judgment_instruction(name, {name: "Mine."}) == "Mine."
