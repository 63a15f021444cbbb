"""Captions that find their picture.

*.json                  a list of {image, caption}: BLIP's bootstrapped pairs once their pictures are fetched (as
                        published they have a url); LLaVA's metadata.json of CC3M has these two columns too
train_anno.json         of U-MARVEL: number -> {h5v: path, instruct_ans: [caption], ...}
<class>/<picture>       folders of classes: each picture finds the next one of its class (how ImageNet-1K's pairs
                        were made for Magic-MM-Embedding is not said)
"""

from __future__ import annotations

from quarterlight.data.benchmarks.tables import Place, read_rows
from quarterlight.data.conversion import PICTURE_ENDINGS
from quarterlight.data.corpora.example import Corpus, Example, Examples, Part, placed
from quarterlight.errors import DatasetError


def read(corpus: Corpus) -> Examples:
    """Pictures with a caption each, in either direction.  Options: ``image``, ``caption``, the names of the columns."""
    gallery = corpus.gallery()
    image, caption = (corpus.options.get(name, name) for name in ("image", "caption"))
    for place, row in read_rows(corpus.path, ()):
        try:
            if image not in row or caption not in row:
                hint = ": fetch the picture of its url first" if "url" in row else ""
                place.fail(f"the row must have {image!r} and {caption!r}{hint}")
            words = row[caption] if not isinstance(row[caption], list) else " ".join(map(str, row[caption]))
            if not isinstance(words, str):
                place.fail(f"{caption} must be a string, got {words!r:.60}")
            text, picture = Part(words.strip()), Part("", (gallery.find(place.text(row, image)),))
        except DatasetError as error:
            yield placed(place, error)
            continue
        yield Example(place, picture, (text,)) if corpus.task == "i2t" else Example(place, text, (picture,))


def read_cc3m(corpus: Corpus) -> Examples:
    """U-MARVEL's file of CC3M, or LLaVA's: a list is read as the latter."""
    path = corpus.path
    if path.is_dir():
        path = path / ("train_anno.json" if (path / "train_anno.json").is_file() else "metadata.json")
    with path.open("rb") as stream:
        theirs = stream.read(64).lstrip().startswith(b"{")
    names = {"image": "h5v", "caption": "instruct_ans"} if theirs else {}
    options = names | dict(corpus.options)
    yield from read(Corpus(path=path, task=corpus.task, images=corpus.images or path.parent, options=options))


def read_classes(corpus: Corpus) -> Examples:
    """Pairs of pictures of one class, in a ring; a class of one picture has none."""
    gallery = corpus.gallery()
    for folder in sorted(one for one in corpus.path.iterdir() if one.is_dir()):
        names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in PICTURE_ENDINGS)
        if len(names) < 2:
            yield DatasetError(f"{folder}: expected at least two pictures of a class, got {len(names)}.")
            continue
        for number, name in enumerate(names):
            pair = (gallery.find(f"{folder.name}/{one}") for one in (name, names[(number + 1) % len(names)]))
            first, second = (Part("", (picture,)) for picture in pair)
            yield Example(Place(folder, number + 1), first, (second,))
