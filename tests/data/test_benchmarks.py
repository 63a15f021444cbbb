"""What each loader makes of its layout, by hand, and what it says of data that breaks it."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tests.data import layouts
from tests.data.layouts import png, shade_of, write_jsonl, write_parquet, write_pictures

from quarterlight.data.benchmarks import LOADERS
from quarterlight.data.benchmarks.gallery import Gallery
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.benchmarks.tables import find_tables, read_rows
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError
from quarterlight.evaluation.suites import SuiteTask, load_suite
from quarterlight.images import load_image
from quarterlight.records import ArchiveMember, Item


def task_of(suite: str, name: str) -> SuiteTask:
    return next(task for task in load_suite(suite).tasks if task.name == name)


def open_in(folder: Path, suite: str, name: str, **options: str) -> RetrievalTask:
    """A task read straight by its loader, without the instructions of the suite."""
    task = task_of(suite, name)
    return LOADERS[task.loader](
        Source(
            dataset=name,
            task=task.direction,
            split=task.split,
            folder=folder,
            options={key: value for key, value in {**task.options, **options}.items() if key != "pictures"},
            max_tiles=task.max_tiles,
        )
    )


def candidate(task: RetrievalTask, did: str) -> Item:
    return next(one.item for one in task.candidates if one.did == did)


# --- MMEB -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", ["mmeb", "mmeb-v2-image"])
def test_mmeb_takes_instructions_and_marks_off(suite: str, tmp_path: Path) -> None:
    names = ("OK-VQA", "WebQA", "RefCOCO-Matching", "VisDial", "ImageNet-1K")
    tasks = [task_of(suite, name) for name in names]
    (layouts.write_mmeb if suite == "mmeb" else layouts.write_mmeb_v2)(tmp_path, tasks)
    vqa, webqa, matching, dialog, imagenet = (open_in(tmp_path, suite, name) for name in names)

    first = vqa.queries[0]
    assert first.item.text == "OK-VQA question 0"
    member = "OK-VQA/558840_object_hot dog 0.jpg"
    if suite == "mmeb":
        assert first.item.image == ArchiveMember(str(tmp_path / "images.zip"), f"eval_images/{member}")
    else:
        assert first.item.image == str(tmp_path / "image-tasks" / member)
    assert load_image(first.item.images[0]).size == (8, 8)
    assert [candidate(vqa, did).text for did in first.candidates] == [f"OK-VQA answer 0-{n}" for n in range(4)]
    assert first.positives == first.candidates[:1]
    assert len(vqa.queries[1].candidates) == 3  # its right answer stands in the list twice

    assert webqa.queries[0].item == Item(text="WebQA question 0")  # and not the picture that its mark speaks of
    target = candidate(webqa, webqa.queries[0].positives[0])
    assert target.text == "WebQA answer 0-0" and target.modality == "image,text"
    assert matching.queries[0].item.text == "RefCOCO-Matching question 0"  # without quotes
    assert candidate(matching, matching.queries[0].positives[0]).text == "RefCOCO-Matching answer 0-0"
    assert candidate(dialog, dialog.queries[0].positives[0]).text is None
    assert imagenet.queries[0].item.text is None and imagenet.queries[0].item.max_tiles == 1


def test_mmeb_candidates_are_told_apart_by_text_and_picture(tmp_path: Path) -> None:
    row = {
        "qry_text": "<|image_1|> Find a Wikipedia image that answers this question: who?\n",
        "qry_img_path": "",
        "tgt_text": ["<|image_1|>\nOne.\n", "<|image_1|>\nTwo.\n", "<|image_1|>\nOne.\n"],
        "tgt_img_path": ["a.jpg", "a.jpg", "b.jpg"],
    }
    write_parquet(tmp_path / "WebQA/test-00000-of-00001.parquet", [row])
    write_pictures(tmp_path, ["a.jpg", "b.jpg"])
    task = open_in(tmp_path, "mmeb", "WebQA")
    assert task.queries[0].candidates == ("0", "1", "2") and len(task.candidates) == 3


def test_mmeb_rows_with_missing_pictures_are_listed(tmp_path: Path) -> None:
    layouts.write_mmeb(tmp_path, [task_of("mmeb", "CIRR")])
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist() if "hot dog 1" not in name}
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    task = open_in(tmp_path, "mmeb", "CIRR")
    assert [query.qid for query in task.queries] == ["1"]
    assert task.num_lost_queries == 1
    (problem,) = task.problems
    assert (
        problem.id == "2" and "parquet, row 2: the picture 'CIRR/558840_object_hot dog 1.jpg' is not" in problem.reason
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qry_txt": "x"}, r"row 1: the column 'qry_txt' is not known.*Did you mean 'qry_text'"),
        ({"tgt_text": None}, r"row 1: tgt_text must be a list of strings"),
        ({"tgt_text": ["a"]}, r"row 1: tgt_text has 1 candidates and tgt_img_path 2"),
        ({"qry_img_path": 7}, r"row 1: qry_img_path must be a string, got 7"),
        ({"tgt_text": [], "tgt_img_path": []}, r"no query that can be used.*row 1: the query has no positive"),
    ],
)
def test_mmeb_says_what_is_wrong_with_a_row(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    row = {"qry_text": "q", "qry_img_path": "", "tgt_text": ["a", "b"], "tgt_img_path": ["", ""]} | changes
    if not row["tgt_img_path"]:
        schema = pa.schema([(key, pa.list_(pa.string()) if "tgt" in key else pa.string()) for key in row])
        write_parquet(tmp_path / "OK-VQA/test-0.parquet", [row], schema)
    else:
        write_parquet(tmp_path / "OK-VQA/test-0.parquet", [row])
    with pytest.raises(DatasetError, match=message):
        open_in(tmp_path, "mmeb", "OK-VQA")


def test_a_missing_column_and_a_missing_table(tmp_path: Path) -> None:
    write_parquet(tmp_path / "OK-VQA/test-0.parquet", [{"qry_text": "q", "tgt_text": ["a"], "tgt_img_path": [""]}])
    with pytest.raises(DatasetError, match=r"row 1: the column 'qry_img_path' is missing. Did you mean 'tgt_img_path'"):
        open_in(tmp_path, "mmeb", "OK-VQA")
    with pytest.raises(DatasetError, match=r"no table for the config 'A-OKVQA' and the split 'test'.*It has: OK-VQA"):
        open_in(tmp_path, "mmeb", "A-OKVQA")


def test_truncated_files_are_told(tmp_path: Path) -> None:
    layouts.write_mmeb(tmp_path, [task_of("mmeb", "CIRR")])
    archive, table = tmp_path / "images.zip", tmp_path / "CIRR/test-00000-of-00001.parquet"
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(DatasetError, match=r"the archive .*images.zip cannot be read .*truncated"):
        open_in(tmp_path, "mmeb", "CIRR")
    table.write_bytes(table.read_bytes()[:-30])
    with pytest.raises(DatasetError, match=r"parquet cannot be read after row 0 .*truncated"):
        open_in(tmp_path, "mmeb", "CIRR")


# --- Documents --------------------------------------------------------------------------------------------------------


def test_beir_pages_and_grades(tmp_path: Path) -> None:
    layouts.write_beir(tmp_path, task_of("visdoc", "ViDoSeek-doc"))
    task = open_in(tmp_path, "visdoc", "ViDoSeek-doc")
    first, second = task.queries
    assert (first.qid, first.positives, dict(first.grades)) == ("0", ("1", "2"), {"1": 3, "2": 2})
    assert (second.qid, second.positives, dict(second.grades)) == ("3", ("0",), {"0": 3})  # the higher of two counts
    assert [problem.id for problem in task.problems] == ["7"]  # judged, but not relevant
    page = candidate(task, "1")
    assert page.max_tiles == 4 and isinstance(page.image, bytes) and shade_of(page.image) == 1


def test_pictures_of_tables_are_kept_once_as_files(tmp_path: Path) -> None:
    one = task_of("visdoc", "VisRAG_ArxivQA")
    layouts.write_beir(tmp_path / "data", one)
    source = Source(
        dataset=one.name,
        task="t2vd",
        split="test",
        folder=tmp_path / "data",
        options=one.options,
        pictures=tmp_path / "pictures",
    )
    task = LOADERS["beir"](source)
    assert [candidate.did for candidate in task.candidates] == ["1508 06771_0.jpg", "1508 06771_1.jpg", "b.jpg"]
    files = [path for path in (tmp_path / "pictures").rglob("*") if path.is_file()]
    assert len(files) == 3 and {str(candidate.item.image) for candidate in task.candidates} == set(map(str, files))
    before = {path: path.stat().st_mtime_ns for path in files}
    assert LOADERS["beir"](source) == task and {path: path.stat().st_mtime_ns for path in files} == before


def test_beir_as_mteb_copies_it(tmp_path: Path) -> None:
    write_parquet(tmp_path / "corpus/train-0.parquet", [{"id": "a b.jpg", "image": {"bytes": png(1), "path": None}}])
    write_parquet(tmp_path / "queries/train-0.parquet", [{"_id": "a b.jpg-1", "text": "where?"}])
    write_parquet(tmp_path / "data/train-0.parquet", [{"query-id": "a b.jpg-1", "corpus-id": "a b.jpg", "score": 1}])
    (query,) = open_in(tmp_path, "visdoc", "VisRAG_ArxivQA").queries
    assert (query.qid, query.item.text, query.positives) == ("a b.jpg-1", "where?", ("a b.jpg",))
    write_parquet(tmp_path / "queries/train-0.parquet", [{"_id": "a b.jpg-1", "question": "where?"}])
    with pytest.raises(DatasetError, match=r"row 1: the column 'query' is missing. Did you mean 'question'|Known"):
        open_in(tmp_path, "visdoc", "VisRAG_ArxivQA")


def test_beir_languages_stay(tmp_path: Path) -> None:
    name = "ViDoRe_economics_reports_v2_multilingual"
    layouts.write_beir(tmp_path, task_of("visdoc", name))
    assert [query.fields for query in open_in(tmp_path, "visdoc", name).queries] == [
        {"language": "french"},
        {"language": "english"},
    ]


def _again(name: str, row: dict[str, Any]) -> Callable[[Path], None]:
    """Writes a table of a dataset anew, with one more row."""

    def write(folder: Path) -> None:
        (path,) = find_tables(folder, name, "test")
        rows = [one for _, one in read_rows(path, ())]
        write_parquet(path, [*rows, rows[0] | row])

    return write


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_again("corpus", {}), r"corpus.*row 4: the candidate id '0' occurs a second time"),
        (_again("queries", {"query-id": 3}), r"queries.*row 4: the query id '3' occurs a second time"),
        (_again("qrels", {"score": 5}), None),
    ],
)
def test_beir_ids_that_occur_twice(break_it: Callable[[Path], None], message: str | None, tmp_path: Path) -> None:
    layouts.write_beir(tmp_path, task_of("visdoc", "ViDoRe_arxivqa"))
    break_it(tmp_path)
    if message is None:
        assert open_in(tmp_path, "visdoc", "ViDoRe_arxivqa").queries[0].grades == {"1": 5, "2": 1}
        return
    with pytest.raises(DatasetError, match=message):
        open_in(tmp_path, "visdoc", "ViDoRe_arxivqa")


def test_beir_lists_what_is_missing(tmp_path: Path) -> None:
    layouts.write_beir(tmp_path, task_of("visdoc", "ViDoRe_arxivqa"))
    (path,) = find_tables(tmp_path, "corpus", "test")
    rows = [row for _, row in read_rows(path, ())]
    rows[0]["image"] = {"bytes": None, "path": None}
    write_parquet(path, rows)
    task = open_in(tmp_path, "visdoc", "ViDoRe_arxivqa")
    assert [query.qid for query in task.queries] == ["0"]
    assert [problem.id for problem in task.problems] == ["0", "3", "7"]
    assert task.num_lost_queries == 2
    assert "there is no picture in the row" in task.problems[0].reason
    assert "its relevant page '0' is not in the corpus" in task.problems[1].reason


def test_vidore_in_questions_and_answers(tmp_path: Path) -> None:
    layouts.write_vidore_qa(tmp_path)
    task = LOADERS["vidore_qa"](Source(dataset="arxivqa", task="t2vd", split="test", folder=tmp_path, max_tiles=4))
    assert [one.did for one in task.candidates] == ["a.png", "b.png", "c.png"]
    assert [(query.item.text, query.positives) for query in task.queries] == [
        ("on both?", ("b.png",)),  # the later page
        ("own?", ("a.png",)),
    ]


# --- Captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suite", "name", "captions"),
    [
        ("crossmodal", "Flickr30K", 5),
        ("crossmodal", "ShareGPT4V", 1),
        ("crossmodal", "Urban1K", 1),
        ("zeroshot", "Flickr30K", 5),
        ("zeroshot", "ShareGPT4V", 1),
    ],
)
def test_captions_both_ways(suite: str, name: str, captions: int, tmp_path: Path) -> None:
    layouts.write_captions(tmp_path, task_of(suite, f"{name} t2i"))
    texts, images = (open_in(tmp_path, suite, f"{name} {way}") for way in ("t2i", "i2t"))
    assert (len(texts.queries), len(texts.candidates)) == (2 * captions, 2)
    assert (len(images.queries), len(images.candidates)) == (2, 2 * captions)
    assert [query.positives for query in texts.queries] == [(f"image-{n}",) for n in (0, 1) for _ in range(captions)]
    assert images.queries[1].positives == tuple(f"caption-1-{n}" for n in range(captions))
    stems = (9, 10) if name == "Urban1K" else (0, 1)
    for number, stem in enumerate(stems):
        found = candidate(texts, f"image-{number}")
        assert load_image(found.images[0]).getpixel((0, 0)) == (number, 0, 77)
        two_lines = " in two lines" if name == "ShareGPT4V" and suite == "crossmodal" else ""
        assert candidate(images, f"caption-{number}-0").text == f"caption {stem}-0{two_lines}"


def test_captions_that_do_not_come_in_fives(tmp_path: Path) -> None:
    (tmp_path / "flickr_text.json").write_text(json.dumps(["one"] * 7))
    with pytest.raises(DatasetError, match="7 captions: expected 5 for each picture"):
        open_in(tmp_path, "zeroshot", "Flickr30K t2i")
    (tmp_path / "flickr_text.json").write_text('["one", "tw')
    with pytest.raises(DatasetError, match=r"not valid JSON .*truncated"):
        open_in(tmp_path, "zeroshot", "Flickr30K t2i")


@pytest.mark.parametrize(("direction", "lost"), [("t2i", 5), ("i2t", 1)])
def test_a_missing_picture_loses_the_queries_of_its_captions(tmp_path: Path, direction: str, lost: int) -> None:
    declared = next(
        task
        for task in load_suite("zeroshot").tasks + load_suite("crossmodal").tasks
        if task.loader == "captions" and task.options.get("kind") == "list" and task.direction == direction
    )
    layouts.write_captions(tmp_path, declared)
    (tmp_path / "images/0.png").unlink()
    source = Source(dataset="x", task=direction, split="test", folder=tmp_path, options=declared.options)
    task = LOADERS["captions"](source)
    assert (len(task.queries), task.num_lost_queries, len(task.problems)) == (lost, lost, 1)


def test_sugarcrepe(tmp_path: Path) -> None:
    layouts.write_sugarcrepe(tmp_path, task_of("crossmodal", "SugarCrepe/swap_obj"))
    task = open_in(tmp_path, "crossmodal", "SugarCrepe/swap_obj")
    assert [query.qid for query in task.queries] == ["0", "1", "3"]  # 2 is missing from the file
    for query in task.queries:
        right, wrong = (candidate(task, did).text for did in query.candidates)
        assert (right, wrong) == (f"a cat {query.qid}", f"a dog {query.qid}")
        assert query.positives == query.candidates[:1]


def test_ccneg(tmp_path: Path) -> None:
    layouts.write_ccneg(tmp_path)
    task = open_in(tmp_path, "zeroshot", "CC-Neg")
    assert [candidate(task, did).text for did in task.queries[1].candidates] == ["a cat 1", "a cat 1 but not black"]
    import torch

    bad = {"json": {"caption": 7}, "sop_data": {"negative-prompt": "no"}}
    torch.save({"annotations": [bad], "image_paths": ["0.jpg"]}, tmp_path / "ccneg_preprocessed.pt")
    with pytest.raises(DatasetError, match=r"row 1: expected json.caption .* \(the caption is int\)"):
        open_in(tmp_path, "zeroshot", "CC-Neg")
    (tmp_path / "ccneg_preprocessed.pt").write_bytes(pickle.dumps(Path("code that would run")))
    with pytest.raises(DatasetError, match="must be a dictionary of image_paths and annotations"):
        open_in(tmp_path, "zeroshot", "CC-Neg")


# --- M-BEIR -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mbeir(tmp_path: Path) -> Path:
    layouts.write_mbeir(tmp_path)
    return tmp_path


def test_mbeir_relevance_comes_from_the_qrels(mbeir: Path) -> None:
    path = mbeir / "qrels/test/mbeir_cirr_task7_test_qrels.txt"
    path.write_text("8:700 0 8:702 1 7\n8:700 0 8:700 0 7\n")
    task = open_in(mbeir, "mbeir-local", "M-BEIR/CIRR task7")
    assert [query.positives for query in task.queries] == [("8:702",), ("8:701",)]  # the second has the list only
    assert task.queries[0].item.modality == "image,text"
    path.write_text("8:700 8:702\n")
    with pytest.raises(DatasetError, match=r"qrels.txt, row 1: expected 'qid 0 did relevance task'"):
        open_in(mbeir, "mbeir-local", "M-BEIR/CIRR task7")


def test_mbeir_lists_positives_and_pictures_that_are_missing(mbeir: Path) -> None:
    pool = mbeir / "cand_pool/local/mbeir_nights_task4_cand_pool.jsonl"
    rows = [json.loads(line) for line in pool.read_text().splitlines()]
    write_jsonl(pool, rows[1:])
    (mbeir / rows[2]["img_path"]).unlink()
    task = open_in(mbeir, "mbeir-local", "M-BEIR/NIGHTS task4")
    assert [query.qid for query in task.queries] == ["4:401"]
    assert [problem.id for problem in task.problems] == ["4:402", "4:400", "4:400"]  # picture, positive, query
    assert task.num_lost_queries == 1
    write_jsonl(pool, [*rows[1:2], *rows[1:2]])
    with pytest.raises(DatasetError, match=r"row 2: the candidate id '4:401' occurs a second time"):
        open_in(mbeir, "mbeir-local", "M-BEIR/NIGHTS task4")


@pytest.mark.parametrize("column", ["modality", "task_id"])
def test_mbeir_loses_no_query_of_a_task_s_own_file(mbeir: Path, column: str) -> None:
    """WebQA's candidates are pictures with texts; one whose text is empty is still what its row declares."""
    pool = mbeir / "cand_pool/local/mbeir_webqa_task2_cand_pool.jsonl"
    rows = [json.loads(line) for line in pool.read_text().splitlines()]
    rows[0]["txt"] = ""
    write_jsonl(pool, rows)
    asked = mbeir / "query/test/mbeir_webqa_task2_test.jsonl"
    queries = [{**json.loads(line), "task_id": None} for line in asked.read_text().splitlines()]
    if column == "task_id":  # as a test file usually is
        queries = [{key: value for key, value in row.items() if key != "task_id"} for row in queries]
        write_jsonl(asked, queries)
    else:  # the layout of training
        asked.unlink()
        other = {**queries[0], "qid": "2:900", "pos_cand_list": ["2:901"]}
        write_jsonl(mbeir / "query/test/mbeir_webqa_test.jsonl", [*queries, other])
        write_jsonl(pool, [*rows, {"did": "2:901", "txt": "a text", "img_path": None, "modality": "text"}])
    task = open_in(mbeir, "mbeir-local", "M-BEIR/WebQA task2")
    assert [query.qid for query in task.queries] == [row["qid"] for row in queries]
    assert not task.problems and task.num_lost_queries == 0


