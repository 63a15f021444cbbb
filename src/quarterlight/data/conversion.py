"""The usual layouts of instruction data, captions, boxes and class labels to conversations, without duplicates.

llava        {"id", "image": path or list, "conversations": [{"from": "human" or "gpt", "value"}]}
sharegpt     the same with "images", or with "conversation": [{"human": ..., "assistant": ...}]
messages     {"messages": [{"role", "content"}], "images"}; a content may be a list of text and image parts
grounding    {"image", "objects": [{"phrase", "box": [x1, y1, x2, y2] or a list of these}], "width", "height"}
instruction  {"instruction", "input", "output"} (COIG-CQIA), or {"input", "target"} (firefly); no pictures
labels       {"image", "label"}; or a folder with a folder of pictures for each class
retrieval    a retrieval dataset, whose tasks i2t and it2t become questions and answers
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from quarterlight.data.conversations import IMAGE, QUESTION, Conversation, from_task, parse_conversation
from quarterlight.data.pictures import PictureFolder
from quarterlight.data.retrieval import RetrievalDataset
from quarterlight.errors import DatasetError, ImageError, InputError
from quarterlight.files import replacing
from quarterlight.images import content_hash, image_size
from quarterlight.records import ArchiveMember, ImageSource

Row: TypeAlias = "dict[str, Any]"
Boxes: TypeAlias = Literal["xyxy", "xywh"]
"""How a box is written, in pixels: two corners, or a corner, width and height (COCO)."""

GROUNDING_QUESTION = (
    "Please provide the bounding box coordinate of the region this sentence describes: <ref>{phrase}</ref>"
)
"""What InternVL is asked for a box."""

LABEL_QUESTION = "What is in the picture? Answer with a word or a short phrase."
"""What is asked for a class label; ours, since the paper does not say."""

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif")
"""Of the files that count as pictures in a folder of classes."""

_ROLES = MappingProxyType(
    {
        "system": "system",
        "user": "user",
        "human": "user",
        "assistant": "assistant",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "model": "assistant",
        "bot": "assistant",
    }
)
_BOX_SCALE = 1000


@dataclass(kw_only=True)
class ConversionCounts:
    """What became of the rows of the input."""

    read: int = 0
    """rows"""
    written: int = 0
    """conversations"""
    mended: int = 0
    """among them, those that lost an answer at the beginning or a question at the end"""
    duplicates: int = 0
    """left out: the same words with the same pictures as one before"""
    problems: list[str] = field(default_factory=list)
    """a sentence for each row that could not be converted, with file and line"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the rows of an input are read.

    question: of classes, and of pictures in retrieval tasks.  boxes: of grounding.  split: of a retrieval dataset.
    """

    name: str
    question: str | None = None
    boxes: Boxes = "xyxy"
    split: str = "train"


def convert(
    source: Path,
    layout: Layout,
    out: Path,
    *,
    images: Path | None = None,
    dedupe: bool = True,
    on_row: Callable[[], None] = lambda: None,
) -> ConversionCounts:
    """Writes the conversations of ``source`` to ``out``; rows that cannot be converted are left out and told.

    images: the folder that pictures are named relative to; without it, the folder of ``source``.  Pictures stay where
        they are, so they must lie where a conversation file looks for them: below the folder of ``out``.
    dedupe: leaves out conversations whose words (apart from case, width and blanks) and pictures (byte for byte) are
        those of one before.
    Raises DatasetError when nothing is left, InputError for an unknown layout.
    """
    if layout.name not in LAYOUTS:
        raise InputError(f"There is no layout {layout.name!r}; known are {', '.join(LAYOUTS)}.")
    counts = ConversionCounts()
    places = _Places(images or (source if source.is_dir() else source.parent), PictureFolder(out.parent))
    seen: set[bytes] = set()
    try:
        with replacing(out) as draft, draft.open("w", encoding="utf-8") as lines:
            for where, row in LAYOUTS[layout.name](source, layout, places):
                on_row()
                counts.read += 1
                try:
                    if isinstance(row, DatasetError):
                        raise row
                    converted, mended = _standard(row, where, places)
                    if dedupe and _repeats(converted, places, seen):
                        counts.duplicates += 1
                        continue
                except (DatasetError, ImageError) as error:
                    counts.problems.append(f"{where}: {str(error).rstrip('.')}.")
                    continue
                lines.write(json.dumps(converted, ensure_ascii=False) + "\n")
                counts.written += 1
                counts.mended += mended
            if not counts.written:
                first = f" The first problem: {counts.problems[0]}" if counts.problems else ""
                raise DatasetError(f"{source} has no row that makes a conversation in the layout {layout.name}.{first}")
    except OSError as error:
        raise DatasetError(f"{out} cannot be written ({error.strerror or error}).") from error
    return counts


class _Places:
    """Paths of the input to paths of the output and to pictures."""

    def __init__(self, images: Path, target: PictureFolder) -> None:
        self.images = images
        self.target = target

    def relative(self, path: str) -> str:
        """A path of the input as the output names it.  Raises DatasetError if the output could not reach it."""
        if self.target.archive is not None:
            self.target.source(path)
            return path
        # by their spelling: a link below the folder may well lead out of it
        root = self.target.root.absolute()
        relative = Path(os.path.relpath(self.images / path, root))
        if relative.parts[0] == os.pardir:
            raise DatasetError(
                f"the picture {path!r} of {self.images} does not lie below {root}, where a file of conversations "
                "written there looks for it"
            )
        return relative.as_posix()

    def source(self, path: str) -> ImageSource:
        """The picture of a path of the input."""
        return ArchiveMember(self.target.archive, path) if self.target.archive else str(self.images / path)


def _standard(row: Row, where: str, places: _Places) -> tuple[Row, bool]:
    """The row in our format, and whether it had to be mended.  Raises DatasetError."""
    messages = list(row["messages"])
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    system = [one for one in system if one["content"].strip()]
    count = len(turns)
    while turns and turns[0]["role"] == "assistant":
        del turns[0]
    while turns and turns[-1]["role"] == "user":
        del turns[-1]
    images = row["images"]
    said = [one for one in turns if one["role"] == "user"]
    if images and said and not any(IMAGE in one["content"] for one in said):
        turns[0] = turns[0] | {"content": f"{IMAGE}\n" * len(images) + turns[0]["content"]}
    result: Row = {"messages": system + turns, "images": [places.relative(path) for path in images]}
    if row.get("id") is not None:
        result = {"id": str(row["id"]), **result}
    parse_conversation(result, name=where)
    if not images:
        del result["images"]
    return result, len(turns) < count


def _repeats(row: Row, places: _Places, seen: set[bytes]) -> bool:
    """Whether the row was seen before, which it is from now on.  Raises ImageError for a picture that is not there."""
    digest = hashlib.sha256()
    for message in row["messages"]:
        digest.update(f"{message['role']}\0{normalised(message['content'])}\0".encode(errors="surrogatepass"))
    for path in row.get("images", ()):
        digest.update(content_hash(places.target.source(path)).encode())
    key = digest.digest()[:16]
    if key in seen:
        return True
    seen.add(key)
    return False


def normalised(text: str) -> str:
    """The text without differences of case, width and blanks.

    >>> normalised(" An  Apple\\n") == normalised("an apple")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


