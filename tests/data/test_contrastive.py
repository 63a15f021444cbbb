from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quarterlight.data.contrastive import BatchSampler, ContrastiveBatch, Fill, TaskMixture
from quarterlight.data.retrieval import RetrievalDataset, RetrievalTask, with_instructions
from quarterlight.errors import DatasetError, InputError
from quarterlight.records import Candidate, Item, Query

FIXTURE = Path(__file__).parents[1] / "fixtures" / "retrieval"


def random_task(name: str, queries: int, candidates: int, *, seed: int = 0, texts: int | None = None) -> RetrievalTask:
    """A task with up to 3 positives and 3 negatives a query; ``texts`` < candidates makes copies under other ids.

    Tasks share their texts, so that a batch of several has copies of answers that came with another task.
    """
    generator = np.random.default_rng(seed)
    pool = [Candidate(did=f"{name}:{n}", item=Item(text=f"{n % (texts or candidates)}")) for n in range(candidates)]
    rows = []
    for number in range(queries):
        chosen = [pool[n].did for n in generator.choice(candidates, size=6, replace=False)]
        cut = 1 + number % 3
        rows.append(
            Query(
                qid=f"{name}:q{number}",
                item=Item(text=f"{name}:q{number}"),
                positives=tuple(chosen[:cut]),
                negatives=tuple(chosen[3:]),
            )
        )
    return RetrievalTask(dataset=name, task="t2t", split="train", queries=rows, candidates=pool)


def one_task(
    queries: list[Query], texts: str, *, name: str = "a", direction: str = "t2t", prefix: str = ""
) -> RetrievalTask:
    """A task whose candidates are one letter each and go by it, after the prefix."""
    pool = [Candidate(did=f"{prefix}{text}", item=Item(text=text)) for text in texts]
    return RetrievalTask(dataset=name, task=direction, split="train", queries=queries, candidates=pool)


def ask(qid: str, positives: Sequence[str], negatives: str = "", *, text: str | None = None, **more: Any) -> Query:
    """A query whose candidates are named by letters."""
    item = Item(text=text or qid, instruction=more.pop("instruction", None))
    return Query(qid=qid, item=item, positives=tuple(positives), negatives=tuple(negatives), **more)


def rows_of(batch: ContrastiveBatch) -> tuple[list[str], tuple[list[str], list[str]], bytes]:
    return [task.label for task in batch.tasks], batch.ids, batch.known_positive.tobytes()


def task_of(batch: ContrastiveBatch) -> RetrievalTask:
    """The one task of all rows."""
    (label,) = {task.label for task in batch.tasks}
    return next(task for task in batch.tasks if task.label == label)


@pytest.fixture
def mixture() -> TaskMixture:
    return TaskMixture(tasks=[random_task("a", 500, 300), random_task("b", 200, 150, texts=40), random_task("c", 7, 9)])


def test_batches_are_of_one_task_and_full(mixture: TaskMixture) -> None:
    for batch in BatchSampler(mixture, batch_size=32, num_negatives=2).batches(0, 100):
        task = task_of(batch)
        own = {candidate.did for candidate in task.candidates}
        assert len(batch.queries) == len(batch.tasks) == min(32, len(task.queries))
        assert all(candidate.did in own for candidate in batch.candidates)
        assert batch.known_positive.shape == (len(batch.queries), len(batch.candidates))
        assert len(batch.candidates) == 3 * len(batch.queries) or task.dataset == "b"


@pytest.mark.parametrize(("sub_batch_size", "fill"), [(None, "none"), (8, "none"), (4, "repeat")])
def test_targets_are_positives_and_no_known_positive_is_left_as_a_negative(
    mixture: TaskMixture, sub_batch_size: int | None, fill: Fill
) -> None:
    text = {candidate.did: candidate.item.text for task in mixture.tasks for candidate in task.candidates}
    for batch in BatchSampler(
        mixture, batch_size=32, num_negatives=2, seed=3, sub_batch_size=sub_batch_size, fill=fill
    ).batches(0, 40):
        for row, query in enumerate(batch.queries):
            assert batch.candidates[row].did in query.positives
            answers = {text[did] for did in query.positives}
            for column, candidate in enumerate(batch.candidates):
                assert batch.known_positive[row, column] == (candidate.item.text in answers and column != row)


