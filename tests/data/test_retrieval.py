from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quarterlight.data.retrieval import (
    RetrievalDataset,
    find_datasets,
    with_instructions,
    with_negatives,
    write_instructions,
)
from quarterlight.errors import DatasetError
from quarterlight.images import load_image
from quarterlight.records import ArchiveMember, Item

FIXTURE = Path(__file__).parents[1] / "fixtures" / "retrieval"

Row = dict[str, Any]


def query(**changes: Any) -> Row:
    row = {"qid": "9:1", "query_txt": "a cat", "query_img_path": None, "pos_cand_list": ["9:2"], "neg_cand_list": []}
    return row | changes


def candidate(**changes: Any) -> Row:
    return {"did": "9:2", "txt": None, "img_path": "a.png"} | changes


def write(path: Path, lines: list[Row | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def make(folder: Path, queries: list[Row | str], pool: list[Row | str], task: str = "t2i") -> RetrievalDataset:
    write(folder / f"queries/{task}.test.jsonl", queries)
    write(folder / f"pools/{task}.test.jsonl", pool)
    return RetrievalDataset(folder)


def test_real_data() -> None:
    dataset = RetrievalDataset(FIXTURE / "emoji")
    assert (dataset.name, dataset.id, dataset.splits) == ("emoji", "101", ["train", "test"])
    assert dataset.tasks() == dataset.tasks("test") == ["t2i", "i2t", "i2i", "it2i"]
    assert dataset.tasks("val") == []
    task = dataset.load("it2i", "test")
    assert task.label == "emoji/it2i.test"
    first = task.queries[0]
    assert first.item.modality == "image,text"
    assert first.fields["change"] == "skin_tone"
    assert not {"qid", "query_txt", "pos_cand_list", "task"} & first.fields.keys()
    known = {c.did: c for c in task.candidates}
    assert all(known[did].item.modality == "image" for q in task.queries for did in q.positives + q.negatives)
    assert load_image(known[first.positives[0]].item.images[0]).size == (128, 128)
    assert known[first.positives[0]].item.max_tiles == 1


def test_find_datasets() -> None:
    assert [dataset.name for dataset in find_datasets(FIXTURE)] == ["easy_vqa", "emoji"]
    assert [dataset.name for dataset in find_datasets(FIXTURE / "emoji")] == ["emoji"]


def test_find_no_datasets(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="neither is a retrieval dataset"):
        find_datasets(tmp_path)
    with pytest.raises(DatasetError, match="not a folder"):
        find_datasets(tmp_path / "nothing")
    with pytest.raises(DatasetError, match="has no folders"):
        RetrievalDataset(tmp_path)


def test_plain_and_gz_and_blank_lines(tmp_path: Path) -> None:
    write(tmp_path / "queries/t2i.test.jsonl.gz", [query(), "", query(qid="9:5", neg_cand_list=None)])
    write(tmp_path / "pools/t2i.test.jsonl", [candidate()])
    task = RetrievalDataset(tmp_path).load("t2i", "test")
    assert [q.qid for q in task.queries] == ["9:1", "9:5"]
    assert task.queries[0].item == Item(text="a cat")


def test_repeated_ids_in_a_list_count_once(tmp_path: Path) -> None:
    task = make(tmp_path, [query(pos_cand_list=["9:2", "9:2"])], [candidate()]).load("t2i", "test")
    assert task.queries[0].positives == ("9:2",)


@pytest.mark.parametrize(("task", "tiles"), [("t2i", 1), ("t2vd", 4)])
def test_pages_get_more_tiles(tmp_path: Path, task: str, tiles: int) -> None:
    loaded = make(tmp_path, [query()], [candidate()], task).load(task, "test")
    assert loaded.candidates[0].item.max_tiles == tiles
    assert loaded.queries[0].item.max_tiles is None


def test_every_picture_of_a_dataset_with_pages_is_a_page(tmp_path: Path) -> None:
    make(tmp_path, [query()], [candidate()], "t2vd")
    dataset = make(tmp_path, [query(query_img_path="a.png")], [candidate(txt="seven", img_path="")], "it2t")
    assert dataset.load("it2t", "test").queries[0].item.max_tiles == 4


def test_where_pictures_are(tmp_path: Path) -> None:
    def source() -> Any:
        return RetrievalDataset(tmp_path).load("t2i", "test").candidates[0].item.image

    make(tmp_path, [query()], [candidate()])
    assert source() == str(tmp_path / "a.png")
    (tmp_path / "images").mkdir()
    assert source() == str(tmp_path / "images" / "a.png")
    (tmp_path / "images.zip").touch()
    assert source() == ArchiveMember(str(tmp_path / "images.zip"), "a.png")


@pytest.mark.parametrize(
    ("queries", "pool", "message"),
    [
        ([query(), "{"], [candidate()], r"queries/t2i.test.jsonl, line 2: not a line of JSON"),
        ([query(), "[]"], [candidate()], r"line 2: a row must be a JSON object, got list"),
        ([{"qid": "9:1"}], [candidate()], r"line 1: the column 'query_txt' is missing"),
        ([query(), query()], [candidate()], r"line 2: qid '9:1' occurs a second time"),
        ([query(qid=7)], [candidate()], r"line 1: qid must be a string, got 7"),
        ([query(query_txt="  ")], [candidate()], r"line 1: the row has neither text nor picture"),
        ([query(query_txt=3)], [candidate()], r"line 1: text and picture path must each be a string"),
        ([query(pos_cand_list=[])], [candidate()], r"line 1: the query has no positive"),
        ([query(pos_cand_list="9:2")], [candidate()], r"line 1: pos_cand_list must be a list"),
        ([query(pos_cand_list=["9:3"])], [candidate()], r"line 1: the candidate '9:3' is not in the pool"),
        ([query(neg_cand_list=["9:4"])], [candidate()], r"line 1: the candidate '9:4' is not in the pool"),
        ([query()], [candidate(), candidate()], r"pools/t2i.test.jsonl, line 2: did '9:2' occurs a second time"),
        ([query()], [{"did": "9:2", "txt": "x"}], r"pools/t2i.test.jsonl, line 1: the column 'img_path' is missing"),
        ([query()], [candidate(img_path="../../etc/a.png")], r"line 1: the picture path .* leaves"),
        ([query()], [candidate(img_path="/etc/a.png")], r"line 1: the picture path .* leaves"),
    ],
)
def test_bad_rows(tmp_path: Path, queries: list[Row | str], pool: list[Row | str], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        make(tmp_path, queries, pool).load("t2i", "test")


def test_bad_files(tmp_path: Path) -> None:
    dataset = make(tmp_path, [query()], [candidate()])
    with pytest.raises(DatasetError, match=r"no task 't2j' .* Did you mean 't2i.test'"):
        dataset.load("t2j", "test")
    path = write(tmp_path / "queries/i2i.test.jsonl.gz", [query(qid=f"9:{n}") for n in range(1000)])
    with pytest.raises(DatasetError, match=r"pools has no i2i\.test"):
        RetrievalDataset(tmp_path).load("i2i", "test")
    write(tmp_path / "pools/i2i.test.jsonl", [candidate()])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=r"i2i.test.jsonl.gz cannot be read after line"):
        RetrievalDataset(tmp_path).load("i2i", "test")
    write(tmp_path / "queries/i2i.test.jsonl", [query()])
    with pytest.raises(DatasetError, match="the same table"):
        RetrievalDataset(tmp_path)


def test_with_instructions(tmp_path: Path) -> None:
    task = RetrievalDataset(FIXTURE / "emoji").load("t2i", "test")
    ready = with_instructions(task)
    assert {q.item.instruction for q in ready.queries} == {"Retrieve relevant images based on a given query."}
    assert ready.candidates == task.candidates
    assert with_instructions(ready) == ready
    unknown = make(tmp_path, [query()], [candidate()], "my_own_task").load("my_own_task", "test")
    assert with_instructions(unknown) == unknown
    several = with_instructions(task, query=["One.", "Two."])
    assert {q.item.instruction for q in several.queries} == {"One."}
    assert several.instructions == ("One.", "Two.") and several.candidates == task.candidates
    assert with_instructions(several) == several


def test_instructions_of_a_folder(tmp_path: Path) -> None:
    dataset = make(tmp_path, [query()], [candidate()])
    plain, before = dataset.load("t2i", "test"), dataset.fingerprint("t2i", "test")
    assert plain.instructions == ()
    write_instructions(tmp_path, "t2i", ["One.", "Two."])
    dataset = RetrievalDataset(tmp_path)
    task = dataset.load("t2i", "test")
    assert task == replace(plain, instructions=("One.", "Two."))
    assert dataset.fingerprint("t2i", "test") != before
    ready = with_instructions(task)
    assert [one.item.instruction for one in ready.queries] == ["One."] and ready.instructions == ("One.", "Two.")
    for given in ("Two.", ""):  # what a recipe says goes before, and nothing is left to draw
        own = with_instructions(task, query=given)
        assert [one.item.instruction for one in own.queries] == [given] and own.instructions == ()
        assert with_instructions(own, query=given) == own
    assert with_instructions(task, query=["Three.", "Four."]).instructions == ("Three.", "Four.")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"t2j": ["Find."]}', r"instructions.json names a task 't2j'.* Did you mean 't2i'"),
        ('{"t2i": "Find."}', r"the task 't2i' must have a list of one or more sentences, got 'Find.'"),
        ('{"t2i": []}', r"a list of one or more sentences, got \[\]"),
        ('{"t2i": ["Find.", " "]}', "a list of one or more sentences"),
        ('["Find."]', "must be a JSON object of tasks, got list"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_instructions_that_are_none(content: str, problem: str, tmp_path: Path) -> None:
    dataset = make(tmp_path, [query()], [candidate()])
    (tmp_path / "instructions.json").write_text(content)
    with pytest.raises(DatasetError, match=problem):
        dataset.load("t2i", "test")


def test_with_negatives(tmp_path: Path) -> None:
    queries: list[Row | str] = [query(neg_cand_list=["9:3", "9:4"])]
    queries += [query(qid="9:5", pos_cand_list=["9:3"], neg_cand_list=["9:2"])]
    pool: list[Row | str] = [candidate(did=f"9:{n}") for n in (2, 3, 4, 6, 7)]
    task = make(tmp_path, queries, pool).load("t2i", "test")

    mined = with_negatives(task, {"9:1": ["9:6", "9:4", "9:6"], "9:99": ["9:8"]})
    assert [q.negatives for q in mined.queries] == [("9:6", "9:4"), ()]
    assert mined.queries[0].positives == ("9:2",) and mined.candidates == task.candidates
    kept = with_negatives(task, {"9:1": ["9:6", "9:4"]}, keep_labelled=True)
    assert [q.negatives for q in kept.queries] == [("9:3", "9:4", "9:6"), ("9:2",)]
    relevant = {"9:1": ["9:2", "9:3", "9:7", "9:7"]}
    judged = with_negatives(task, {"9:1": ["9:6"]}, also_relevant=relevant, keep_labelled=True)
    assert [q.also_relevant for q in judged.queries] == [("9:3", "9:7"), ()]
    assert judged.queries[0].negatives == ("9:4", "9:6")
    assert with_negatives(judged, {}).queries[0].also_relevant == ()


@pytest.mark.parametrize(
    ("negatives", "also_relevant", "message"),
    [
        ({"9:1": ["9:8"]}, {}, r"t2i.test: '9:8', given for the query '9:1', is not in the pool"),
        ({}, {"9:1": ["9:8"]}, r"'9:8', given for the query '9:1', is not in the pool"),
        ({"9:1": ["9:2"]}, {}, r"'9:2', given for the query '9:1', .* one of its positives"),
        ({"9:1": ["9:3"]}, {"9:1": ["9:3"]}, r"'9:3', given for the query '9:1', .* judged relevant"),
    ],
)
def test_impossible_negatives(
    tmp_path: Path, negatives: dict[str, list[str]], also_relevant: dict[str, list[str]], message: str
) -> None:
    task = make(tmp_path, [query()], [candidate(), candidate(did="9:3")]).load("t2i", "test")
    with pytest.raises(DatasetError, match=message):
        with_negatives(task, negatives, also_relevant=also_relevant)


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    dataset = make(tmp_path, [query()], [candidate()])
    before = dataset.fingerprint("t2i", "test")
    write(tmp_path / "pools/t2i.test.jsonl", [candidate(txt="new")])
    assert before != dataset.fingerprint("t2i", "test") and len(before) == 64
