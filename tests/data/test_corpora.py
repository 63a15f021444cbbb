from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.data import layouts

from quarterlight.data.benchmarks import mbeir
from quarterlight.data.corpora import CORPORA, mbeir_train
from quarterlight.data.corpora.example import Corpus
from quarterlight.data.corpora.folder import FolderCounts, write_folder
from quarterlight.data.registry import datasets, find
from quarterlight.data.retrieval import RetrievalDataset, RetrievalTask, with_instructions
from quarterlight.errors import DatasetError, InputError
from quarterlight.images import load_image
from quarterlight.prompts import QUERY_INSTRUCTIONS
from quarterlight.records import Item, Query


def convert(
    tmp_path: Path, layout: str, task: str, *, path: str = ".", images: str | None = None, **options: str
) -> tuple[RetrievalTask, FolderCounts]:
    """What a recipe would load of a corpus in miniature, and what was counted."""
    source = tmp_path / "source"
    if not source.exists():
        layouts.CORPUS_WRITERS[layout](source)
    corpus = Corpus(path=source / path, task=task, images=None if images is None else source / images, options=options)
    counts = write_folder(corpus, layout, tmp_path / "out")
    return RetrievalDataset(tmp_path / "out").load(task, "train"), counts


def items(task: RetrievalTask, dids: tuple[str, ...]) -> list[Item]:
    pool = {candidate.did: candidate.item for candidate in task.candidates}
    return [pool[did] for did in dids]


def shades(task: RetrievalTask, query: Query) -> list[int]:
    """The number of each picture of the query, its positives and its negatives."""
    shown = [query.item, *items(task, query.positives), *items(task, query.negatives)]
    return [load_image(image).getpixel((0, 0))[0] for item in shown for image in item.images]  # type: ignore[index]


def test_every_layout_has_a_miniature() -> None:
    assert set(layouts.CORPUS_WRITERS) == set(CORPORA)


def test_mmeb_pictures_stay_in_their_archive(tmp_path: Path) -> None:
    task, counts = convert(tmp_path, "mmeb_train", "it2i", path="CIRR")
    assert [query.item.text for query in task.queries] == ["make it red 0", "make it red 1"]
    assert [shades(task, query) for query in task.queries] == [[0, 1], [2, 3]]
    assert items(task, task.queries[0].positives)[0].text is None
    assert (tmp_path / "out/images.zip").is_symlink()
    assert (counts.read, counts.queries, counts.candidates, counts.problems) == (2, 2, 2, [])


def test_mmeb_pictures_that_are_unpacked(tmp_path: Path) -> None:
    task, _ = convert(tmp_path, "mmeb_train", "it2t", path="OK-VQA")
    (query,) = task.queries
    assert query.item.text == "what is it?"
    assert [item.text for item in items(task, (*query.positives, *query.negatives))] == ["a cat", "a dog"]
    assert load_image(query.item.images[0]).size == (8, 8)


def test_configs_share_a_folder_once_their_pictures_are_unpacked(tmp_path: Path) -> None:
    convert(tmp_path, "mmeb_train", "it2t", path="OK-VQA")
    convert(tmp_path, "mmeb_train", "t2it", path="WebQA")
    dataset = RetrievalDataset(tmp_path / "out")
    assert dataset.tasks("train") == ["t2it", "it2t"]
    for name in dataset.tasks("train"):
        task = dataset.load(name, "train")
        assert all(load_image(image).size == (8, 8) for one in task.candidates for image in one.item.images)
    with pytest.raises(DatasetError, match=r"pictures in .*CIRR.zip and in .*out/images, but it can have one place"):
        convert(tmp_path, "mmeb_train", "it2i", path="CIRR")
    assert not (tmp_path / "out/images.zip").exists()  # which would hide the others


def test_mmeb_stray_mark(tmp_path: Path) -> None:
    task, _ = convert(tmp_path, "mmeb_train", "t2it", config="WebQA")
    assert task.queries[0].item == Item(text="who?")
    assert items(task, task.queries[0].positives)[0].text == "A man."
    with pytest.raises(DatasetError, match="MMEB has no training set 'FashionIQ'"):
        convert(tmp_path, "mmeb_train", "it2i", config="FashionIQ")