def test_negatives_are_those_of_the_row() -> None:
    task = random_task("a", 64, 400)
    batch = BatchSampler(TaskMixture(tasks=[task]), batch_size=16, num_negatives=2).batch(0)
    for row, query in enumerate(batch.queries):
        drawn = [candidate.did for candidate in batch.candidates[16 + 2 * row : 18 + 2 * row]]
        assert len(set(drawn)) == 2 and set(drawn) <= set(query.negatives)


def test_the_same_question_in_two_rows_shares_its_answers() -> None:
    pool = [Candidate(did=f"d{n}", item=Item(text=f"{n}")) for n in range(2)]
    queries = [
        Query(qid=f"q{n}", item=Item(text="which?"), positives=(f"d{n}",), negatives=(f"d{1 - n}",)) for n in range(2)
    ]
    task = RetrievalTask(dataset="a", task="t2t", split="train", queries=queries, candidates=pool)
    batch = BatchSampler(TaskMixture(tasks=[task]), batch_size=2, num_negatives=1).batch(0)
    assert len(batch.candidates) == 2  # the labelled negative of each row answers the same question in the other
    assert batch.known_positive.tolist() == [[False, True], [True, False]]


def test_no_target_twice_where_possible() -> None:
    task = random_task("a", 640, 60)
    for batch in BatchSampler(TaskMixture(tasks=[task]), batch_size=32).batches(0, 60):
        texts = [candidate.item.text for candidate in batch.candidates]
        assert len(set(texts)) == len(texts)


def test_few_answers_are_spread_evenly() -> None:
    """easy-VQA has 13 answers: a batch of 26 cannot do without repetition."""
    task = RetrievalDataset(FIXTURE / "easy_vqa").load("it2t", "train")
    for batch in BatchSampler(TaskMixture(tasks=[task]), batch_size=26).batches(0, 6):
        counts = Counter(candidate.did for candidate in batch.candidates)
        for row in range(26):
            assert batch.known_positive[row].sum() == counts[batch.candidates[row].did] - 1


def test_an_epoch_draws_no_query_twice() -> None:
    task = random_task("a", 100, 80)
    sampler = BatchSampler(TaskMixture(tasks=[task]), batch_size=10)
    assert sampler.steps_per_epoch == 10
    for epoch in range(3):
        seen = [query.qid for batch in sampler.batches(10 * epoch, 10 * epoch + 10) for query in batch.queries]
        assert sorted(seen) == sorted(query.qid for query in task.queries)
    first, second = ([q.qid for q in sampler.batch(step).queries] for step in (0, 10))
    assert first != second


def test_deterministic_and_resumable(mixture: TaskMixture) -> None:
    whole = [rows_of(b) for b in BatchSampler(mixture, batch_size=16, num_negatives=1, seed=5).batches(0, 60)]
    resumed = BatchSampler(mixture, batch_size=16, num_negatives=1, seed=5)
    assert [rows_of(b) for b in resumed.batches(37, 60)] == whole[37:]
    assert rows_of(resumed.batch(4)) == whole[4]
    other = [rows_of(b) for b in BatchSampler(mixture, batch_size=16, num_negatives=1, seed=6).batches(0, 60)]
    assert other != whole


def test_far_steps_continue_the_schedule(mixture: TaskMixture) -> None:
    """The schedule is made 4,096 runs at a time; the 683rd batch of 6 runs is across the first border."""
    near = BatchSampler(mixture, batch_size=6, sub_batch_size=1)
    steps = [rows_of(batch) for batch in near.batches(0, 690)]
    for step in (689, 682, 3):
        assert rows_of(BatchSampler(mixture, batch_size=6, sub_batch_size=1).batch(step)) == steps[step]
    drawn = Counter(label for labels, _, _ in steps[660:] for label in labels)
    assert abs(drawn["a/t2t.train"] - 180 * 500 / 707) <= 4


@pytest.mark.parametrize(
    ("weights", "shares"), [((1, 1, 2), (0.25, 0.25, 0.5)), (None, (500 / 707, 200 / 707, 7 / 707))]
)
def test_shares_hold_over_any_stretch(
    mixture: TaskMixture, weights: tuple[float, ...] | None, shares: tuple[float]
) -> None:
    sampler = BatchSampler(TaskMixture(tasks=mixture.tasks, weights=weights), batch_size=8)
    for start in (0, 1000):
        drawn = Counter(task_of(batch).dataset for batch in sampler.batches(start, start + 400))
        for name, share in zip("abc", shares, strict=True):
            assert abs(drawn[name] - 400 * share) <= 4


