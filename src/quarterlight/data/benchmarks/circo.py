"""CIRCO: a picture and a change to it, among the 123,403 unlabelled pictures of COCO; several answers may be right.

    annotations/<split>.json                          id, reference_img_id, target_img_id, relative_caption,
                                                      gt_img_ids, ...
    annotations/image_info_unlabeled2017.json         {"images": [{"id", "file_name"}, ...]}, the pool
    images/unlabeled2017/                             the pictures; unlabeled2017/ too

The split ``test`` has no public answers; ``val`` has (arXiv:2303.15247).
"""

from __future__ import annotations

from quarterlight.data.benchmarks.builder import TaskBuilder
from quarterlight.data.benchmarks.gallery import Gallery
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.benchmarks.tables import Place, read_json, read_rows
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError


def load(source: Source) -> RetrievalTask:
    """One split.  The picture of the query is in the pool, as the official evaluator has it.

    Raises DatasetError for files that break the layout; missing pictures are listed.
    """
    folder = source.folder / "annotations"
    path = folder / "image_info_unlabeled2017.json"
    info = read_json(path)
    images = info.get("images") if isinstance(info, dict) else None
    if not isinstance(images, list):
        raise DatasetError(f"{path} must have a list 'images'.")
    root = source.folder
    gallery = Gallery([root / "images" / "unlabeled2017", root / "unlabeled2017", root / "images"])
    builder = TaskBuilder(source)
    for number, image in enumerate(images, 1):
        place = Place(path, number)
        if not isinstance(image, dict) or "id" not in image or "file_name" not in image:
            place.fail(f"an image must have 'id' and 'file_name', got {image!r:.60}")
        try:
            builder.candidate(place, str(image["id"]), builder.item("", gallery.find(str(image["file_name"]))))
        except DatasetError as error:
            if str(image["id"]) in builder.candidates:
                raise
            builder.leave_out(str(image["id"]), f"{place}: {error}")
    columns = ("id", "reference_img_id", "relative_caption")
    for place, row in read_rows(folder / f"{source.split}.json", columns):
        qid, reference = str(row["id"]), str(row["reference_img_id"])
        if reference not in builder.candidates:
            builder.lost_query(qid, f"{place}: its picture {reference!r} is not in the pool")
            continue
        item = builder.item(place.text(row, "relative_caption"), *builder.candidates[reference].item.images)
        truth = place.ids(row, "gt_img_ids") or ([str(row["target_img_id"])] if "target_img_id" in row else [])
        missing = [did for did in truth if did not in builder.candidates]
        for did in missing:
            builder.leave_out(did, f"{place}: this answer to {qid!r} is not in the pool")
        builder.query(place, qid, item, [did for did in truth if did not in missing])
    return builder.build()
