"""A judge that knows the labels of the data: for data that says itself what is relevant, and for experiments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError, did_you_mean
from quarterlight.mining.judges import Pair, Verdict
from quarterlight.records import Query

_GROUP = 4096


class LabelJudge:
    """Relevant is what answers the same question, whichever row says so.

    A candidate is relevant to a query if a positive of *any query that asks the same* is that candidate or a copy of
    it.  Two queries ask the same if they show the same words and pictures, or agree in all the fields that ``same``
    names for their task (``dataset/task``): with ``{"jose_pages/t2vd": ["query_src_content"]}`` every page of a paper
    answers what any of its pages answers.  A copy shows the same words and pictures under another id.

    What remains is irrelevant.  In the tasks of ``incomplete``, where only a part of the pool was labelled, it is so if
    a query that asks the same has it among its labelled negatives, and undecided otherwise.

    tasks: as they are labelled in full; the pairs may come from copies of them in which positives are hidden.
    Raises DatasetError when ``same`` or ``incomplete`` names a task or a field that is not there.
    """

    name = "labels"

    def __init__(
        self,
        tasks: Iterable[RetrievalTask],
        *,
        same: Mapping[str, Sequence[str]] | None = None,
        incomplete: Sequence[str] = (),
    ) -> None:
        same = same or {}
        whole = {f"{task.dataset}/{task.task}": task for task in tasks}
        for name in (*same, *incomplete):
            if name not in whole:
                raise DatasetError(
                    f"The judge is to treat {name!r} specially, which it is not given. {did_you_mean(name, whole)}"
                )
        self._labels = {
            name: _Labels(task, tuple(same.get(name, ())), complete=name not in incomplete)
            for name, task in whole.items()
        }

    def judge(self, pairs: Iterable[Pair]) -> Iterator[Sequence[Verdict]]:
        """Verdicts with logits of 1 and -1, or 0 and 0 for what is undecided."""
        rest = iter(pairs)
        while group := [self._verdict(pair) for pair in islice(rest, _GROUP)]:
            yield group

    def _verdict(self, pair: Pair) -> Verdict:
        qid, did = pair.query.qid, pair.candidate.did
        try:
            yes = self._labels[pair.task].relevance(qid, did)
        except KeyError as error:
            return Verdict(qid=qid, did=did, failed=f"the labels do not have {error.args[0]!r}")
        return Verdict(qid=qid, did=did, yes=yes, no=-yes, judge=self.name)


class _Labels:
    """The labels of one task, by what its rows show and by what their fields say."""

    def __init__(self, task: RetrievalTask, same: tuple[str, ...], *, complete: bool) -> None:
        self.complete = complete
        numbers: dict[Hashable, int] = {}
        self.content = {
            one.did: numbers.setdefault((one.item.text, one.item.images), len(numbers)) for one in task.candidates
        }
        self.questions: dict[str, list[Hashable]] = {}
        self.positive: dict[Hashable, set[int]] = defaultdict(set)
        self.negative: dict[Hashable, set[int]] = defaultdict(set)
        for query in task.queries:
            questions = self.questions[query.qid] = _questions(task, query, same)
            for question in questions:
                self.positive[question].update(self.content[did] for did in query.positives)
                self.negative[question].update(self.content[did] for did in query.negatives)

    def relevance(self, qid: str, did: str) -> float:
        """1 relevant, -1 irrelevant, 0 undecided. Raises KeyError, with the id, when the task does not have it."""
        questions, content = self.questions[qid], self.content[did]
        if any(content in self.positive[question] for question in questions):
            return 1.0
        return -1.0 if self.complete or any(content in self.negative[question] for question in questions) else 0.0


def _questions(task: RetrievalTask, query: Query, same: tuple[str, ...]) -> list[Hashable]:
    """What a query asks, put in the one or two ways in which others can ask the same."""
    for field in same:
        if field not in query.fields:
            raise DatasetError(
                f"{task.label}: the query {query.qid!r} has no field {field!r}, by which the judge is to compare "
                f"queries. {did_you_mean(field, query.fields)}"
            )
    shown: Hashable = (query.item.text, query.item.images)
    return [shown, tuple(repr(query.fields[field]) for field in same)] if same else [shown]