def test_mbeir_without_any_pictures_says_how_to_get_them(mbeir: Path) -> None:
    (mbeir / "mbeir_images").rename(mbeir / "elsewhere")
    with pytest.raises(DatasetError, match=r"no folder mbeir_images/ of pictures: join and unpack"):
        open_in(mbeir, "mbeir-local", "M-BEIR/NIGHTS task4")
    assert open_in(mbeir, "mbeir-local", "M-BEIR/WebQA task1").queries  # which shows none


# --- Zero-shot --------------------------------------------------------------------------------------------------------


def test_circo(tmp_path: Path) -> None:
    layouts.write_circo(tmp_path)
    task = open_in(tmp_path, "zeroshot", "CIRCO")
    assert [query.positives for query in task.queries] == [("103", "104"), ("103",)]
    assert task.queries[0].item.text == "change 0"
    assert task.queries[0].item.images == candidate(task, "100").images
    assert len(task.candidates) == 5


@pytest.mark.parametrize("subset", ["change_object", "focus_attribute"])
def test_genecis(subset: str, tmp_path: Path) -> None:
    name = f"GeneCIS/{subset}"
    layouts.write_genecis(tmp_path, task_of("zeroshot", name))
    task = open_in(tmp_path, "zeroshot", name)
    first = task.queries[0]
    shown = [Path(str(candidate(task, did).image)).name for did in first.candidates]
    if subset == "change_object":
        assert shown == ["000000000020.jpg", "000000000030.jpg", "000000000031.jpg"]
        assert len(task.candidates) == 4  # galleries share pictures
    else:
        assert shown == ["20_0_1.jpg", "30_0_2.jpg", "31_0_3.jpg"]
        assert len(task.candidates) == 6
    assert first.positives == first.candidates[:1] and first.item.text == "same colour 0"