def test_mme5_lists_are_read_and_directions_told_apart(tmp_path: Path) -> None:
    task, counts = convert(tmp_path, "mme5", "t2i", config="Retrieval")
    (query,) = task.queries
    assert query.item.text == "Find a picture of: a cat"
    assert [item.modality for item in items(task, query.negatives)] == ["image", "text"]
    assert items(task, query.negatives)[1].text == "it's"
    assert (counts.read, counts.queries, counts.other) == (2, 1, 1)
    path = tmp_path / "source/Retrieval/Retrieval.parquet"
    row = {"qry": "a", "qry_image_path": "", "pos_text": "b", "pos_image_path": "", "neg_text": "__import__('os')"}
    layouts.write_parquet(path, [row])
    with pytest.raises(DatasetError, match=r"row 1: neg_text must be a list written out"):
        convert(tmp_path, "mme5", "t2t", config="Retrieval")


def test_megapairs_keeps_the_picture_of_the_query_as_a_negative(tmp_path: Path) -> None:
    task, counts = convert(tmp_path, "megapairs", "it2i")
    (query,) = task.queries
    assert query.item.text == "make it red" and shades(task, query) == [0, 1, 0, 2]
    (problem,) = counts.problems
    assert "megapairs.jsonl, row 2: the picture 'missing.jpg' is not in" in problem
    assert len(convert(tmp_path, "megapairs", "it2i", texts="all")[0].queries) == 2


def test_pages_in_tables_become_files_once(tmp_path: Path) -> None:
    task, counts = convert(tmp_path, "pages", "t2vd")
    assert [query.item.text for query in task.queries] == ["question 0?", "question 1?"]
    assert len(task.candidates) == counts.candidates == 1 and task.candidates[0].item.max_tiles == 4
    assert shades(task, task.queries[0]) == [5]
    assert len([path for path in (tmp_path / "out/images").rglob("*") if path.is_file()]) == 1


def test_docmatix_both_ways(tmp_path: Path) -> None:
    task, _ = convert(tmp_path, "docmatix", "t2vd", pages="3", config="default")
    assert len(task.queries) == 2 and len(task.candidates) == 1
    assert shades(task, task.queries[0]) == [0, 1, 2]  # pages in reading order
    task, _ = convert(tmp_path, "docmatix", "it2t", config="default")
    assert [item.text for item in items(task, task.queries[1].positives)] == ["answer 1."]
    assert shades(task, task.queries[1]) == [0, 1, 2, 3] and task.queries[1].item.text == "question 1?"


def test_texts(tmp_path: Path) -> None:
    task, counts = convert(tmp_path, "pairs", "t2t")
    assert [item.text for item in items(task, task.queries[0].positives)] == ["p1", "p2"]
    assert [item.text for item in items(task, task.queries[0].negatives)] == ["n"]
    assert counts.problems == [f"{tmp_path}/source/len-0-500.jsonl, row 2: the query has no positive candidate."]


def test_nli(tmp_path: Path) -> None:
    task, _ = convert(tmp_path, "nli", "t2t")
    (query,) = task.queries
    assert query.item.text == "A man, running."
    assert [item.text for item in items(task, (*query.positives, *query.negatives))] == [
        "A man moves.",
        "A man sleeps.",
    ]


def test_captions(tmp_path: Path) -> None:
    task, counts = convert(tmp_path, "captions", "t2i", path="ccs_filtered.json")
    assert [query.item.text for query in task.queries] == ["a cat"]
    assert "row 2: the row must have 'image' and 'caption': fetch the picture" in counts.problems[0]


@pytest.mark.parametrize("task", ["t2i", "i2t"])
def test_cc3m(task: str, tmp_path: Path) -> None:
    loaded, _ = convert(tmp_path, "cc3m", task)
    (query,) = loaded.queries
    sides = [query.item, *items(loaded, query.positives)]
    assert [side.modality for side in sides] == (["text", "image"] if task == "t2i" else ["image", "text"])
    assert {side.text for side in sides} == {"a cat", None}


