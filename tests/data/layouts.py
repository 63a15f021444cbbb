"""Every published layout in miniature: the exact columns, types, archives and paths, with their quirks.

``write_suite`` writes a directory that ``--data`` of a suite can be given; every task of the suite is in it.  Run as a
program it writes one to look at:  python -m tests.data.layouts mmeb /tmp/mmeb
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from quarterlight.data.benchmarks.mbeir import DATASETS, TASKS
from quarterlight.data.benchmarks.mmeb import eval_prefixes
from quarterlight.evaluation.suites import SuiteTask, load_suite

HAS_PYAV = importlib.util.find_spec("av") is not None

Row = dict[str, Any]

IMAGE_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
QUOTED = ("MSCOCO", "RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing")
STRAY_TOKEN = ("WebQA", "EDIS")


@cache
def png(shade: int) -> bytes:
    """A picture of 8 x 8 pixels that no other number has."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, shade // 256 % 256, 77)).save(data, "PNG")
    return data.getvalue()


def shade_of(picture: bytes) -> int:
    """The number that a picture was made from."""
    red, green, _ = Image.open(io.BytesIO(picture)).getpixel((0, 0))  # type: ignore[misc]
    return red + 256 * green


def write_pictures(folder: Path, names: Iterable[str]) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))


def write_parquet(path: Path, rows: Sequence[Row], schema: pa.Schema | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- MMEB -------------------------------------------------------------------------------------------------------------


def mmeb_rows(config: str, direction: str) -> list[Row]:
    """Two queries of four candidates each; the second query's list has its right candidate twice."""
    source, target = direction.split("2")
    query_prefix, target_prefix = eval_prefixes(config)
    rows = []
    for number in range(2):
        asked = f"{config} question {number}" if "t" in source else ""
        if asked and config in QUOTED:
            asked = f'"{asked}"'
        token = "<|image_1|>\n" if "i" in source or config in STRAY_TOKEN else ""
        texts, paths = [], []
        for choice in (0, 1, 2, 3 if number == 0 else 0):
            pictured, worded = target != "t", target in ("t", "it")
            answer = f"{config} answer {number}-{choice}" if worded else ""
            if pictured and answer and config in QUOTED:
                answer = f'"{answer}"'
            texts.append(f"<|image_1|>\n{target_prefix}{answer}\n" if pictured else answer)
            paths.append(f"{config}/answer {number}-{choice}.jpg" if pictured else "")
        rows.append(
            {
                "qry_text": f"{token}{query_prefix}{asked}\n",
                "qry_img_path": f"{config}/558840_object_hot dog {number}.jpg" if "i" in source else "",
                "tgt_text": texts,
                "tgt_img_path": paths,
            }
        )
    return rows


def write_mmeb(folder: Path, tasks: Sequence[SuiteTask]) -> None:
    members: dict[str, None] = {}
    for task in tasks:
        rows = mmeb_rows(task.name, task.direction)
        write_parquet(folder / task.name / "test-00000-of-00001.parquet", rows)
        members |= dict.fromkeys(path for row in rows for path in [row["qry_img_path"], *row["tgt_img_path"]] if path)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number, name in enumerate(members):
            archive.writestr(f"eval_images/{name}", png(number))


def write_mmeb_v2(folder: Path, tasks: Sequence[SuiteTask]) -> None:
    names: dict[str, None] = {}
    for task in tasks:
        rows = []
        query_prefix, target_prefix = eval_prefixes(task.name)
        for row in mmeb_rows(task.name, task.direction):
            text = row["qry_text"].removeprefix("<|image_1|>\n").removeprefix(query_prefix)
            pictured = any(row["tgt_img_path"])
            targets = [one.removeprefix("<|image_1|>\n").removeprefix(target_prefix) for one in row["tgt_text"]]
            token = "<|image_1|> " if row["qry_img_path"] or task.name in STRAY_TOKEN else ""
            rows.append(
                {
                    "qry_inst": f"{token}{query_prefix}",
                    "qry_text": text,
                    "qry_img_path": row["qry_img_path"],
                    "tgt_inst": f"<|image_1|> {target_prefix}" if pictured else "",
                    "tgt_text": targets,
                    "tgt_img_path": row["tgt_img_path"],
                }
            )
            names |= dict.fromkeys(path for path in [row["qry_img_path"], *row["tgt_img_path"]] if path)
        write_parquet(folder / task.name / "test-00000-of-00001.parquet", rows)
    write_pictures(folder / "image-tasks", names)


# --- Documents --------------------------------------------------------------------------------------------------------


def write_beir(folder: Path, task: SuiteTask) -> None:
    """Three pages, three questions: one with two relevant pages, one with one, one without (left out)."""
    split = task.options.get("split", task.split)
    visrag = task.group == "VisRAG"
    pages: list[Any] = ["1508 06771_0.jpg", "1508 06771_1.jpg", "b.jpg"] if visrag else [0, 1, 2]
    queries: list[Any] = [f"{page}-1" for page in pages] if visrag else [0, 3, 7]  # ids have gaps
    best, other = (3, 2) if task.name.endswith("-doc") else (2, 1) if "v2" in task.name else (1, 1)
    corpus = [{"corpus-id": page, "image": {"bytes": png(n), "path": None}} for n, page in enumerate(pages)]
    write_parquet(
        folder / f"corpus/{split}-00000-of-00001.parquet",
        corpus,
        pa.schema([("corpus-id", pa.string() if visrag else pa.int64()), ("image", IMAGE_STRUCT)]),
    )
    asked = [{"query-id": qid, "query": f"question {n}?"} for n, qid in enumerate(queries)]
    if "v2" in task.name:
        asked = [row | {"language": ("french", "english", "german")[n]} for n, row in enumerate(asked)]
    if "MMLong" in task.name or "ViDoSeek" in task.name:
        asked = [row | {"corpus_range": [0, 1, 2]} for row in asked]
    write_parquet(folder / f"queries/{split}-00000-of-00001.parquet", asked)
    number = float if "shiftproject" in task.name else int  # as that set has it
    judged = [(0, 1, best), (0, 2, other), (1, 0, best), (1, 0, 0), (2, 0, 0)]
    qrels = [{"query-id": queries[q], "corpus-id": pages[c], "score": number(s)} for q, c, s in judged]
    write_parquet(folder / f"qrels/{split}-00000-of-00001.parquet", qrels)


def write_vidore_qa(folder: Path) -> None:
    """Two pages with one question on both, one question of its own, and a page that only distracts."""
    rows = [
        {"query": "on both?", "image": {"bytes": png(0), "path": None}, "image_filename": "a.png", "answer": "1"},
        {"query": "on both?", "image": {"bytes": png(1), "path": None}, "image_filename": "b.png", "answer": "1"},
        {"query": "own?", "image": {"bytes": png(0), "path": None}, "image_filename": "a.png", "answer": "2"},
        {"query": None, "image": {"bytes": png(2), "path": None}, "image_filename": "c.png", "answer": None},
    ]
    write_parquet(folder / "data/test-00000-of-00001.parquet", rows)


# --- Captions ---------------------------------------------------------------------------------------------------------


def write_captions(folder: Path, task: SuiteTask) -> None:
    """Two pictures, with five captions each or, of the long sets, one."""
    kind = task.options["kind"]
    if kind == "hub":
        rows = [
            {"image": {"bytes": png(n), "path": f"{n}.jpg"}, "text": [f"caption {n}-{i}" for i in range(6)]}
            for n in range(2)
        ]
        write_parquet(folder / "data/test-00000-of-00001-0f.parquet", rows)
    elif kind == "list":
        write_json(folder / task.options["file"], [f"caption {n}-{i}" for n in range(2) for i in range(5)])
        write_pictures(folder / "images", ["0.png", "1.png"])
    elif kind == "sharegpt4v":
        rows = [
            {
                "id": str(n),
                "image": f"sam/images/sa_{n}.jpg",
                "conversations": [
                    {"from": "human", "value": "What do you see?\n<image>"},
                    {"from": "gpt", "value": f"caption {n}-0\nin two lines"},
                ],
            }
            for n in range(2)
        ]
        write_json(folder / "share-captioner_coco_lcs_sam_1246k_1107.json", rows)
        write_pictures(folder, ["sam/images/sa_0.jpg", "sam/images/sa_1.jpg"])
    elif kind == "named":
        rows = [{"image_name": f"sa_{n}.jpg", "caption": f"caption {n}-0"} for n in range(2)]
        write_json(folder / "datas_for_validation.json", rows)
        write_pictures(folder / "val_data", ["sa_0.jpg", "sa_1.jpg"])
    else:
        for stem in (10, 9):  # not in the order of their names
            path = folder / f"caption/{stem}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"caption {stem}-0\nnot read\n", encoding="utf-8")
        write_pictures(folder / "image", ["9.jpg", "10.jpg"])


def write_sugarcrepe(folder: Path, task: SuiteTask) -> None:
    rows = {
        key: {"filename": f"00000000000{key}.jpg", "caption": f"a cat {key}", "negative_caption": f"a dog {key}"}
        for key in ("0", "1", "3")  # a number is missing
    }
    write_json(folder / task.options["file"], rows)
    write_pictures(folder / "images/val2017", [row["filename"] for row in rows.values()])


def write_ccneg(folder: Path, task: SuiteTask | None = None) -> None:
    import torch

    annotations = [
        {"json": {"caption": f"a cat {n}"}, "sop_data": {"negative-prompt": f"a cat {n}, but not, black"}}
        for n in range(2)
    ]
    paths = [f"/workspace/datasets/cc3m/cc3m_images/{n}.jpg" for n in range(2)]
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"annotations": annotations, "image_paths": paths}, folder / "ccneg_preprocessed.pt")
    write_pictures(folder / "cc3m_images", ["0.jpg", "1.jpg"])


