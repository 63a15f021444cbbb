"""GeneCIS: a picture and a condition, and a gallery for each query whose first picture is right.

    <subset>.json     in genecis/, annotations/ or the folder itself: [{reference, target, gallery, condition}]
    objects           focus_object, change_object: val_image_id; COCO val2017 as <12 digits>.jpg
    attributes        focus_attribute, change_attribute: image_id; crops of Visual Genome in vg/<subset>/ as
                      <image_id>_<row>_<n>.jpg with n = 0 for the reference, 1 for the target, 2.. for the gallery

Rows count from 0 in the names of the crops (facebookresearch/genecis).
"""

from __future__ import annotations

from typing import Any

from quarterlight.data.benchmarks.builder import TaskBuilder
from quarterlight.data.benchmarks.gallery import Gallery
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.benchmarks.tables import Place, read_rows
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError


def load(source: Source) -> RetrievalTask:
    """One of the four subsets.  Options: ``subset``.  Rows whose pictures are missing are listed.

    Raises DatasetError for a file that breaks the layout.
    """
    root, subset = source.folder, source.option("subset")
    names = [root / part / f"{subset}.json" for part in ("genecis", "annotations", ".")]
    path = next((name for name in names if name.is_file()), names[0])
    objects = subset.endswith("_object")
    folders = ["val2017", "images/val2017"] if objects else [f"vg/{subset}", subset]
    gallery = Gallery([root / folder for folder in folders])
    builder = TaskBuilder(source)
    for place, row in read_rows(path, ("reference", "target", "gallery", "condition")):
        qid = str(place.row - 1)
        others = row["gallery"]
        if not isinstance(others, list) or not others:
            place.fail(f"gallery must be a list of pictures, got {others!r:.60}")
        try:
            reference, *choices = (
                gallery.find(_name(place, one, number, objects))
                for number, one in enumerate([row["reference"], row["target"], *others])
            )
            item = builder.item(place.text(row, "condition"), reference)
            dids = [builder.share(builder.item("", choice)) for choice in choices]
        except DatasetError as error:
            if str(error).startswith(str(place)):
                raise
            builder.lost_query(qid, f"{place}: {error}")
            continue
        builder.query(place, qid, item, dids[:1], candidates=dids)
    return builder.build()


def _name(place: Place, one: Any, number: int, objects: bool) -> str:
    column = "val_image_id" if objects else "image_id"
    if not isinstance(one, dict) or column not in one:
        place.fail(f"a picture must have {column!r}, got {one!r:.60}")
    return f"{one[column]!s:0>12}.jpg" if objects else f"{one[column]}_{place.row - 1}_{number}.jpg"
