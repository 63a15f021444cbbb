"""Lists of items: a JSONL file whose lines are ``{"id": ..., "text": ..., "image": ..., ...}``.

id, the only field that must be there, is a string or a number and names the item in all lists of a run; text and image
(one file or several, relative to the list), instruction and max_tiles are those of :class:`quarterlight.records.Item`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from quarterlight.errors import InputError, did_you_mean
from quarterlight.images import content_hash, describe
from quarterlight.index import Row
from quarterlight.index.rows import uri_of, uri_of_item
from quarterlight.records import Item
from quarterlight.search.documents import clean, read_picture, reason_of
from quarterlight.search.encoder import Pictures

SUFFIX = ".jsonl"

LINES_PER_PIECE = range(10, 201)
"""How many lines stand together, and are embedded anew when one of them has changed; about 50 on average."""

_LAST_IN = 40  # one line in so many ends a piece that is long enough; another number would cut known lists otherwise

_FIELDS = ("id", "text", "image", "instruction", "max_tiles")


class Lines(NamedTuple):
    """Some lines of a list: the number of the first, from 1; where they begin in the file, and their size, in bytes;
    how many; the numbers of those whose id an earlier line has; and a hash of the lines and of the state of their
    pictures, behind the URI of the list.

    The hash does not change where lines before these come or go, unless some are spoken of by their numbers: those
    that have no id, or that of an earlier line."""

    first: int
    start: int
    size: int
    number: int
    repeated: tuple[int, ...]
    key: str


class ListedItem(NamedTuple):
    """An item of a list, its pictures decoded as the model gets them."""

    id: str
    row: Row
    item: Item


class BrokenLine(NamedTuple):
    """A line that is no item, or whose pictures cannot be read; the reason begins with its id, or with its number."""

    reason: str


def split_list(path: str, seen: set[bytes]) -> Iterator[Lines]:
    """The list in pieces of :data:`LINES_PER_PIECE` lines.

    What a line holds, not where it stands, decides whether a piece ends with it (content-defined chunking;
    Muthitacharoen, Chen and Mazieres, SOSP 2001): behind lines that come or go the list is soon cut as before.
    seen: hashes of the ids that stand in other lists; those of this one are added.
    Raises InputError when it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            first, start = 1, 0
            while True:
                digest = hashlib.blake2b(digest_size=16)
                size = number = 0
                repeated: list[int] = []
                is_nameless = is_named = is_last = False
                while not is_last and (line := file.readline()):
                    id, files = _id_and_files(path, line)
                    if id is None:
                        is_nameless = is_nameless or bool(line.strip())  # of an empty line nobody speaks
                    else:
                        is_named = True
                        # a list may have more ids than the memory should hold
                        name = hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                        if name in seen:
                            repeated.append(first + number)
                        seen.add(name)
                    digest.update(line)
                    for one in files:
                        digest.update(_state(one))
                    size += len(line)
                    number += 1
                    is_last = number == LINES_PER_PIECE[-1] or (number >= LINES_PER_PIECE[0] and _ends_piece(line))
                if not number:
                    return
                if is_nameless or repeated or not is_named:  # one piece of empty lines is as good as another
                    digest.update(f"{first} {repeated}".encode())
                yield Lines(first, start, size, number, tuple(repeated), f"{uri_of(path)} {digest.hexdigest()}")
                first, start = first + number, start + size
    except OSError as error:
        raise InputError(f"{describe(path)} cannot be read: {error.strerror}.") from error


