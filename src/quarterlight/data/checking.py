"""What is in conversation files and retrieval datasets, and what is wrong with them, problem by problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from quarterlight.data.conversations import Conversation, read_conversations
from quarterlight.data.packing import Tokenize
from quarterlight.data.retrieval import RetrievalDataset, find_datasets, is_dataset
from quarterlight.errors import DatasetError, ImageError
from quarterlight.images import image_size, load_image
from quarterlight.records import ImageSource


@dataclass(kw_only=True)
class Findings:
    """Of one file of conversations, or of one task and split of a retrieval dataset."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    """by kind: conversations with no picture, one, or several, or queries and candidates; turns; tokens"""
    problems: list[str] = field(default_factory=list)
    """a sentence each, with file and line, or with the picture"""


def check(
    path: Path,
    *,
    tokenize: Tokenize | None = None,
    decode: bool = False,
    on_row: Callable[[], None] = lambda: None,
) -> Iterator[Findings]:
    """What is found in a file, a dataset, or the files and datasets in a folder.

    tokenize: counts tokens of conversations.
    decode: decodes every picture; without it, headers are read, which finds those that are missing or no pictures.
    Raises DatasetError when there is nothing to check.
    """
    if path.is_file():
        yield _check_file(path, tokenize, _Pictures(decode), on_row)
        return
    if not path.is_dir():
        raise DatasetError(f"{path} does not exist: give a file of conversations, or a folder.")
    files = [] if is_dataset(path) else sorted(path.glob("*.jsonl"))
    for file in files:
        yield _check_file(file, tokenize, _Pictures(decode), on_row)
    try:
        datasets = find_datasets(path)
    except DatasetError:
        if not files:
            raise
        return
    for dataset in datasets:
        yield from _check_dataset(dataset, _Pictures(decode), on_row)


class _Pictures:
    """Opens each picture once."""

    def __init__(self, decode: bool) -> None:
        self._open: Callable[[ImageSource], object] = load_image if decode else image_size
        self._known: dict[ImageSource, str | None] = {}

    def problem(self, source: ImageSource) -> str | None:
        """Why the picture cannot be used, if it was not asked for before."""
        if source in self._known:
            return None
        try:
            self._open(source)
            self._known[source] = None
        except ImageError as error:
            self._known[source] = str(error)
        return self._known[source]


def _check_file(path: Path, tokenize: Tokenize | None, pictures: _Pictures, on_row: Callable[[], None]) -> Findings:
    found = Findings(name=str(path))
    seen: set[str] = set()
    for where, one in read_conversations(path):
        on_row()
        if isinstance(one, DatasetError):
            found.problems.append(str(one))
            continue
        found.counts[("text", "picture", "pictures")[min(2, len(one.images))]] += 1
        found.counts["turns"] += len(one.messages)
        if one.id in seen:
            found.problems.append(f"{where}: the id {one.id!r} occurs a second time.")
        seen.add(one.id)
        found.problems += [f"{where}: {problem}" for source in one.images if (problem := pictures.problem(source))]
        if tokenize is not None:
            _count_tokens(found.counts, one, tokenize)
    if not found.counts and not found.problems:
        found.problems.append(f"{path} has no conversations.")
    return found


def _count_tokens(counts: Counter[str], one: Conversation, tokenize: Tokenize) -> None:
    sample = tokenize(one)
    counts["tokens"] += len(sample)
    counts["labelled tokens"] += int(sample.labelled.sum())
    counts["most tokens"] = max(counts["most tokens"], len(sample))
    counts["tiles"] += sample.num_tiles


def _check_dataset(dataset: RetrievalDataset, pictures: _Pictures, on_row: Callable[[], None]) -> Iterator[Findings]:
    for split in dataset.splits:
        for name in dataset.tasks(split):
            found = Findings(name=f"{dataset.name}/{name}.{split}")
            try:
                task = dataset.load(name, split)
            except DatasetError as error:
                found.problems.append(str(error))
                yield found
                continue
            for query in task.queries:
                found.counts[f"{query.item.modality} queries"] += 1
            for candidate in task.candidates:
                found.counts[f"{candidate.item.modality} candidates"] += 1
            for row, item in [(q.qid, q.item) for q in task.queries] + [(c.did, c.item) for c in task.candidates]:
                on_row()
                reasons = (pictures.problem(source) for source in item.images)
                found.problems += [f"{found.name}, {row}: {reason}" for reason in reasons if reason]
            for query in task.queries:
                if both := {*query.positives} & {*query.negatives}:
                    found.problems.append(f"{found.name}, {query.qid}: {min(both)!r} is both positive and negative.")
            yield found
