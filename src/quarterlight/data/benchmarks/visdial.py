"""Visual Dialog v1.0: ten rounds of questions and answers about a picture find the picture.

    visdial_1.0_val.json                                       {"data": {"dialogs", "questions", "answers"}}
    VisualDialog_val2018/VisualDialog_val2018_<12 digits>.jpg  the pictures

A dialog has ``image_id`` and ``dialog``, a list of rounds whose ``question`` and ``answer`` are numbers of texts.
"""

from __future__ import annotations

from quarterlight.data.benchmarks.builder import TaskBuilder
from quarterlight.data.benchmarks.gallery import Gallery
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.benchmarks.tables import Place, read_json
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError


def load(source: Source) -> RetrievalTask:
    """Whole dialogs as queries, "Q: ...? A: ...." a round.  Options: ``file``.  Missing pictures are listed.

    Raises DatasetError for a file that breaks the layout.
    """
    path = source.folder / source.option("file", "visdial_1.0_val.json")
    saved = read_json(path)
    data = saved.get("data") if isinstance(saved, dict) else None
    if not isinstance(data, dict) or not {"dialogs", "questions", "answers"} <= data.keys():
        raise DatasetError(f"{path} must have 'data' with 'dialogs', 'questions' and 'answers'.")
    gallery = Gallery([source.folder / "VisualDialog_val2018", source.folder / "images", source.folder])
    builder = TaskBuilder(source)
    for number, dialog in enumerate(data["dialogs"], 1):
        place = Place(path, number)
        try:
            rounds = (
                f"Q: {data['questions'][one['question']]}? A: {data['answers'][one['answer']]}."
                for one in dialog["dialog"]
            )
            text, name = " ".join(rounds), f"{dialog['image_id']!s:0>12}"
        except (KeyError, IndexError, TypeError) as error:
            place.fail(f"expected image_id and rounds of a question and an answer, got {dialog!r:.60} ({error!r})")
        try:
            did = builder.share(builder.item("", gallery.find(f"VisualDialog_val2018_{name}.jpg")))
        except DatasetError as error:
            builder.lost_query(name, f"{place}: {error}")
            continue
        builder.query(place, name, builder.item(text), [did])
    return builder.build()
