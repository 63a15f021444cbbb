"""Rows of files and of retrieval tasks as conversations; rows that break the format are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quarterlight.data.conversations import Message, from_task, load_conversations
from quarterlight.data.retrieval import RetrievalDataset
from quarterlight.errors import DatasetError
from quarterlight.images import load_image
from quarterlight.records import ArchiveMember

FIXTURE = Path(__file__).parents[1] / "fixtures" / "retrieval"

USER = {"role": "user", "content": "What is <image>?"}
ASSISTANT = {"role": "assistant", "content": "An apple."}


def row(**changes: Any) -> dict[str, Any]:
    return {"messages": [USER, ASSISTANT], "images": ["a.png"]} | changes


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    return path


def test_rows_of_a_file(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    second = row(id=7, messages=[system, USER, ASSISTANT, {"role": "user", "content": "Sure?"}, ASSISTANT])
    conversations = load_conversations(write(tmp_path / "fruit.jsonl", row(images=[{"path": "b/a.png"}]), "", second))
    assert (conversations.label, len(conversations)) == ("fruit", 2)
    first = conversations[0]
    assert first.messages == (Message("user", "What is <image>?"), Message("assistant", "An apple."))
    assert first.images == (str(tmp_path / "b/a.png"),)
    assert [one.id for one in (first, conversations[1])] == ["fruit:1", "7"]
    assert [message.role for message in conversations[1].messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]


def test_where_pictures_are(tmp_path: Path) -> None:
    def source() -> Any:
        return load_conversations(write(tmp_path / "x.jsonl", row()))[0].images[0]

    assert source() == str(tmp_path / "a.png")
    (tmp_path / "images").mkdir()
    assert source() == str(tmp_path / "images/a.png")
    (tmp_path / "images.zip").touch()
    assert source() == ArchiveMember(str(tmp_path / "images.zip"), "a.png")


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("{", "not a line of JSON"),
        ([], "a row must be a JSON object, got list"),
        (row(messages=None), "must have a list of messages, got None"),
        (row(messages=[]), "the assistant must have the last word"),
        (row(messages=[USER]), "the assistant must have the last word"),
        (row(messages=[ASSISTANT, USER]), "turn 1 must be the user's, but is the assistant's"),
        (row(messages=[USER, ASSISTANT, ASSISTANT, ASSISTANT]), "turn 3 must be the user's"),
        (row(messages=[USER, {"role": "assistant", "content": " \n"}]), "a message of the assistant is empty"),
        (row(messages=[USER, {"role": "asistant", "content": "x"}]), "Did you mean 'assistant'"),
        (row(messages=[USER, {"role": "assistant"}]), "a role and a string as its content"),
        (row(images=[]), "<image> 1 times, but there are 0 images"),
        (row(images=["a.png", "b.png"]), "<image> 1 times, but there are 2 images"),
        (row(images="a.png"), "images must be a list"),
        (row(images=[3]), "an image must be a path"),
        (row(images=["../a.png"]), "leaves the dataset's folder"),
        (row(images=["/a.png"]), "leaves the dataset's folder"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, bad: Any, problem: str) -> None:
    with pytest.raises(DatasetError, match=r"x\.jsonl, line 2: .*" + problem.replace("(", r"\(")):
        load_conversations(write(tmp_path / "x.jsonl", row(), bad))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no conversations"):
        load_conversations(write(tmp_path / "x.jsonl", "", " "))
    with pytest.raises(DatasetError, match=r"nothing\.jsonl cannot be read .*No such file"):
        load_conversations(tmp_path / "nothing.jsonl")


def test_the_mark_is_plain_text_in_answers(tmp_path: Path) -> None:
    html = {"role": "assistant", "content": "SVG has <image>."}
    write(tmp_path / "x.jsonl", row(messages=[{"role": "user", "content": "Which tag?"}, html], images=None))
    assert load_conversations(tmp_path / "x.jsonl")[0].messages[1].content == "SVG has <image>."


def test_captions_of_a_retrieval_task() -> None:
    task = RetrievalDataset(FIXTURE / "emoji").load("i2t", "train")
    conversations = from_task(task, question="What is this?")
    assert (conversations.label, len(conversations)) == ("emoji/i2t", len(task.queries))
    words = {candidate.did: candidate.item.text for candidate in task.candidates}
    for index, query in enumerate(task.queries):
        one = conversations[index]
        assert one.messages[0].content == "<image>\nWhat is this?"
        assert one.messages[1].content == words[query.positives[0]]
        assert one.id == query.qid
    assert load_image(conversations[0].images[0]).size == (128, 128)


def test_questions_of_a_retrieval_task_are_their_own() -> None:
    task = RetrievalDataset(FIXTURE / "easy_vqa").load("it2t", "train")
    conversations = from_task(task, question="not asked")
    assert conversations[0].messages[0].content == f"<image>\n{task.queries[0].item.text}"


def test_tasks_without_answers_in_words() -> None:
    with pytest.raises(DatasetError, match=r"emoji/t2i\.train has no query with an answer in words"):
        from_task(RetrievalDataset(FIXTURE / "emoji").load("t2i", "train"))