def test_a_batch_of_runs(mixture: TaskMixture) -> None:
    """Runs of 8 rows come from one task each, those of a task of 7 rows are of 7, and the shares hold for the runs."""
    sampler = BatchSampler(mixture, batch_size=32, sub_batch_size=8, num_negatives=1)
    drawn: Counter[str] = Counter()
    for batch in sampler.batches(0, 200):
        rest = [task.dataset for task in batch.tasks]
        assert len(rest) == len(batch.queries) <= 32
        for _ in range(4):
            size = 7 if rest[0] == "c" else 8
            assert set(rest[:size]) == {rest[0]}
            drawn[rest[0]] += 1
            rest = rest[size:]
        assert not rest
        for task, query in zip(batch.tasks, batch.queries, strict=True):
            assert query.qid.startswith(task.dataset)
    for name, queries in {"a": 500, "b": 200, "c": 7}.items():
        assert abs(drawn[name] - 800 * queries / 707) <= 4
    assert sampler.steps_per_epoch == math.ceil(707 / (4 * (500 * 8 + 200 * 8 + 7 * 7) / 707))


def test_runs_of_a_pass_draw_no_query_twice() -> None:
    task = random_task("a", 96, 80)
    sampler = BatchSampler(TaskMixture(tasks=[task]), batch_size=32, sub_batch_size=8)
    assert sampler.steps_per_epoch == 3
    seen = [query.qid for batch in sampler.batches(3, 6) for query in batch.queries]
    assert sorted(seen) == sorted(query.qid for query in task.queries)


def test_copies_of_answers_are_masked_across_tasks() -> None:
    first = one_task([ask("p", "x", instruction="Find."), ask("q", "y")], "xy")
    second = one_task(
        [
            ask("r", ("2:x",), text="other"),
            ask("s", ("2:z",), text="p", instruction="Find."),
            ask("t", ("2:w",), text="q", instruction="Find."),
        ],
        "xzw",
        name="b",
        prefix="2:",
    )
    sampler = BatchSampler(TaskMixture(tasks=[first, second], weights=[1, 1]), batch_size=6, sub_batch_size=3)
    # the golden steps alternate between two equal shares, so one of the first batches has a run of each
    batch = next(b for b in sampler.batches(0, 4) if len(set(b.ids[0])) == 5)
    queries, candidates = batch.ids
    marked = {(queries[row], candidates[column]) for row, column in zip(*np.nonzero(batch.known_positive), strict=True)}
    # x by content; z and x because p and s ask the same; t asks what q does, but under an instruction of its own
    assert marked == {("p", "2:x"), ("p", "2:z"), ("r", "x"), ("s", "x"), ("s", "2:x")}


def test_what_was_judged_relevant_is_neither_negative_nor_target() -> None:
    queries = [ask("p", "a", "bcd", also_relevant=("b", "e")), ask("q", "b", "ad"), ask("r", "e", "abcd")]
    sampler = BatchSampler(TaskMixture(tasks=[one_task(queries, "abcde")]), batch_size=3, num_negatives=4)
    for batch in sampler.batches(0, 20):
        names, candidates = batch.ids
        assert dict(zip(names, candidates[:3], strict=True)) == {"p": "a", "q": "b", "r": "e"}
        assert sorted(candidates[3:]) == sorted("cd" + "ad" + "abcd")
        row = names.index("p")
        known = [column for column, did in enumerate(candidates) if did in "abe" and column != row]
        assert np.flatnonzero(batch.known_positive[row]).tolist() == known


def test_every_choice_of_negatives_is_as_likely() -> None:
    queries = [ask(f"q{n}", "z", "abcde") for n in range(40)]
    sampler = BatchSampler(TaskMixture(tasks=[one_task(queries, "zabcde")]), batch_size=40, num_negatives=3)
    drawn: Counter[str] = Counter()
    for batch in sampler.batches(0, 100):
        candidates = batch.ids[1][40:]
        drawn.update("".join(sorted(candidates[start : start + 3])) for start in range(0, 120, 3))
    assert len(drawn) == 10
    # 4,000 draws of one of 10: the standard deviation of a count is 19
    assert all(abs(count - 400) < 80 for count in drawn.values())


def test_copies_of_a_negative_count_once() -> None:
    task = one_task([ask("q", "a", "bcd")], "abcd")
    copy = Candidate(did="d", item=Item(text="b"))
    task = replace(task, candidates=[*task.candidates[:3], copy])
    batch = BatchSampler(TaskMixture(tasks=[task]), batch_size=1, num_negatives=3).batch(0)
    assert batch.ids[1] == ["a", "b", "c"]