def test_visdial(tmp_path: Path) -> None:
    layouts.write_visdial(tmp_path)
    task = open_in(tmp_path, "zeroshot", "VisDial")
    assert task.queries[0].item.text == "Q: is it red? A: yes. Q: is it big? A: no."
    shown = candidate(task, task.queries[1].positives[0]).image
    assert Path(str(shown)).name == "VisualDialog_val2018_000000000008.jpg"


def test_vist_hides_what_the_story_has_shown(tmp_path: Path) -> None:
    layouts.write_vist(tmp_path)
    task = open_in(tmp_path, "zeroshot", "VIST")
    first, second = task.queries
    assert (first.positives, first.excluded) == (("3",), ("1", "2"))
    assert (second.positives, second.excluded) == (("5",), ("2", "4"))
    assert first.item.text == "line 0. line 1. line 2." and len(first.item.images) == 2
    assert [one.did for one in task.candidates] == ["1", "2", "3", "4", "5"]
    assert [problem.id for problem in task.problems] == ["9", "s3"]  # a picture, and the story that shows it
    assert task.num_lost_queries == 1


def test_fashioniq_in_turns(tmp_path: Path) -> None:
    layouts.write_fashioniq_turns(tmp_path)
    task = open_in(tmp_path, "zeroshot", "Multi-turn FashionIQ")
    first = task.queries[0]
    assert first.item.text == "is red\nis longer and has sleeves"
    assert [Path(str(image)).name for image in first.item.images] == ["B1.jpg", "B2.jpg"]
    assert first.positives == ("B3",) and len(task.candidates) == 4