def test_classes_pair_in_a_ring(tmp_path: Path) -> None:
    task, counts = convert(tmp_path, "classes", "i2i")
    assert [shades(task, query) for query in task.queries] == [[0, 1], [1, 2], [2, 0]]
    assert counts.problems == [f"{tmp_path}/source/n02: expected at least two pictures of a class, got 1."]


@pytest.mark.parametrize(("number", "task"), [(6, "it2t"), (8, "it2it")])
def test_mbeir_training_files_hold_two_tasks(number: int, task: str, tmp_path: Path) -> None:
    layouts.write_mbeir(tmp_path / "source", "train")
    corpus = Corpus(path=tmp_path / "source", task=task, options={"set": "oven", "task": str(number)})
    counts = write_folder(corpus, "mbeir", tmp_path / "out")
    loaded = RetrievalDataset(tmp_path / "out").load(task, "train")
    assert len(loaded.queries) == 2 and counts.candidates == 3  # of a union of 48
    assert [len(query.negatives) for query in loaded.queries] == [1, 1]
    assert items(loaded, loaded.queries[0].positives)[0].text == f"oven text {number}00"


def test_mbeir_folders_hold_the_instructions_of_their_tasks(tmp_path: Path) -> None:
    layouts.write_mbeir(tmp_path / "source", "train")
    out = tmp_path / "out"
    for number, task in ((6, "it2t"), (8, "it2it")):
        options = {"set": "oven", "task": str(number)}
        write_folder(Corpus(path=tmp_path / "source", task=task, options=options), "mbeir", out)
    loaded = {task: RetrievalDataset(out).load(task, "train") for task in ("it2t", "it2it")}
    for number, (task, one) in zip((6, 8), loaded.items(), strict=True):
        published = find(f"M-BEIR/OVEN task{number}")[0].query_instructions
        assert one.instructions == published and len(published) > 1
        (asked,) = {query.item.instruction for query in with_instructions(one).queries}
        assert asked == published[0] != QUERY_INSTRUCTIONS.get(task)
    assert set(json.loads((out / "instructions.json").read_text())) == set(loaded)


def test_every_task_of_mbeir_has_instructions() -> None:
    for entry in datasets("train-stage3"):
        if (name := re.fullmatch(r"M-BEIR/(\w+) task(\d)", entry.name)) is not None:
            options = {"set": name[1].lower(), "task": name[2]}
            assert options["set"] in mbeir.DATASETS
            corpus = Corpus(path=Path("nowhere"), task=str(entry.task), options=options)
            assert mbeir_train.instructions(corpus) == entry.query_instructions


def test_other_layouts_write_no_instructions(tmp_path: Path) -> None:
    task, _ = convert(tmp_path, "pairs", "t2t")
    assert task.instructions == () and not (tmp_path / "out/instructions.json").exists()


def test_mbeir_tasks_are_told_apart_by_modality_where_no_number_is_given(tmp_path: Path) -> None:
    layouts.write_mbeir(tmp_path / "source", "train")
    path = tmp_path / "source/query/train/mbeir_oven_train.jsonl"
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    layouts.write_jsonl(path, [{key: value for key, value in row.items() if key != "task_id"} for row in rows])
    corpus = Corpus(path=tmp_path / "source", task="it2t", options={"set": "oven", "task": "6"})
    assert write_folder(corpus, "mbeir", tmp_path / "out").queries == 2


def test_the_same_rows_give_the_same_folder(tmp_path: Path) -> None:
    def files() -> dict[str, bytes]:
        out = tmp_path / "out"
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.jsonl")}

    convert(tmp_path, "megapairs", "it2i")
    first = files()
    convert(tmp_path, "megapairs", "it2i")
    assert files() == first and set(first) == {"queries/it2i.train.jsonl", "pools/it2i.train.jsonl"}


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no row that can be used.* 2 rows are of another direction than i2i"):
        convert(tmp_path, "pages", "i2i")
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file() and "images" not in path.parts] == []
    with pytest.raises(InputError, match=r"no layout 'mega' of training data. Did you mean 'megapairs'"):
        write_folder(Corpus(path=tmp_path, task="it2i"), "mega", tmp_path / "out")


def test_pictures_of_another_place_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "out/images").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"pictures in .*source and in .*out/images, but it can have one place"):
        convert(tmp_path, "megapairs", "it2i")