_Rows: TypeAlias = "Iterator[tuple[str, Row | DatasetError]]"


def _read(source: Path) -> Iterator[tuple[str, Any]]:
    """File and line (or place in a list) of each row, and the row.  Raises DatasetError for a file that is no JSON."""
    name = source.name.removesuffix(".gz")
    try:
        with gzip.open(source, "rb") if source.suffix == ".gz" else source.open("rb") as lines:
            if not name.endswith(".jsonl"):
                rows = json.loads(lines.read())
                if not isinstance(rows, list):
                    raise DatasetError(f"{source} must be a JSON list of rows, or be named .jsonl and have one a line.")
                for number, row in enumerate(rows, 1):
                    yield f"{source}, row {number}", row
                return
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    try:
                        yield f"{source}, line {number}", json.loads(line)
                    except ValueError as error:
                        bad = DatasetError(f"not a line of JSON in UTF-8 ({error})")
                        yield f"{source}, line {number}", bad
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{source} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    except ValueError as error:
        raise DatasetError(f"{source} is not valid JSON ({error}).") from error


def _each(source: Path, build: Callable[[Row], Row]) -> _Rows:
    """The rows of a file, built into ``id``, ``messages`` and ``images``."""
    for where, row in _read(source):
        if isinstance(row, DatasetError):
            yield where, row
        elif not isinstance(row, dict):
            yield where, DatasetError(f"a row must be a JSON object, got {type(row).__name__}")
        else:
            try:
                yield where, build(row)
            except DatasetError as error:
                yield where, error


