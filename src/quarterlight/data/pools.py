"""Candidates of other tasks among those of a task: the global pool, as M-BEIR calls the union of all pools.

In a task's own pool an id needs no more than to be unique there.  A candidate of another task is called
``dataset/task/id``, so that ids of a global pool are never mistaken for one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError
from quarterlight.records import Candidate


def foreign_did(task: RetrievalTask, did: str) -> str:
    """What a candidate of a task is called in the pool of another.

    >>> foreign_did(RetrievalTask(dataset="emoji", task="t2i", split="train", queries=[], candidates=[]), "101:7")
    'emoji/t2i/101:7'
    """
    return f"{task.dataset}/{task.task}/{did}"


def global_task(task: RetrievalTask, tasks: Sequence[RetrievalTask]) -> RetrievalTask:
    """The task with all candidates of all tasks: its own first, under their own ids, then those of the others.

    Raises DatasetError when an id of its own is called like a candidate of another.
    """
    others = [
        Candidate(did=foreign_did(other, one.did), item=one.item)
        for other in tasks
        if (other.dataset, other.task) != (task.dataset, task.task)
        for one in other.candidates
    ]
    own = {one.did for one in task.candidates}
    for one in others:
        if one.did in own:
            raise DatasetError(
                f"{task.label} has a candidate {one.did!r}, which is also what a candidate of another task is called "
                "in a global pool: rename it."
            )
    return replace(task, candidates=[*task.candidates, *others])


def with_foreign(task: RetrievalTask, tasks: Iterable[RetrievalTask], dids: Iterable[str]) -> RetrievalTask:
    """The task with the candidates of other tasks that were found for it, so that every id is one of its candidates.

    tasks: whose candidates may be meant.  dids: ids of its own, which change nothing, and of others, in any order.
    Raises DatasetError for an id that is neither its own nor that of a candidate of one of the tasks.
    """
    own = {one.did for one in task.candidates}
    wanted = dict.fromkeys(did for did in dids if did not in own)
    if not wanted:
        return task
    found = {
        name: Candidate(did=name, item=one.item)
        for other in tasks
        for one in other.candidates
        if (name := foreign_did(other, one.did)) in wanted
    }
    for did in wanted:
        if did not in found:
            raise DatasetError(
                f"{task.label}: {did!r}, found for one of its queries, is a candidate neither of this task nor of the "
                "others of the mixture: was it found with other data?"
            )
    return replace(task, candidates=[*task.candidates, *(found[did] for did in wanted)])