def read_items(path: str, lines: Lines, pictures: Pictures) -> Iterator[ListedItem | BrokenLine]:
    """The items in some lines of a list; empty lines are passed over.  Raises InputError when it cannot be read.

    pictures: the model's.
    """
    try:
        with Path(path).open("rb") as file:
            file.seek(lines.start)
            content = file.read(lines.size)
    except OSError as error:
        raise InputError(f"{describe(path)} cannot be read: {error.strerror}.") from error
    for number, line in enumerate(content.split(b"\n")[: lines.number], start=lines.first):
        if line.strip():
            name, _ = _id_and_files(path, line)
            place = f"line {number}" if name is None else f"id {describe(name)}"
            try:
                if number in lines.repeated:
                    place = f"line {number}, {place}"
                    raise InputError("is left out: an earlier line has the same id.")
                id, item = parse_item(line)
                yield _read(path, id, item, pictures)
            except Exception as error:  # a damaged picture trips its decoder in any way; one line must not end the job
                yield BrokenLine(f"{place}: {reason_of(error, path)}")


def parse_item(line: bytes) -> tuple[str, Item]:
    """Id and item of a line; nothing is read yet.  Raises InputError."""
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise InputError(f"is not JSON: {error}.") from error
    if not isinstance(record, dict):
        raise InputError(f'is no item: expected {{"id": ..., "text": ..., "image": ...}}, got {type(record).__name__}.')
    for key in record:
        if key not in _FIELDS:
            raise InputError(f"has no field {key!r}. {did_you_mean(key, _FIELDS)}")
    id = _id_in(record)
    if id is None:
        raise InputError(f"has no id: expected a string or a whole number, got {record.get('id')!r}.")
    record.pop("id")
    item = Item.parse(record)
    if any(not isinstance(one, str) for one in item.images):
        raise InputError("has an image that is no file name.")
    if not item.images and not (item.text or "").strip():
        raise InputError("is empty: give it text, an image, or both.")
    return id, item


def _id_in(record: Mapping[str, Any]) -> str | None:
    id = record.get("id")
    return None if isinstance(id, bool) or not isinstance(id, (str, int)) else str(id) or None


def _id_and_files(path: str, line: bytes) -> tuple[str | None, list[str]]:
    """The id of a line, if it has one, and the files of its pictures."""
    try:
        record = json.loads(line)
    except ValueError:
        return None, []
    if not isinstance(record, dict):
        return None, []
    image = record.get("image")
    names = image if isinstance(image, list) else [image]
    return _id_in(record), [_file(path, one) for one in names if isinstance(one, str)]


def _ends_piece(line: bytes) -> bool:
    return int.from_bytes(hashlib.blake2b(line, digest_size=4).digest()) % _LAST_IN == 0


def _file(path: str, name: str) -> str:
    """A picture that a list names."""
    return str(Path(path).parent / name)


def _state(file: str) -> bytes:
    """Changes when the file does, comes or goes, or becomes readable."""
    try:
        status = Path(file).stat()
    except (OSError, ValueError):  # the latter for names that no file can have
        return b"missing\n"
    return f"{status.st_size} {status.st_mtime_ns} {os.access(file, os.R_OK)}\n".encode()


def _read(path: str, id: str, item: Item, pictures: Pictures) -> ListedItem:
    """Raises ImageError, naming the picture, for one that cannot be read."""
    text = clean(item.text or "")
    if not item.images:
        file = path
        row = Row(uri=uri_of_item(path, id, path), kind="text", part=0, size=0, mtime_ns=0, content_hash="")
        row = replace(row, size=len(text.encode()), content_hash=hashlib.sha256(text.encode()).hexdigest())
    else:
        files = [_file(path, str(one)) for one in item.images]
        file = files[0]
        first = read_picture(file, item.max_tiles, pictures)
        others = [pictures.fit(pictures.read(one, item.max_tiles), item.max_tiles) for one in files[1:]]
        row = Row(
            uri=uri_of_item(file, id, path),
            kind="image",
            part=0,
            size=Path(file).stat().st_size,
            mtime_ns=0,
            content_hash=content_hash(file),
            width=first.width,
            height=first.height,
            thumbnail=first.thumbnail,
        )
        item = replace(item, image=[first.image, *others])
    return ListedItem(id, replace(row, mtime_ns=Path(file).stat().st_mtime_ns, text=text, title=id), item)