def _shared(source: Path, layout: Layout, places: _Places) -> _Rows:
    """Both layouts of which LLaVA's is the older."""

    def build(row: Row) -> Row:
        turns = row.get("conversations", row.get("conversation"))
        if not isinstance(turns, list):
            raise DatasetError("the row has no list of conversations")
        messages: list[Row] = []
        for turn in turns:
            if isinstance(turn, Mapping) and "from" in turn:
                messages.append(_message(turn["from"], turn.get("value")))
            elif isinstance(turn, Mapping) and {"human", "assistant"} <= turn.keys():
                messages += [_message("human", turn["human"]), _message("assistant", turn["assistant"])]
            else:
                raise DatasetError(f"a turn must have 'from' and 'value', or 'human' and 'assistant', got {turn!r:.60}")
        if isinstance(row.get("system"), str):
            messages.insert(0, _message("system", row["system"]))
        return {"id": row.get("id"), "messages": messages, "images": _paths(row.get("images", row.get("image")))}

    return _each(source, build)


def _messages(source: Path, layout: Layout, places: _Places) -> _Rows:
    """Messages in which pictures may be parts of the content."""

    def build(row: Row) -> Row:
        if not isinstance(row.get("messages"), list):
            raise DatasetError("the row has no list of messages")
        messages, images = [], _paths(row.get("images", row.get("image")))
        for one in row["messages"]:
            if not isinstance(one, Mapping):
                raise DatasetError(f"a message must be a JSON object, got {one!r:.60}")
            content = one.get("content")
            if isinstance(content, list):
                content = "\n".join(_part(part, images) for part in content)
            messages.append(_message(one.get("role"), content))
        return {"id": row.get("id"), "messages": messages, "images": images}

    return _each(source, build)


def _instruction(source: Path, layout: Layout, places: _Places) -> _Rows:
    """A task in words, what it is about if anything, and its answer."""

    def build(row: Row) -> Row:
        answer = row.get("output", row.get("target"))
        parts = [row.get(key) or "" for key in ("instruction", "input")]
        if not isinstance(answer, str) or not all(isinstance(part, str) for part in parts):
            raise DatasetError("the row must have an instruction or an input, and an output or a target, in words")
        asked = "\n".join(part.strip() for part in parts if part.strip())
        return {"id": row.get("id"), "messages": [_message("user", asked), _message("assistant", answer)], "images": []}

    return _each(source, build)


def _part(part: Any, images: list[str]) -> str:
    """One part of a content as text; the path of a picture is added to ``images``."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("image", "image_url"):
        path = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key)), None)
        images += _paths(path.get("url") if isinstance(path, Mapping) else path)
        return IMAGE
    raise DatasetError(f"a part of a content must be a text or an image, got {part!r:.60}")


def _grounding(source: Path, layout: Layout, places: _Places) -> _Rows:
    """A turn for each phrase, answered with its boxes as InternVL writes them, in thousandths of the picture."""

    def build(row: Row) -> Row:
        paths, objects = _paths(row.get("image")), row.get("objects")
        if len(paths) != 1 or not isinstance(objects, list) or not objects:
            raise DatasetError("the row must have one image and a list of objects")
        width, height = row.get("width"), row.get("height")
        if width is None or height is None:
            width, height = image_size(places.source(paths[0]))
        messages: list[Row] = []
        for one in objects:
            phrase, boxes = (one.get("phrase"), one.get("box")) if isinstance(one, Mapping) else (None, None)
            if not isinstance(phrase, str) or not phrase.strip() or not isinstance(boxes, list) or not boxes:
                raise DatasetError(f"an object must have a phrase and a box, got {one!r:.60}")
            several = boxes if isinstance(boxes[0], list) else [boxes]
            places_1000 = [_thousandths(box, width, height, layout.boxes) for box in several]
            phrase = phrase.strip()
            messages.append(_message("user", GROUNDING_QUESTION.format(phrase=phrase)))
            messages.append(_message("assistant", f"<ref>{phrase}</ref><box>{places_1000}</box>"))
        return {"id": row.get("id"), "messages": messages, "images": paths}

    def told(row: Row) -> Row:
        try:
            return build(row)
        except ImageError as error:
            raise DatasetError(str(error).rstrip(".")) from error

    return _each(source, told)


def _thousandths(box: Any, width: Any, height: Any, boxes: Boxes) -> list[int]:
    """x1, y1, x2, y2 in thousandths of the picture's sides."""
    numbers = [box, width, height] if not isinstance(box, list) else [*box, width, height]
    if len(numbers) != 6 or not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in numbers):
        raise DatasetError(f"a box must be four numbers and the picture have a width and height, got {box!r:.60}")
    if width <= 0 or height <= 0:
        raise DatasetError(f"a picture of {width} x {height} pixels has no place for a box")
    x1, y1, x2, y2 = map(float, box)
    if boxes == "xywh":
        x2, y2 = x1 + x2, y1 + y2
    slack = 1.0  # annotators' boxes often end a pixel outside
    if not (-slack <= x1 < x2 <= width + slack and -slack <= y1 < y2 <= height + slack):
        raise DatasetError(
            f"the box {box} is empty or leaves the picture of {width} x {height} pixels (boxes are read as {boxes})"
        )
    scaled = (x1 / width, y1 / height, x2 / width, y2 / height)
    return [round(_BOX_SCALE * min(max(one, 0.0), 1.0)) for one in scaled]