# --- M-BEIR -----------------------------------------------------------------------------------------------------------


def write_mbeir(folder: Path, split: str = "test") -> None:
    """All 16 tasks with two queries and three candidates each, local pools and their union."""
    union: list[Row] = []
    trained: dict[str, list[Row]] = {}
    for task in load_suite("mbeir-local").tasks:
        name, number = task.options["set"], int(task.options["task"])
        asks, finds = TASKS[number]
        base = number * 100

        def row(did: int, kind: str, name: str = name) -> tuple[str | None, str | None]:
            path = f"mbeir_images/{name}_images/{split}/{did}.jpg"
            return (f"{name} text {did}" if "text" in kind else None), (path if "image" in kind else None)

        pool = []
        for did in range(base, base + 3):
            text, path = row(did, finds)
            order = "text,image" if finds == "image,text" and did % 2 else finds  # both are in use
            record = {"did": f"{DATASETS[name]}:{did}", "txt": text, "img_path": path, "modality": order}
            pool.append(record | {"src_content": None})
        queries = []
        for index in range(2):
            text, path = row(base + 50 + index, asks)
            queries.append(
                {
                    "qid": f"{DATASETS[name]}:{base + index}",
                    "query_txt": text,
                    "query_img_path": path,
                    "query_modality": "text,image" if asks == "image,text" and index else asks,
                    "query_src_content": None,
                    "pos_cand_list": [pool[index]["did"]],
                    "neg_cand_list": [pool[2]["did"]] if split == "train" else [],
                    "task_id": number,
                }
            )
        stem = f"mbeir_{name}_task{number}"
        named = f"{stem}_{split}" if name == "mscoco" else stem
        write_jsonl(folder / f"cand_pool/local/{named}_cand_pool.jsonl", pool)
        union += pool
        if split == "train":
            trained.setdefault(name, []).extend(queries)
        else:
            write_jsonl(folder / f"query/{split}/{stem}_{split}.jsonl", queries)
            judged = [f"{one['qid']} 0 {one['pos_cand_list'][0]} 1 {number}\n" for one in queries]
            path_of_qrels = folder / f"qrels/{split}/{stem}_{split}_qrels.txt"
            path_of_qrels.parent.mkdir(parents=True, exist_ok=True)
            path_of_qrels.write_text("".join(judged), encoding="utf-8")
        write_pictures(
            folder, [one[key] for one in [*pool, *queries] for key in ("img_path", "query_img_path") if one.get(key)]
        )
    for name, rows in trained.items():
        write_jsonl(folder / f"query/{split}/mbeir_{name}_{split}.jsonl", rows)
    write_jsonl(folder / f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl", union)
    instructions = folder / "instructions/query_instructions.tsv"
    instructions.parent.mkdir(parents=True, exist_ok=True)
    instructions.write_text("query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\n", encoding="utf-8")


# --- Zero-shot --------------------------------------------------------------------------------------------------------


def write_circo(folder: Path, task: SuiteTask | None = None) -> None:
    images = [{"id": 100 + n, "file_name": f"000000000{100 + n}.jpg"} for n in range(5)]
    write_json(folder / "annotations/image_info_unlabeled2017.json", {"images": images})
    rows = [
        {
            "id": n,
            "reference_img_id": 100 + n,
            "target_img_id": 103,
            "relative_caption": f"change {n}",
            "shared_concept": "a dog",
            "gt_img_ids": [103, 104] if n == 0 else [103],
            "semantic_aspects": [],
        }
        for n in range(2)
    ]
    write_json(folder / "annotations/val.json", rows)
    write_json(
        folder / "annotations/test.json", [{key: rows[0][key] for key in list(rows[0])[:5] if key != "target_img_id"}]
    )
    write_pictures(folder / "images/unlabeled2017", [one["file_name"] for one in images])


def write_genecis(folder: Path, task: SuiteTask) -> None:
    subset = task.options["subset"]
    objects = subset.endswith("_object")
    column = "val_image_id" if objects else "image_id"
    rows = [
        {
            "reference": {column: 10 + n},
            "target": {column: 20 + n},
            "gallery": [{column: 30}, {column: 31}],
            "condition": f"same colour {n}",
        }
        for n in range(2)
    ]
    write_json(folder / f"genecis/{subset}.json", rows)
    if objects:
        write_pictures(folder / "val2017", [f"{one:012d}.jpg" for one in (10, 11, 20, 21, 30, 31)])
    else:
        names = [f"{(10 + n, 20 + n, 30, 31)[part]}_{n}_{part}.jpg" for n in range(2) for part in range(4)]
        write_pictures(folder / f"vg/{subset}", names)


def write_visdial(folder: Path, task: SuiteTask | None = None) -> None:
    dialogs = [
        {"image_id": 7 + n, "caption": "c", "dialog": [{"question": 0, "answer": n}, {"question": 1, "answer": 1}]}
        for n in range(2)
    ]
    data = {"dialogs": dialogs, "questions": ["is it red", "is it big"], "answers": ["yes", "no"]}
    write_json(folder / "visdial_1.0_val.json", {"version": "1.0", "split": "val", "data": data})
    names = [f"VisualDialog_val2018_{7 + n:012d}.jpg" for n in range(2)]
    write_pictures(folder / "VisualDialog_val2018", names)


def write_vist(folder: Path, task: SuiteTask | None = None) -> None:
    """Two stories of three pictures that share one; the second cannot be told for want of a picture."""
    stories = {"s1": ["1", "2", "3"], "s2": ["2", "4", "5"], "s3": ["1", "9", "2"]}
    annotations = [
        [{"story_id": story, "photo_flickr_id": name, "text": f"line {n}.", "worker_arranged_photo_order": n}]
        for story, names in stories.items()
        for n, name in enumerate(names)
    ]
    write_json(folder / "sis/val.story-in-sequence.json", {"annotations": annotations})
    write_pictures(folder / "images/val", ["1.jpg", "2.png", "3.gif", "4.jpg", "5.jpg"])


def write_fashioniq_turns(folder: Path, task: SuiteTask | None = None) -> None:
    rows = [
        {"reference": [["x", ["is red", ""], "B1"], ["x", ["is longer", "has sleeves"], "B2"]], "target": ["x", "B3"]},
        {"reference": [["x", ["is blue"], "B2"]], "target": ["x", "B4"]},
    ]
    write_json(folder / "data/all.val.json", rows)
    write_json(folder / "image_splits/split.all.val.json", ["B1", "B2", "B3", "B4"])
    write_pictures(folder / "images", [f"B{n}.jpg" for n in range(1, 5)])


def write_video(path: Path, shades: Sequence[int]) -> None:
    """A video of one frame for each shade."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"  # type: ignore[attr-defined]
        for shade in shades:
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (shade, shade, shade)))
            video.mux(stream.encode(frame))  # type: ignore[attr-defined]
        video.mux(stream.encode())  # type: ignore[attr-defined]


def write_msrvtt(folder: Path, task: SuiteTask | None = None) -> None:
    path = folder / "annotations/MSRVTT_JSFUSION_test.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["key", "vid_key", "video_id", "sentence"])
        table.writerows([f"ret{n}", f"msr{n}", f"video{n}", f"a man, number {n}"] for n in range(2))
    if HAS_PYAV:
        for n in range(2):
            write_video(folder / f"videos/video{n}.mp4", range(0, 240, 10))


def write_msvd(folder: Path, task: SuiteTask | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test_list.txt").write_text("clip_a\nclip_b\n", encoding="utf-8")
    captions = {"clip_a": [["a", "cat"], ["the", "cat"]], "clip_b": [["a", "dog"]], "train": [["no"]]}
    (folder / "raw-captions.pkl").write_bytes(pickle.dumps(captions))
    if HAS_PYAV:
        for name in ("clip_a", "clip_b"):
            write_video(folder / f"YouTubeClips/{name}.avi", range(0, 80, 10))


def write_retrieval(folder: Path, task: SuiteTask) -> None:
    source, target = task.direction.split("2")

    def parts(kind: str, name: str) -> tuple[str | None, str | None]:
        return (f"{name} words" if "t" in kind else None), (f"{name}.png" if "i" in kind or kind == "vd" else None)

    pool, queries = [], []
    for n in range(2):
        text, path = parts(target, f"c{n}")
        pool.append({"did": f"9:{n}", "txt": text, "img_path": path})
        text, path = parts(source, f"q{n}")
        queries.append({"qid": f"9:q{n}", "query_txt": text, "query_img_path": path, "pos_cand_list": [f"9:{n}"]})
    write_jsonl(folder / f"queries/{task.direction}.test.jsonl", queries)
    write_jsonl(folder / f"pools/{task.direction}.test.jsonl", pool)
    write_pictures(folder / "images", ["c0.png", "c1.png", "q0.png", "q1.png"])


# --- Training sets ----------------------------------------------------------------------------------------------------


def write_mmeb_train(folder: Path) -> None:
    """CIRR without columns of negatives, OK-VQA with a negative text, WebQA with a stray mark; other splits."""
    prefix = "Given an image, find a similar everyday image with the described changes: "
    cirr = [
        {
            "qry": f"<|image_1|>\n{prefix}make it red {n}\n",
            "qry_image_path": f"images/CIRR/Train/a hot dog {n}.jpg",
            "pos_text": "<|image_1|>\nRepresent the given image.\n",
            "pos_image_path": f"images/CIRR/Train/t{n}.jpg",
        }
        for n in range(2)
    ]
    write_parquet(folder / "CIRR/original-00000-of-00001.parquet", cirr)
    paraphrased = [row | {"qry": "Now find <|image_1|> changed"} for row in cirr]
    write_parquet(folder / "CIRR/diverse_instruction-00000-of-00001.parquet", paraphrased)
    write_parquet(folder / "CIRR/train-00000-of-00001.parquet", cirr)
    (folder / "images_zip").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "images_zip/CIRR.zip", "w") as archive:
        for number, name in enumerate(path for row in cirr for path in (row["qry_image_path"], row["pos_image_path"])):
            archive.writestr(name, png(number))
    question = "<|image_1|> Represent the given image with the following question: what is it?\n"
    vqa = {"qry": question, "qry_image_path": "images/OK-VQA/Train/1.jpg", "pos_text": "a cat\n", "pos_image_path": ""}
    write_parquet(
        folder / "OK-VQA/original-00000-of-00001.parquet", [vqa | {"neg_text": "a dog\n", "neg_image_path": ""}]
    )
    write_pictures(folder, ["images/OK-VQA/Train/1.jpg", "images/WebQA/Train/1.jpg"])
    webqa = {
        "qry": "<|image_1|>\nFind a Wikipedia image that answers this question: who?\n",
        "qry_image_path": "",
        "pos_text": "<|image_1|>\nRepresent the given Wikipedia image with related text information: A man.\n",
        "pos_image_path": "images/WebQA/Train/1.jpg",
    }
    write_parquet(folder / "WebQA/original-00000-of-00001.parquet", [webqa])


def write_mme5(folder: Path) -> None:
    """A config with rows of two directions; its negatives are lists written out."""
    rows = [
        {
            "qry": "Find a picture of: <|image_1|> a cat\n",
            "qry_image_path": "",
            "pos_text": "<|image_1|>\n",
            "pos_image_path": "LAION_Synthetic/1.jpg",
            "neg_text": "['', \"it's\"]",
            "neg_image_path": "['LAION_Synthetic/2.jpg', '']",
        },
        {
            "qry": "<|image_1|>\nWhat is it?\n",
            "qry_image_path": "LAION_Synthetic/1.jpg",
            "pos_text": "a cat",
            "pos_image_path": "",
            "neg_text": "[]",
            "neg_image_path": "[]",
        },
    ]
    write_parquet(folder / "Retrieval/Retrieval.parquet", rows)
    write_pictures(folder, ["LAION_Synthetic/1.jpg", "LAION_Synthetic/2.jpg"])


def write_megapairs(folder: Path) -> None:
    row = {"q_img": "1.jpg", "q_text": ["make it red", "in red"], "t_img": "2.jpg", "hns": ["1.jpg", "3.jpg"]}
    write_jsonl(folder / "megapairs.jsonl", [row, row | {"t_img": "missing.jpg"}])
    write_pictures(folder, ["1.jpg", "2.jpg", "3.jpg"])


def write_colpali(folder: Path) -> None:
    """Two questions on one page, as bytes."""
    rows = [
        {
            "image": {"bytes": png(5), "path": None},
            "image_filename": "images/p.jpg",
            "query": f"question {n}?",
            "answer": "['a', 'b']",
            "source": "pdf",
            "options": None,
            "page": "3",
            "model": "m",
            "prompt": "p",
            "answer_type": None,
        }
        for n in range(2)
    ]
    write_parquet(folder / "data/train-00000-of-00082.parquet", rows)


def write_docmatix(folder: Path) -> None:
    pages = [{"bytes": png(n), "path": None} for n in range(6)]
    texts = [{"user": f"question {n}?", "assistant": f"answer {n}.", "source": "s"} for n in range(2)]
    write_parquet(folder / "data/train-00000-of-01106.parquet", [{"images": pages, "texts": texts}])


def write_bge_pairs(folder: Path) -> None:
    rows = [{"query": "q", "pos": ["p1", "p2"], "neg": ["n"], "pos_scores": [1.0, 0.5]}, {"query": "r", "pos": []}]
    write_jsonl(folder / "len-0-500.jsonl", rows)


def write_nli(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = 'sent0,sent1,hard_neg\n"A man, running.",A man moves.,A man sleeps.\n'
    (folder / "nli_for_simcse.csv").write_text(text, encoding="utf-8")


def write_blip(folder: Path) -> None:
    rows = [{"image": "1.jpg", "caption": "a cat"}, {"url": "https://example.org/2.jpg", "caption": "a dog"}]
    write_json(folder / "ccs_filtered.json", rows)
    write_pictures(folder, ["1.jpg"])


def write_cc3m(folder: Path) -> None:
    rows = {"0": {"h5v": "images/GCC_train_1.jpg", "h5a": "none", "text": "", "instruct_ans": ["a cat"]}}
    write_json(folder / "train_anno.json", rows)
    write_pictures(folder, ["images/GCC_train_1.jpg"])


def write_classes(folder: Path) -> None:
    write_pictures(folder, ["n01/a.JPEG", "n01/b.JPEG", "n01/c.JPEG", "n02/a.JPEG"])


def write_mbeir_train(folder: Path) -> None:
    write_mbeir(folder, "train")


CORPUS_WRITERS: dict[str, Callable[[Path], None]] = {
    "mmeb_train": write_mmeb_train,
    "mme5": write_mme5,
    "megapairs": write_megapairs,
    "pages": write_colpali,
    "docmatix": write_docmatix,
    "pairs": write_bge_pairs,
    "nli": write_nli,
    "captions": write_blip,
    "cc3m": write_cc3m,
    "classes": write_classes,
    "mbeir": write_mbeir_train,
}
"""Layout of training data -> what writes it."""

WRITERS: dict[str, Callable[[Path, SuiteTask], None]] = {
    "beir": write_beir,
    "captions": write_captions,
    "sugarcrepe": write_sugarcrepe,
    "ccneg": write_ccneg,
    "circo": write_circo,
    "genecis": write_genecis,
    "visdial": write_visdial,
    "vist": write_vist,
    "fashioniq_turns": write_fashioniq_turns,
    "msrvtt": write_msrvtt,
    "msvd": write_msvd,
    "retrieval": write_retrieval,
}
"""Loader -> what writes one dataset in its layout; MMEB and M-BEIR are written whole."""


def write_suite(name: str, folder: Path) -> Path:
    """A directory of data for every task of a suite."""
    tasks = load_suite(name).tasks
    if name == "mmeb":
        write_mmeb(folder, tasks)
    elif name == "mmeb-v2-image":
        write_mmeb_v2(folder, tasks)
    elif name.startswith("mbeir"):
        write_mbeir(folder / "M-BEIR")
    else:
        for task in tasks:
            WRITERS[task.loader](folder / task.folder, task)
    return folder


def opened_tasks(name: str, *, with_videos: bool = HAS_PYAV) -> list[SuiteTask]:
    """The tasks of a suite that tests open from what :func:`write_suite` writes; those of videos where PyAV is."""
    return [task for task in load_suite(name).tasks if with_videos or task.loader not in ("msrvtt", "msvd")]


if __name__ == "__main__":
    write_suite(sys.argv[1], Path(sys.argv[2]))
