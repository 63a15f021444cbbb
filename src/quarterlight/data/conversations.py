"""Conversations with pictures, which stage 1 learns to continue: JSONL files, or the rows of retrieval tasks.

    {"id": "7", "messages": [{"role": "user", "content": "<image>\\nWhat is this?"},
                             {"role": "assistant", "content": "a red apple"}], "images": ["apples/7.jpg"]}

``<image>`` marks where a picture stands in what the user says; there are as many marks as pictures.  Pictures are named
relative to the file, as :class:`quarterlight.data.pictures.PictureFolder` looks for them.  A system message may come
first; then user and assistant take turns, and the assistant has the last word.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, get_args

from quarterlight.data.pictures import PictureFolder
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError, did_you_mean
from quarterlight.records import ImageSource

Speaker: TypeAlias = Literal["system", "user", "assistant"]
"""Who says a message."""

IMAGE = "<image>"
"""Marks the place of a picture in a user's message; elsewhere it is plain text."""

QUESTION = "What does the picture show?"
"""What is asked of a row of a retrieval task that has no words of its own."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Speaker
    content: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What was said, and the pictures in the order of their marks.

    id: names it in messages and error files.
    Raises DatasetError, as the end of a sentence, when the turns are out of order, one is empty, or marks and pictures
    differ in number.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...] = ()

    def __post_init__(self) -> None:
        turns = self.messages[1:] if self.messages and self.messages[0].role == "system" else self.messages
        for number, message in enumerate(turns):
            expected = ("user", "assistant")[number % 2]
            if message.role != expected:
                raise DatasetError(f"turn {number + 1} must be the {expected}'s, but is the {message.role}'s")
        if not turns or len(turns) % 2:
            raise DatasetError("the assistant must have the last word")
        for message in self.messages:
            if not message.content or message.content.isspace():
                raise DatasetError(f"a message of the {message.role} is empty")
            if any("\ud800" <= letter <= "\udfff" for letter in message.content):
                raise DatasetError(f"a message of the {message.role} has half a character (an unpaired surrogate)")
        marks = sum(message.content.count(IMAGE) for message in turns[::2])
        if marks != len(self.images):
            raise DatasetError(
                f"the user's messages have {IMAGE} {marks} times, but there are {len(self.images)} images"
            )


class Conversations(Protocol):
    """Many conversations by number, read when they are asked for."""

    @property
    def label(self) -> str:
        """For tables and messages."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...


def parse_conversation(
    row: Any, *, name: str, picture: Callable[[str], ImageSource] = lambda path: path
) -> Conversation:
    """The conversation of one row of a file.

    name: its id if it has none.  picture: the source of a path.
    Raises DatasetError, as the end of a sentence, for a row that breaks the format.
    """
    if not isinstance(row, Mapping):
        raise DatasetError(f"a row must be a JSON object, got {type(row).__name__}")
    messages, images = row.get("messages"), row.get("images") or []
    if not isinstance(messages, list):
        raise DatasetError(f"the row must have a list of messages, got {messages!r:.60}")
    if not isinstance(images, list):
        raise DatasetError(f"images must be a list of paths, got {images!r:.60}")
    sources: list[ImageSource] = []
    for one in images:
        path = one.get("path") if isinstance(one, Mapping) else one
        if not isinstance(path, str) or not path:
            raise DatasetError(f"an image must be a path or {{'path': ...}}, got {path!r:.60}")
        sources.append(picture(path))
    return Conversation(
        id=name if row.get("id") is None else str(row["id"]),
        messages=tuple(_message(one) for one in messages),
        images=tuple(sources),
    )


def _message(value: Any) -> Message:
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise DatasetError(f"a message must have a role and a string as its content, got {value!r:.60}")
    role: Any = value.get("role")
    if role not in get_args(Speaker):
        raise DatasetError(f"there is no role {role!r}. {did_you_mean(str(role), get_args(Speaker)).rstrip('.')}")
    return Message(role, value["content"])