def _labels(source: Path, layout: Layout, places: _Places) -> _Rows:
    """A class label as the answer to a question."""
    question = layout.question or LABEL_QUESTION

    def build(row: Row) -> Row:
        label, paths = row.get("label"), _paths(row.get("image"))
        if not paths or not isinstance(label, str) or not label.strip():
            raise DatasetError(f"the row must have an image and a label in words, got {label!r:.60}")
        messages = [_message("user", question), _message("assistant", label.replace("_", " ").strip())]
        return {"id": row.get("id"), "messages": messages, "images": paths}

    if not source.is_dir():
        yield from _each(source, build)
        return
    for folder in sorted(one for one in source.iterdir() if one.is_dir()):
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in PICTURE_ENDINGS:
                path = os.path.relpath(file, places.images)
                yield str(file), build({"id": None, "image": path, "label": folder.name})


def _retrieval(source: Path, layout: Layout, places: _Places) -> _Rows:
    """Rows of the tasks whose queries show a picture and whose answers are words."""
    dataset = RetrievalDataset(source)
    tasks = [task for task in dataset.tasks(layout.split) if task in ("i2t", "it2t")]
    if not tasks:
        raise DatasetError(f"{source} has no task i2t or it2t with a split {layout.split!r}.")
    for name in tasks:
        conversations = from_task(dataset.load(name, layout.split), question=layout.question or QUESTION)
        for index in range(len(conversations)):
            one: Conversation = conversations[index]
            paths = [
                source.member if isinstance(source, ArchiveMember) else os.path.relpath(str(source), places.images)
                for source in one.images
            ]
            messages = [message._asdict() for message in one.messages]
            yield f"{conversations.label}, {one.id}", {"id": one.id, "messages": messages, "images": paths}


def _message(role: Any, content: Any) -> Row:
    if not isinstance(content, str) or str(role).lower() not in _ROLES:
        raise DatasetError(f"a turn must have a known speaker ({', '.join(_ROLES)}) and words, got {role!r:.30}")
    return {"role": _ROLES[str(role).lower()], "content": content}


def _paths(images: Any) -> list[str]:
    """Paths of one picture, several, or none."""
    several = images if isinstance(images, list) else [] if images in (None, "") else [images]
    paths: list[str] = []
    for one in several:
        path = one.get("path") if isinstance(one, Mapping) else one
        if not isinstance(path, str) or not path or path.startswith(("http://", "https://", "data:")):
            raise DatasetError(f"a picture must be the path of a file, got {path!r:.60}")
        paths.append(path)
    return paths


LAYOUTS: Mapping[str, Callable[[Path, Layout, _Places], _Rows]] = MappingProxyType(
    {
        "llava": _shared,
        "sharegpt": _shared,
        "messages": _messages,
        "instruction": _instruction,
        "grounding": _grounding,
        "labels": _labels,
        "retrieval": _retrieval,
    }
)
"""Name -> what reads it."""