@pytest.mark.skipif(layouts.HAS_PYAV, reason="PyAV is there")
def test_videos_without_pyav_name_the_extra(tmp_path: Path) -> None:
    layouts.write_msrvtt(tmp_path)
    with pytest.raises(DatasetError, match=r"pip install -e '\.\[video\]'"):
        open_in(tmp_path, "zeroshot", "MSR-VTT")


@pytest.mark.skipif(not layouts.HAS_PYAV, reason="needs PyAV: pip install -e '.[video]'")
def test_videos_are_frames_evenly_taken(tmp_path: Path) -> None:
    layouts.write_msrvtt(tmp_path)
    task = open_in(tmp_path, "zeroshot", "MSR-VTT", frames="4")
    assert [query.positives for query in task.queries] == [("video0",), ("video1",)]
    greys = [load_image(frame).getpixel((16, 16))[0] for frame in task.candidates[0].item.images]  # type: ignore[index]
    # 24 frames of grey 0, 10, 20, ...: those numbered 3, 9, 15, 21
    assert greys == pytest.approx([30, 90, 150, 210], abs=6)
    (tmp_path / "videos/video1.mp4").write_bytes(b"not a video")
    task = open_in(tmp_path, "zeroshot", "MSR-VTT", frames="4")
    assert [query.qid for query in task.queries] == ["video0-0"]
    assert [problem.id for problem in task.problems] == ["video1", "video1-0"]


