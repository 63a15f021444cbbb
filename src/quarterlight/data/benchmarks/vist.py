"""VIST: the captions of a story and all its pictures but the last find the last.

    sis/val.story-in-sequence.json     {"annotations": [[{story_id, photo_flickr_id, text,
                                       worker_arranged_photo_order}], ...]}
    images/val/                        the pictures, <photo_flickr_id>.jpg, .png or .gif

Pictures that the story has shown may not be found (LamRA, arXiv:2412.01720).
"""

from __future__ import annotations

from quarterlight.data.benchmarks.builder import TaskBuilder
from quarterlight.data.benchmarks.gallery import Gallery
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.benchmarks.tables import Place, read_json
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError
from quarterlight.records import ImageSource


def load(source: Source) -> RetrievalTask:
    """Stories as queries, their pictures before their captions; the pool is every picture of any story.

    Options: ``file``.  Left out and listed: pictures that are missing, and stories that show one of them or have fewer
    than two.  A story whose last picture was shown before has nothing to find, likewise.  Raises DatasetError for a
    file that breaks the layout.
    """
    path = source.folder / source.option("file", f"sis/{source.split}.story-in-sequence.json")
    saved = read_json(path)
    annotations = saved.get("annotations") if isinstance(saved, dict) else None
    if not isinstance(annotations, list):
        raise DatasetError(f"{path} must have a list 'annotations'.")
    stories: dict[str, list[tuple[Place, str, str]]] = {}
    for number, one in enumerate(annotations, 1):
        place, entry = Place(path, number), one[0] if isinstance(one, list) and len(one) == 1 else one
        if not isinstance(entry, dict) or not {"story_id", "photo_flickr_id", "text"} <= entry.keys():
            place.fail(f"expected story_id, photo_flickr_id and text, got {one!r:.60}")
        told = stories.setdefault(str(entry["story_id"]), [])
        told.append((place, str(entry["photo_flickr_id"]), str(entry["text"])))
    gallery = Gallery([source.folder / "images" / source.split, source.folder / "images"])
    builder = TaskBuilder(source)
    pictures: dict[str, ImageSource] = {}
    for name, place in sorted({name: place for told in stories.values() for place, name, _ in told}.items()):
        try:
            pictures[name] = _find(gallery, name)
        except DatasetError as error:
            builder.leave_out(name, f"{place}: {error}")
            continue
        builder.candidate(place, name, builder.item("", pictures[name]))
    for story, told in stories.items():
        place, answer, _ = told[-1]
        shown = [name for _, name, _ in told[:-1]]
        if not shown or answer in shown:
            builder.leave_out(story, f"{place}: the story shows too little, or its answer")
            continue
        if lost := [name for _, name, _ in told if name not in pictures]:
            builder.lost_query(story, f"{place}: the story shows the picture {lost[0]!r}, which is missing")
            continue
        item = builder.item(" ".join(text for _, _, text in told), *(pictures[name] for name in shown))
        builder.query(place, story, item, [answer], excluded=shown)
    return builder.build()


def _find(gallery: Gallery, name: str) -> ImageSource:
    for ending in ("jpg", "png"):
        try:
            return gallery.find(f"{name}.{ending}")
        except DatasetError:
            continue
    return gallery.find(f"{name}.gif")
