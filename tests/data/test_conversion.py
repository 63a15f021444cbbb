"""Every layout gives the conversations it stands for; duplicates and bad rows are left out and counted."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from quarterlight.data.conversations import load_conversations
from quarterlight.data.conversion import ConversionCounts, Layout, convert
from quarterlight.errors import DatasetError, InputError
from quarterlight.images import load_image

FIXTURE = Path(__file__).parents[1] / "fixtures" / "retrieval"

Picture = Callable[..., Image.Image]


@pytest.fixture
def folder(tmp_path: Path, picture: Picture) -> Path:
    """a.png, its copy b.png, and c.png, which shows something else."""
    picture(0, 200, 100).save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    picture(1).save(tmp_path / "c.png")
    return tmp_path


def run(folder: Path, rows: list[Any], layout: str, **options: Any) -> tuple[list[dict[str, Any]], ConversionCounts]:
    """The rows that are written for these, and the counts."""
    source = folder / "source.json"
    source.write_text(json.dumps(rows))
    settings = {key: options.pop(key) for key in ("question", "boxes", "split") if key in options}
    counts = convert(source, Layout(name=layout, **settings), folder / "out.jsonl", **options)
    assert len(load_conversations(folder / "out.jsonl")) == counts.written
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()], counts


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_llava(folder: Path) -> None:
    rows = [
        {"id": "7", "image": "a.png", "conversations": turns("What?\n<image>", "x", "And?", "y")},
        {"id": 8, "conversations": turns("Hello", "Good day")},
    ]
    found, counts = run(folder, rows, "llava")
    assert found == [
        {"id": "7", "messages": said("What?\n<image>", "x", "And?", "y"), "images": ["a.png"]},
        {"id": "8", "messages": said("Hello", "Good day")},
    ]
    assert counts == ConversionCounts(read=2, written=2)


def test_sharegpt_is_mended(folder: Path) -> None:
    rows = [
        {"conversations": [{"from": "system", "value": "Be brief."}, *turns("q", "a", "left alone")]},
        {"conversations": [{"from": "gpt", "value": "Welcome"}, *turns("q2", "a2")]},
        {"conversation": [{"human": "q3", "assistant": "a3"}, {"human": "q4", "assistant": "a4"}]},
        {"conversations": turns("Compare", "Same"), "images": ["a.png", {"path": "c.png"}]},
    ]
    found, counts = run(folder, rows, "sharegpt")
    assert [one["messages"] for one in found] == [
        [{"role": "system", "content": "Be brief."}, *said("q", "a")],
        said("q2", "a2"),
        said("q3", "a3", "q4", "a4"),
        said("<image>\n<image>\nCompare", "Same"),
    ]
    assert found[3]["images"] == ["a.png", "c.png"]
    assert (counts.mended, counts.problems) == (2, [])


def test_messages_with_parts(folder: Path) -> None:
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    rows = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]},
        {"messages": said("<image>", "y"), "images": ["c.png"]},
    ]
    found, _ = run(folder, rows, "messages")
    assert found == [
        {"messages": said("<image>\nWhat?", "x"), "images": ["a.png"]},
        {"messages": said("<image>", "y"), "images": ["c.png"]},
    ]


def test_instructions_in_words(folder: Path) -> None:
    rows = [
        {"instruction": "Translate.", "input": "rot", "output": "red", "task_type": {}},  # COIG-CQIA
        {"instruction": "Name a fruit.", "input": "", "output": "Apple"},
        {"kind": "Poem", "input": "Write a line.", "target": "A line."},  # firefly
        {"instruction": "No answer.", "input": ""},
    ]
    found, counts = run(folder, rows, "instruction")
    assert [row["messages"] for row in found] == [
        said("Translate.\nrot", "red"),
        said("Name a fruit.", "Apple"),
        said("Write a line.", "A line."),
    ]
    assert len(counts.problems) == 1 and "row 4: the row must have an instruction" in counts.problems[0]


def test_boxes_become_thousandths_of_the_picture(folder: Path) -> None:
    row = {"image": "a.png", "objects": [{"phrase": "the cat", "box": [20, 10, 100, 50]}]}  # of 200 x 100 pixels
    question = "Please provide the bounding box coordinate of the region this sentence describes: <ref>the cat</ref>"
    ((found,), _) = run(folder, [row], "grounding")
    answer = "<ref>the cat</ref><box>[[100, 100, 500, 500]]</box>"
    assert found["messages"] == said(f"<image>\n{question}", answer)
    ((same,), _) = run(
        folder, [{**row, "objects": [{"phrase": "the cat", "box": [20, 10, 80, 40]}]}], "grounding", boxes="xywh"
    )
    assert same == found
    several = {"phrase": "both", "box": [[0, 0, 200.5, 100], [0, 0, 1, 1]]}
    ((found,), _) = run(folder, [{**row, "objects": [several], "width": 200, "height": 100}], "grounding")
    assert found["messages"][1]["content"] == "<ref>both</ref><box>[[0, 0, 1000, 1000], [0, 0, 5, 10]]</box>"


def test_labels_of_rows_and_folders(folder: Path) -> None:
    ((found,), _) = run(folder, [{"image": "a.png", "label": "tabby_cat"}], "labels", question="Which animal?")
    assert found == {"messages": said("<image>\nWhich animal?", "tabby cat"), "images": ["a.png"]}
    for name, picture in (("tabby_cat", "a.png"), ("dog", "c.png")):
        (folder / "classes" / name).mkdir(parents=True)
        shutil.move(folder / picture, folder / "classes" / name / picture)
    (folder / "classes" / "dog" / "notes.txt").touch()
    out = folder / "classes" / "labels.jsonl"
    assert convert(folder / "classes", Layout(name="labels"), out).written == 2
    conversations = load_conversations(out)
    assert [conversations[n].messages[1].content for n in range(2)] == ["dog", "tabby cat"]
    assert load_image(conversations[1].images[0]).size == (200, 100)


def test_retrieval_dataset_with_an_archive(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE / "easy_vqa", tmp_path / "easy_vqa")
    out = tmp_path / "easy_vqa" / "conversations.jsonl"
    counts = convert(tmp_path / "easy_vqa", Layout(name="retrieval", split="test"), out)
    conversations = load_conversations(out)
    assert counts.read == counts.written + counts.duplicates and counts.problems == []
    assert conversations[0].id.startswith("106:")
    assert load_image(conversations[0].images[0]).width > 0
    with pytest.raises(DatasetError, match="does not lie below"):
        convert(tmp_path / "easy_vqa", Layout(name="retrieval"), tmp_path / "elsewhere" / "x.jsonl")


def test_duplicates_are_words_and_pictures(folder: Path) -> None:
    rows = [
        {"image": "a.png", "conversations": turns("<image>\nWhat?", "An apple")},
        {"image": "b.png", "conversations": turns("<image> what? ", "AN  APPLE")},  # a copy of both
        {"image": "c.png", "conversations": turns("<image>\nWhat?", "An apple")},
        {"image": "a.png", "conversations": turns("<image>\nWhat?", "A pear")},
        {"conversations": turns("What?", "An apple")},
        {"conversations": turns("What? An", "apple")},
    ]
    found, counts = run(folder, rows, "llava")
    assert (counts.written, counts.duplicates) == (5, 1)
    assert [one.get("images") for one in found] == [["a.png"], ["c.png"], ["a.png"], None, None]
    assert run(folder, rows, "llava", dedupe=False)[1].written == 6


@pytest.mark.parametrize(
    ("layout", "bad", "problem"),
    [
        ("llava", {"image": "a.png"}, "no list of conversations"),
        ("llava", {"conversations": [{"from": "narrator", "value": "x"}]}, "known speaker"),
        ("llava", {"conversations": turns("only asked")}, "the assistant must have the last word"),
        ("llava", {"conversations": turns("a", "b")[::-1] + turns("c", "d")[::-1]}, "mended away"),
        ("llava", {"conversations": turns("<image>", "b")}, "1 times, but there are 0 images"),
        ("llava", {"image": "nothing.png", "conversations": turns("<image>", "b")}, "nothing.png cannot be read"),
        ("llava", {"image": "http://x/y.png", "conversations": turns("<image>", "b")}, "must be the path of a file"),
        ("llava", {"image": "../a.png", "conversations": turns("<image>", "b")}, "does not lie below"),
        ("llava", [], "must be a JSON object"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a text or an image"),
        ("grounding", {"image": "a.png", "objects": [{"phrase": "x", "box": [9, 9, 9, 12]}]}, "is empty or leaves"),
        ("grounding", {"image": "a.png", "objects": [{"phrase": "x", "box": [0, 0, 300, 9]}]}, "is empty or leaves"),
        ("grounding", {"image": "a.png", "objects": [{"phrase": "x", "box": [1, 2, 3]}]}, "four numbers"),
        ("grounding", {"image": "a.png", "objects": []}, "a list of objects"),
        ("labels", {"image": "a.png", "label": 3}, "a label in words, got 3"),
    ],
)
def test_bad_rows_are_left_out_and_told(folder: Path, layout: str, bad: Any, problem: str) -> None:
    good: dict[str, Any] = {
        "llava": {"conversations": turns("q", "a")},
        "messages": {"messages": said("q", "a")},
        "grounding": {"image": "c.png", "objects": [{"phrase": "x", "box": [1, 1, 9, 9]}]},
        "labels": {"image": "c.png", "label": "dog"},
    }[layout]
    _, counts = run(folder, [good, bad], layout)
    if problem == "mended away":  # an answer before and a question after
        assert (counts.written, counts.mended) == (2, 1)
        return
    (told,) = counts.problems
    assert told.startswith(f"{folder / 'source.json'}, row 2: ") and problem in told
    assert (counts.read, counts.written) == (2, 1)


def test_lines_and_compression(folder: Path) -> None:
    rows = [json.dumps({"conversations": turns("q", "a")}), "", "{"]
    (folder / "x.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    counts = convert(folder / "x.jsonl.gz", Layout(name="llava"), folder / "out.jsonl")
    assert counts.written == 1
    assert counts.problems[0].startswith(f"{folder / 'x.jsonl.gz'}, line 3: not a line of JSON")


def test_nothing_left_writes_nothing(folder: Path) -> None:
    (folder / "out.jsonl").write_text("old")
    with pytest.raises(DatasetError, match=r"no row that makes .* The first problem: .*row 1: .* no list"):
        run(folder, [{}], "llava")
    assert (folder / "out.jsonl").read_text() == "old"
    assert not list(folder.glob(".*.part"))
    with pytest.raises(InputError, match="There is no layout 'lava'"):
        run(folder, [{}], "lava")
    with pytest.raises(DatasetError, match="must be a JSON list of rows"):
        (folder / "one.json").write_text("{}")
        convert(folder / "one.json", Layout(name="llava"), folder / "out.jsonl")
