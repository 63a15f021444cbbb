"""Multi-turn FashionIQ: pictures of clothes and what to change, turn by turn, find the last picture.

data/all.val.json                        [{"reference": [[..., [texts], name], ...], "target": [..., name]}]
image_splits/split.all.val.json          the names of the pool
images/                                  <name>.jpg; those of FashionIQ in M-BEIR,
                                         mbeir_images/fashioniq_images/, are the same
"""

from __future__ import annotations

from quarterlight.data.benchmarks.builder import TaskBuilder
from quarterlight.data.benchmarks.gallery import Gallery
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.benchmarks.tables import Place, read_json, read_rows
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError


def load(source: Source) -> RetrievalTask:
    """The dialogs as queries: the pictures of all turns, then their texts, joined by "and" within a turn.

    Options: ``file``, ``pool``.  Missing pictures are listed.  Raises DatasetError for files that break the layout.
    """
    root = source.folder
    pool = root / source.option("pool", f"image_splits/split.all.{source.split}.json")
    names = read_json(pool)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DatasetError(f"{pool} must be a JSON list of names.")
    shared = root.parent / "M-BEIR" / "mbeir_images" / "fashioniq_images"
    gallery = Gallery([root / "images", root / "mbeir_images" / "fashioniq_images", shared, root])
    builder = TaskBuilder(source)
    for number, name in enumerate(names, 1):
        try:
            item = builder.item("", gallery.find(f"{name}.jpg"))
        except DatasetError as error:
            builder.leave_out(name, f"{Place(pool, number)}: {error}")
            continue
        builder.candidate(Place(pool, number), name, item)
    for place, row in read_rows(root / source.option("file", f"data/all.{source.split}.json"), ("reference", "target")):
        qid = str(place.row - 1)
        try:
            turns = [(turn[2], " and ".join(text for text in turn[1] if text)) for turn in row["reference"]]
            target = row["target"][1]
        except (TypeError, IndexError, KeyError):
            place.fail(f"a turn must have texts and a name, and the target a name, got {row!r:.100}")
        try:
            pictures = [gallery.find(f"{name}.jpg") for name, _ in turns]
        except DatasetError as error:
            builder.lost_query(qid, f"{place}: {error}")
            continue
        item = builder.item("\n".join(text for _, text in turns if text), *pictures)
        builder.query(place, qid, item, [target] if target in builder.candidates else [])
    return builder.build()
