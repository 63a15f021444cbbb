"""A retrieval task put together row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quarterlight.data.benchmarks.source import Source
from quarterlight.data.benchmarks.tables import Place
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError
from quarterlight.records import Candidate, ImageSource, Item, Problem, Query

IMAGE_TOKENS = ("<|image_1|>", "<|image_pad|>", "<image>")
"""Marks of pictures in published texts: Phi-3-V's, Qwen2-VL's and LLaVA's."""


class TaskBuilder:
    """Collects queries and candidates; what cannot be used is listed, not dropped.

    pool, problems: candidates that were read before, by id, and what was left out of them.
    """

    def __init__(
        self, source: Source, *, pool: dict[str, Candidate] | None = None, problems: Sequence[Problem] = ()
    ) -> None:
        self.source = source
        self.candidates: dict[str, Candidate] = {} if pool is None else pool
        self.problems: list[Problem] = list(problems)
        self.num_lost_queries = 0
        self._queries: dict[str, Query] = {}
        self._by_content: dict[tuple[str | None, object], str] = {}

    def item(self, text: str, *pictures: ImageSource) -> Item:
        """An item with the tiles of the dataset.  Raises DatasetError, as the end of a sentence, for an empty one."""
        words = text if text.strip() else None
        if words is None and not pictures:
            raise DatasetError("there is neither text nor picture")
        if not pictures:
            return Item(text=words)
        image = pictures[0] if len(pictures) == 1 else tuple(pictures)
        return Item(text=words, image=image, max_tiles=self.source.max_tiles)

    def candidate(self, place: Place, did: str, item: Item) -> None:
        """A candidate with an id of its own.  Raises DatasetError for an id that was there before."""
        if did in self.candidates:
            place.fail(f"the candidate id {did!r} occurs a second time")
        self.candidates[did] = Candidate(did=did, item=item)

    def share(self, item: Item) -> str:
        """The id of the candidate with this text and these pictures; it is numbered when it is new."""
        content = (item.text, item.images)
        if (did := self._by_content.get(content)) is None:
            did = self._by_content[content] = str(len(self._by_content))
            self.candidates[did] = Candidate(did=did, item=item)
        return did

    def query(
        self,
        place: Place,
        qid: str,
        item: Item,
        positives: Sequence[str],
        *,
        negatives: Sequence[str] = (),
        candidates: Sequence[str] = (),
        excluded: Sequence[str] = (),
        grades: Mapping[str, int] | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        """A query; ids that are named twice count once.  One without a positive is left out and listed.

        Raises DatasetError for an id that was there before.
        """
        if qid in self._queries:
            place.fail(f"the query id {qid!r} occurs a second time")
        if not positives:
            self.lost_query(qid, f"{place}: the query has no positive candidate")
            return
        self._queries[qid] = Query(
            qid=qid,
            item=item,
            positives=tuple(dict.fromkeys(positives)),
            negatives=tuple(dict.fromkeys(negatives)),
            candidates=tuple(dict.fromkeys(candidates)),
            excluded=tuple(dict.fromkeys(excluded)),
            grades=grades or {},
            fields=fields or {},
        )

    def leave_out(self, name: str, reason: str) -> None:
        """Lists a row that cannot be used, by id or by place, and why."""
        self.problems.append(Problem(name, reason.rstrip(".")))

    def lost_query(self, name: str, reason: str, number: int = 1) -> None:
        """Lists a row that cannot be used, and counts the queries that the benchmark loses with it."""
        self.leave_out(name, reason)
        self.num_lost_queries += number

    def build(self) -> RetrievalTask:
        """The task.  Raises DatasetError, with the first problem, when it has no query that can be used."""
        source = self.source
        if not self._queries:
            first = f" The first problem: {self.problems[0].reason}." if self.problems else ""
            raise DatasetError(f"{source.dataset} in {source.folder} has no query that can be used.{first}")
        return RetrievalTask(
            dataset=source.dataset,
            task=source.task,
            split=source.split,
            queries=list(self._queries.values()),
            candidates=list(self.candidates.values()),
            revision=source.revision,
            problems=tuple(self.problems),
            num_lost_queries=self.num_lost_queries,
        )


def without_tokens(text: str) -> str:
    """The text without marks of pictures, and without the line break or blank that follows one.

    >>> without_tokens("<|image_1|>\\nWhat is it?\\n")
    'What is it?'
    """
    for token in IMAGE_TOKENS:
        if token in text:
            text = text.replace(f"{token}\n", "").replace(f"{token} ", "").replace(token, "")
    return text.strip()