@pytest.mark.skipif(not layouts.HAS_PYAV, reason="needs PyAV: pip install -e '.[video]'")
def test_a_video_is_decoded_again_only_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quarterlight.data.benchmarks import videos

    layouts.write_msrvtt(tmp_path)
    decoded: list[str] = []
    sample = videos.sample_frames
    monkeypatch.setattr(videos, "sample_frames", lambda path, count: decoded.append(path.name) or sample(path, count))

    def opened(**options: str) -> RetrievalTask:
        declared = task_of("zeroshot", "MSR-VTT")
        source = Source(
            dataset="MSR-VTT", task="t2v", split="test", folder=tmp_path, options=options, pictures=tmp_path / "kept"
        )
        return LOADERS[declared.loader](source)

    first = opened(frames="3")
    assert opened(frames="3") == first and decoded == ["video0.mp4", "video1.mp4"]
    Path(str(first.candidates[0].item.images[0])).unlink()
    os.utime(tmp_path / "videos/video1.mp4", ns=(1, 1))
    assert opened(frames="3") == first and decoded[2:] == ["video0.mp4", "video1.mp4"]
    assert opened(frames="2") != first and len(decoded) == 6


@pytest.mark.parametrize(
    "content",
    [b"(", pickle.dumps({"video0": [1]}), pickle.dumps({"video0": 5}), b"\x80\x04K\x01.rest", b"\x80\x04h\x07.", b"t."],
)
def test_damaged_captions_of_msvd_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "raw-captions.pkl").write_bytes(content)
    (tmp_path / "test_list.txt").write_text("video0\n")
    with pytest.raises(DatasetError, match=r"raw-captions\.pkl must "):
        open_in(tmp_path, "zeroshot", "MSVD")


