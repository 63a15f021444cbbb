"""Pictures with captions, searched either way: Flickr30K, MSCOCO, ShareGPT4V, Urban1K.

What is on disk, by the option ``kind``:

    hub         <split>-*.parquet in data/ or the folder itself: image, and text or caption (list of strings), of which
                the first five count (royokong/flickr30k_test, royokong/coco_test, nlphuji/...; of a table with a
                column split, only the rows of this one)
    list        a JSON list of captions, five for each of images/0.png, images/1.png, ...; of MSCOCO in
                coco_images/ (code-kunkun/LamRA_Eval)
    sharegpt4v  a JSON list of {image, conversations}, of which the first 1000 count; the caption is the second turn,
                its line breaks made blanks (Lin-Chen/ShareGPT4V)
    named       a JSON list of {image_name, caption}; the pictures in val_data/ (code-kunkun/LamRA_Eval)
    stems       image/<i>.jpg with caption/<i>.txt, of which the first line counts (BeichenZhang/Urban1k)

A text finds its picture, a picture any of its captions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import NamedTuple

from quarterlight.data.benchmarks.beir import picture
from quarterlight.data.benchmarks.builder import TaskBuilder
from quarterlight.data.benchmarks.gallery import Gallery
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.benchmarks.tables import Place, find_tables, read_json, read_rows
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError, did_you_mean
from quarterlight.records import ImageSource

CAPTIONS = 5
"""Captions of a picture that count, where there are more."""

LONG_CAPTIONS = 1000
"""Rows of ShareGPT4V that count."""


class _Captioned(NamedTuple):
    place: Place
    find: Callable[[], ImageSource]
    captions: list[str]


def load(source: Source) -> RetrievalTask:
    """The set in the direction of the task, ``t2i`` or ``i2t``.  Options: ``kind``, ``file``.

    Left out and listed: pictures that are missing, captions that are empty.  Raises DatasetError for files that break
    the layout.
    """
    if source.task not in ("t2i", "i2t"):
        raise DatasetError(f"{source.dataset}: captions are searched as t2i or i2t, got {source.task!r}.")
    kind = source.option("kind", "hub")
    if kind not in KINDS:
        raise DatasetError(f"{source.dataset}: there is no kind {kind!r} of captions. {did_you_mean(kind, KINDS)}")
    builder = TaskBuilder(source)
    for number, row in enumerate(KINDS[kind](source)):
        try:
            image = builder.item("", row.find())
        except DatasetError as error:
            # with its picture every caption is lost, or the picture's one question
            lost = len(row.captions) if source.task == "t2i" else 1
            builder.lost_query(f"image-{number}", f"{row.place}: {error}", lost)
            continue
        texts = []
        for index, caption in enumerate(row.captions):
            name = f"caption-{number}-{index}"
            if caption.strip():
                texts.append((name, builder.item(caption.strip())))
            else:
                lost = int(source.task == "t2i")
                builder.lost_query(name, f"{row.place}: the caption is empty", lost)
        if source.task == "t2i":
            builder.candidate(row.place, f"image-{number}", image)
            for name, item in texts:
                builder.query(row.place, name, item, [f"image-{number}"])
        else:
            for name, item in texts:
                builder.candidate(row.place, name, item)
            builder.query(row.place, f"image-{number}", image, [name for name, _ in texts])
    return builder.build()


def _hub(source: Source) -> Iterator[_Captioned]:
    gallery = Gallery([source.folder, source.folder / "images"])
    for path in find_tables(source.folder, "default", source.split):
        for place, row in read_rows(path, ("image",)):
            if row.get("split") not in (None, source.split):
                continue
            column = "text" if "text" in row else "caption"
            captions = place.texts(row, column)[:CAPTIONS]
            cell = row["image"]
            yield _Captioned(place, lambda cell=cell: picture(source, gallery, cell), captions)  # type: ignore[misc]


def _list(source: Source) -> Iterator[_Captioned]:
    path = source.folder / source.option("file")
    captions = read_json(path)
    if not isinstance(captions, list) or not all(isinstance(one, str) for one in captions):
        raise DatasetError(f"{path} must be a JSON list of captions.")
    if len(captions) % CAPTIONS:
        raise DatasetError(f"{path} has {len(captions)} captions: expected {CAPTIONS} for each picture.")
    gallery = Gallery([path.parent / "images", path.parent / "coco_images", path.parent])
    for number in range(len(captions) // CAPTIONS):
        several = captions[number * CAPTIONS : (number + 1) * CAPTIONS]
        yield _Captioned(Place(path, number * CAPTIONS + 1), _finder(gallery, f"{number}.png"), several)


def _sharegpt4v(source: Source) -> Iterator[_Captioned]:
    path = source.folder / source.option("file", "share-captioner_coco_lcs_sam_1246k_1107.json")
    gallery = Gallery([source.folder, source.folder / "data", source.folder / "images"])
    for place, row in read_rows(path, ("image", "conversations")):
        if place.row > LONG_CAPTIONS:
            return
        turns = row["conversations"]
        if not isinstance(turns, list) or len(turns) < 2 or not isinstance(turns[1], dict):
            place.fail(f"conversations must have two turns, got {turns!r:.60}")
        caption = place.text(turns[1], "value").replace("\n", " ")
        yield _Captioned(place, _finder(gallery, place.text(row, "image")), [caption])


def _named(source: Source) -> Iterator[_Captioned]:
    path = source.folder / source.option("file", "datas_for_validation.json")
    gallery = Gallery([path.parent / "val_data", path.parent / "images", path.parent])
    for place, row in read_rows(path, ("image_name", "caption")):
        yield _Captioned(place, _finder(gallery, place.text(row, "image_name")), [place.text(row, "caption")])


def _stems(source: Source) -> Iterator[_Captioned]:
    """Paired by stem, in the order of the numbers: folders are listed in any order."""
    files = list((source.folder / "caption").glob("*.txt"))
    gallery = Gallery([source.folder / "image"])
    for path in sorted(files, key=lambda path: (len(path.stem), path.stem)):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        yield _Captioned(Place(path, 1), _finder(gallery, f"{path.stem}.jpg"), [first])


def _finder(gallery: Gallery, path: str) -> Callable[[], ImageSource]:
    return lambda: gallery.find(path)


KINDS = MappingProxyType(
    {"hub": _hub, "list": _list, "sharegpt4v": _sharegpt4v, "named": _named, "stems": _stems},
)
"""What is on disk -> what reads it."""
