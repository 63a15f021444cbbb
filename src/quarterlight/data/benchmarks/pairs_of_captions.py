"""A picture, its caption and a wrong one: SugarCrepe and CC-Neg.

SugarCrepe   data/<subset>.json     an object of numbered {filename, caption, negative_caption}; a number is missing
             pictures of COCO val2017 in images/val2017/, val2017/ or images/
CC-Neg       ccneg_preprocessed.pt  a dictionary saved by torch: image_paths, and annotations with json.caption and
                                    sop_data.negative-prompt; its last 40,000 entries count, commas taken out of the
                                    negated text (jaisidhsingh/CoN-CLIP)

A query is right when its own caption has the strictly greater score.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quarterlight.data.benchmarks.builder import TaskBuilder
from quarterlight.data.benchmarks.gallery import Gallery
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.benchmarks.tables import Place, read_rows
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError

CCNEG_SIZE = 40_000
"""Entries of CC-Neg that count, from its end."""

_CCNEG_ROOT = "/workspace/datasets/cc3m/"  # of the machine that made the file; its paths begin with it


def load_sugarcrepe(source: Source) -> RetrievalTask:
    """One of the seven subsets.  Options: ``file``.  Missing pictures are listed.

    Raises DatasetError for a file that breaks the layout.
    """
    folder = source.folder
    path = folder / source.option("file")
    rows = (
        (
            place,
            str(row.get("_key", place.row)),
            place.text(row, "filename"),
            place.text(row, "caption"),
            place.text(row, "negative_caption"),
        )
        for place, row in read_rows(path, ("filename", "caption", "negative_caption"))
    )
    places = [folder / "images" / "val2017", folder / "val2017", folder / "images", folder]
    return _load(source, rows, Gallery(places, [folder / "val2017.zip", folder / "images.zip"]))


def load_ccneg(source: Source) -> RetrievalTask:
    """The last 40,000 entries.  Options: ``file``.  Missing pictures are listed.

    The file is read without running code that it may hold.  Raises DatasetError when it breaks the layout.
    """
    import torch  # seconds

    path = source.folder / source.option("file", "ccneg_preprocessed.pt")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        paths, annotations = saved["image_paths"], saved["annotations"]
    except Exception as error:  # pickles fail in as many ways as there are bytes
        raise DatasetError(
            f"{path} must be a dictionary of image_paths and annotations saved by torch ({error!r:.200})."
        ) from error
    if len(paths) != len(annotations):
        raise DatasetError(f"{path} has {len(paths)} image_paths and {len(annotations)} annotations: expected as many.")
    first = max(0, len(paths) - CCNEG_SIZE)
    rows = (_ccneg(path, number, paths[number], annotations[number]) for number in range(first, len(paths)))
    return _load(source, rows, Gallery([source.folder, source.folder / "images"]))


def _ccneg(path: Path, number: int, picture: Any, annotation: Any) -> tuple[Place, str, str, str, str]:
    place = Place(path, number + 1)
    try:
        caption, negated = annotation["json"]["caption"], annotation["sop_data"]["negative-prompt"]
        if not isinstance(caption, str):
            raise TypeError(f"the caption is {type(caption).__name__}")
        return place, str(number), str(picture).removeprefix(_CCNEG_ROOT), caption, negated.replace(",", "")
    except (KeyError, TypeError, AttributeError) as error:
        place.fail(f"expected json.caption and sop_data.negative-prompt, got {annotation!r:.60} ({error})")


def _load(source: Source, rows: Iterable[tuple[Place, str, str, str, str]], gallery: Gallery) -> RetrievalTask:
    builder = TaskBuilder(source)
    for place, qid, path, caption, negative in rows:
        try:
            image = builder.item("", gallery.find(path))
            right, wrong = builder.share(builder.item(caption.strip())), builder.share(builder.item(negative.strip()))
        except DatasetError as error:
            builder.lost_query(qid, f"{place}: {error}")
            continue
        if right == wrong:
            builder.lost_query(qid, f"{place}: both captions are the same")
            continue
        builder.query(place, qid, image, [right], candidates=[right, wrong])
    return builder.build()