@pytest.mark.skipif(not layouts.HAS_PYAV, reason="needs PyAV: pip install -e '.[video]'")
def test_every_caption_of_msvd_is_a_query(tmp_path: Path) -> None:
    layouts.write_msvd(tmp_path)
    task = open_in(tmp_path, "zeroshot", "MSVD")
    assert [(query.qid, query.item.text) for query in task.queries] == [
        ("clip_a-0", "a cat"),
        ("clip_a-1", "the cat"),
        ("clip_b-0", "a dog"),
    ]
    assert [len(one.item.images) for one in task.candidates] == [8, 8]  # fewer than 12: all of them
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({"clip_a": Path("x")}))
    with pytest.raises(DatasetError, match=r"refers to pathlib"):
        open_in(tmp_path, "zeroshot", "MSVD")


# --- Tables and pictures ----------------------------------------------------------------------------------------------


def test_the_readme_says_where_tables_are(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files:\n  - split: test\n    path: odd/place-*.jsonl\n---\nText.\n"
    )
    write_jsonl(tmp_path / "odd/place-1.jsonl", [{"x": 1}])
    write_jsonl(tmp_path / "a/test-1.jsonl", [{"x": 2}])
    assert [row for path in find_tables(tmp_path, "a", "test") for _, row in read_rows(path, ["x"])] == [{"x": 1}]


@pytest.mark.parametrize("path", ["/etc/passwd", "../up.png"])
def test_pictures_stay_in_their_folder(path: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="leaves the dataset's folder"):
        Gallery([tmp_path]).find(path)


def test_a_picture_is_one_object(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    gallery = Gallery([tmp_path / "none", tmp_path])
    assert gallery.find("a.png") is gallery.find("a.png")
    with pytest.raises(DatasetError, match=r"the picture 'b.png' is not in"):
        gallery.find("b.png")