def test_filling_up_with_repetitions() -> None:
    queries = [ask("p", "a", "bc"), ask("q", "b"), ask("r", "c", "abdefg")]
    task = one_task(queries, "abcdefg")
    sampler = BatchSampler(TaskMixture(tasks=[task]), batch_size=3, num_negatives=5, fill="repeat")
    thirds: Counter[str] = Counter()
    for batch in sampler.batches(0, 60):
        names, candidates = batch.ids
        rest, has = candidates[3:], {}
        for name in names:  # q has none to repeat
            size = 0 if name == "q" else 5
            has[name], rest = rest[:size], rest[size:]
        assert not rest
        assert has["p"][:2] == ["b", "c"] and set(has["p"]) == {"b", "c"}
        assert len(set(has["r"])) == 5 and set(has["r"]) <= set("abdefg")
        thirds.update(has["p"][2:])
    assert min(thirds["b"], thirds["c"]) > 60
    again = BatchSampler(TaskMixture(tasks=[task]), batch_size=3, num_negatives=5, fill="repeat")
    assert rows_of(again.batch(59)) == rows_of(batch)


def test_an_instruction_is_drawn_for_every_row() -> None:
    """Each as often as the others, and again the same; what else is in a batch does not depend on it."""
    choices = ("One.", "Two.", "Three.", "Four.")
    plain = one_task([ask("a", "x"), ask("b", "y"), ask("own", "z", instruction="Own.")] * 8, "xyz")
    mixture = TaskMixture(tasks=[with_instructions(plain, query=choices), random_task("other", 24, 30)])
    drawing = {"batch_size": 24, "seed": 5}
    sampler = BatchSampler(mixture, instructions="random", **drawing)
    first, again = BatchSampler(mixture, **drawing), BatchSampler(mixture, instructions="random", **drawing)
    drawn: Counter[str | None] = Counter()
    for step in range(60):
        batch, usual = sampler.batch(step), first.batch(step)
        assert rows_of(batch) == rows_of(usual)
        assert batch.queries == again.batch(step).queries
        for one, before in zip(batch.queries, usual.queries, strict=True):
            assert replace(one, item=replace(one.item, instruction=None)) == replace(
                before, item=replace(before.item, instruction=None)
            )
            if one.qid in ("a", "b"):
                assert before.item.instruction == "One."
                drawn[one.item.instruction] += 1
            else:
                assert one == before
    assert set(drawn) == set(choices)
    assert min(drawn.values()) > 0.8 * max(drawn.values())
    rows = [[one.item.instruction for one in sampler.batch(step).queries] for step in range(4)]
    assert len({tuple(row) for row in rows}) > 1
    with pytest.raises(InputError, match="instructions is one of first, random; got 'second'"):
        BatchSampler(mixture, batch_size=4, instructions="second")  # type: ignore[arg-type]


def test_bad_settings() -> None:
    task = random_task("a", 10, 10)
    with pytest.raises(InputError, match="at least one task"):
        TaskMixture(tasks=[])
    for weights in ((1.0, 2.0), (0.0,), (float("nan"),)):
        with pytest.raises(InputError, match="1 tasks need as many positive weights"):
            TaskMixture(tasks=[task], weights=weights)
    with pytest.raises(InputError, match="at least 1 row"):
        BatchSampler(TaskMixture(tasks=[task]), batch_size=0)
    empty = RetrievalTask(dataset="a", task="t2t", split="train", queries=[], candidates=[])
    with pytest.raises(DatasetError, match="no queries"):
        TaskMixture(tasks=[empty])
    mixture = TaskMixture(tasks=[task])
    for size in (0, 3, 20):
        with pytest.raises(InputError, match=f"whole sub-batches, got a sub_batch_size of {size}"):
            BatchSampler(mixture, batch_size=10, sub_batch_size=size)
    with pytest.raises(InputError, match="fill is one of none, repeat; got 'some'"):
        BatchSampler(mixture, batch_size=10, fill="some")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (ask("q", ""), r"a/t2t.train: the query 'q' has no positive"),
        (ask("q", "z"), r"a/t2t.train: 'z', among the positives of a query, is not in the pool"),
        (ask("q", "a", "z"), r"'z', among the negatives"),
        (ask("q", "a", also_relevant=("z",)), r"'z', among the also_relevant"),
    ],
)
def test_tasks_made_by_hand_are_checked(query: Query, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        BatchSampler(TaskMixture(tasks=[one_task([ask("p", "a"), query], "ab")]), batch_size=2)
