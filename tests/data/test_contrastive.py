from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from quarterlight.data.contrastive import BatchSampler, ContrastiveBatch, TaskMixture
from quarterlight.data.retrieval import RetrievalDataset, RetrievalTask
from quarterlight.errors import DatasetError, InputError
from quarterlight.records import Candidate, Item, Query

FIXTURE = Path(__file__).parents[1] / "fixtures" / "retrieval"


def random_task(name: str, queries: int, candidates: int, *, seed: int = 0, texts: int | None = None) -> RetrievalTask:
    """A task with up to 3 positives and 3 negatives a query; ``texts`` < candidates makes copies under other ids."""
    generator = np.random.default_rng(seed)
    pool = [Candidate(did=f"{name}:{n}", item=Item(text=f"{n % (texts or candidates)}")) for n in range(candidates)]
    rows = []
    for number in range(queries):
        chosen = [pool[n].did for n in generator.choice(candidates, size=6, replace=False)]
        cut = 1 + number % 3
        rows.append(
            Query(
                qid=f"q{number}",
                item=Item(text=f"q{number}"),
                positives=tuple(chosen[:cut]),
                negatives=tuple(chosen[3:]),
            )
        )
    return RetrievalTask(dataset=name, task="t2t", split="train", queries=rows, candidates=pool)


def rows_of(batch: ContrastiveBatch) -> tuple[str, list[str], list[str], bytes]:
    dids = [candidate.did for candidate in batch.candidates]
    return batch.task.label, [query.qid for query in batch.queries], dids, batch.known_positive.tobytes()


@pytest.fixture
def mixture() -> TaskMixture:
    return TaskMixture(tasks=[random_task("a", 500, 300), random_task("b", 200, 150, texts=40), random_task("c", 7, 9)])


def test_batches_are_of_one_task_and_full(mixture: TaskMixture) -> None:
    for batch in BatchSampler(mixture, batch_size=32, num_negatives=2).batches(0, 100):
        own = {candidate.did for candidate in batch.task.candidates}
        assert len(batch.queries) == min(32, len(batch.task.queries))
        assert all(candidate.did in own for candidate in batch.candidates)
        assert batch.known_positive.shape == (len(batch.queries), len(batch.candidates))
        assert len(batch.candidates) == 3 * len(batch.queries) or batch.task.dataset == "b"


def test_targets_are_positives_and_no_known_positive_is_left_as_a_negative(mixture: TaskMixture) -> None:
    for batch in BatchSampler(mixture, batch_size=32, num_negatives=2, seed=3).batches(0, 100):
        text = {candidate.did: candidate.item.text for candidate in batch.task.candidates}
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
    near = BatchSampler(mixture, batch_size=4)
    for _ in near.batches(0, 4100):
        pass
    assert rows_of(near.batch(4100)) == rows_of(BatchSampler(mixture, batch_size=4).batch(4100))


@pytest.mark.parametrize(
    ("weights", "shares"), [((1, 1, 2), (0.25, 0.25, 0.5)), (None, (500 / 707, 200 / 707, 7 / 707))]
)
def test_shares_hold_over_any_stretch(
    mixture: TaskMixture, weights: tuple[float, ...] | None, shares: tuple[float]
) -> None:
    sampler = BatchSampler(TaskMixture(tasks=mixture.tasks, weights=weights), batch_size=8)
    for start in (0, 1000):
        drawn = Counter(batch.task.dataset for batch in sampler.batches(start, start + 400))
        for name, share in zip("abc", shares, strict=True):
            assert abs(drawn[name] - 400 * share) <= 4


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