class ConversationFile:
    """A JSONL file of conversations: checked once from end to end, then read line by line as they are asked for.

    Eight bytes of memory a conversation, whatever they hold.  Raises DatasetError, naming file and line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._pictures = PictureFolder(self.path.parent)
        self._offsets = array("q")
        for number, offset, line in _lines(self.path):
            _parse(self.path, number, line, self._pictures)
            self._offsets.append(offset)
        if not self._offsets:
            raise DatasetError(f"{self.path} has no conversations.")

    def __repr__(self) -> str:
        return f"ConversationFile({str(self.path)!r})"

    @property
    def label(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Conversation:
        # opened anew each time: threads and forked processes would move one another's place in a shared file
        with self.path.open("rb") as lines:
            lines.seek(self._offsets[index])
            return _parse(self.path, index + 1, lines.readline(), self._pictures)


def read_conversations(path: Path) -> Iterator[tuple[str, Conversation | DatasetError]]:
    """File and line of each row, and its conversation, or what is wrong with it."""
    pictures = PictureFolder(path.parent)
    for number, _, line in _lines(path):
        try:
            yield f"{path}, line {number}", _parse(path, number, line, pictures)
        except DatasetError as error:
            yield f"{path}, line {number}", error


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and bytes of each line that is not blank."""
    number = offset = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    yield number, offset, line
                offset += len(line)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read after line {number} ({error.strerror or error}).") from error


def _parse(path: Path, number: int, line: bytes, pictures: PictureFolder) -> Conversation:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DatasetError(f"{path}, line {number}: not a line of JSON in UTF-8 ({error}).") from error
    try:
        return parse_conversation(row, name=f"{path.stem}:{number}", picture=pictures.source)
    except DatasetError as error:
        raise DatasetError(f"{path}, line {number}: {error}.") from error


def load_conversations(path: str | os.PathLike[str]) -> Conversations:
    """The conversations of a JSONL file.  Raises DatasetError, naming file and line, for a row that breaks the format.

    ``quarterlight data check`` lists all such rows; ``quarterlight data convert`` makes the format from others.
    """
    return ConversationFile(path)


@dataclass(frozen=True, kw_only=True)
class TaskConversations:
    """Rows of a retrieval task: what the query shows and asks, and the text of a candidate that answers it.

    rows: index of a query and the words of its answer.
    """

    task: RetrievalTask
    question: str
    rows: tuple[tuple[int, str], ...]

    @property
    def label(self) -> str:
        """``dataset/task``."""
        return f"{self.task.dataset}/{self.task.task}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        number, answer = self.rows[index]
        query = self.task.queries[number]
        images, asked = query.item.images, (query.item.text or "").strip() or self.question
        # a question that happens to spell the mark cannot be told from one
        said = "\n".join([*[IMAGE] * len(images), asked.replace(IMAGE, "image")])
        return Conversation(id=query.qid, messages=(Message("user", said), Message("assistant", answer)), images=images)


def from_task(task: RetrievalTask, *, question: str = QUESTION) -> TaskConversations:
    """The rows of a retrieval task whose answer is in words, as questions and answers.

    question: of a row that has no words of its own.  Of several answers in words, the first is taken; rows without any
    are left out.  Raises DatasetError when none remains.
    """
    words = {
        one.did: one.item.text.strip()
        for one in task.candidates
        if one.item.text and not one.item.text.isspace() and not one.item.images
    }
    answers = (next((words[did] for did in query.positives if did in words), None) for query in task.queries)
    rows = tuple((number, answer) for number, answer in enumerate(answers) if answer is not None)
    if not rows:
        raise DatasetError(
            f"{task.label} has no query with an answer in words only, so there is nothing to write: take i2t or it2t."
        )
    return TaskConversations(task=task, question=question, rows=rows)
