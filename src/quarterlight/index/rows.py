"""What one vector stands for, and how it is written in a table.

A file is known by its ``file://`` URI, in which every byte outside of ``A-Za-z0-9_.~-/`` is written ``%XX``.  So names
in any encoding or none, with quotes or line breaks, are kept to the byte, sort as plain ASCII and need no quoting.

An item of a list, which has an id of its own, adds ``#``, its id, ``#`` and a hash of the list to the URI of its
picture, or of the list if it has none: it stands for itself, not for the file, and does not go when the folder of the
file is indexed again.  It goes when its list no longer has it, or has it with another picture.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args
from urllib.parse import quote_from_bytes, unquote_to_bytes

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from quarterlight.index.precision import VectorPrecision, to_columns, vector_fields

Kind: TypeAlias = Literal["image", "page", "text"]
"""What was indexed: a picture, a page of a PDF, or a section of a text."""

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that can be found: a picture, a page or a section.

    uri: its file, see :func:`uri_of`.
    part: which page or section of the file, from 1; 0 for a picture.
    size, mtime_ns, content_hash: bytes, time of change (ns) and SHA-256 of the file when it was read.
    width, height: pixels of a picture as stored and upright, points (1/72 inch) of a page, 0 for text.
    thumbnail: a WebP picture of at most 32 KB; empty for text.
    text: the words of a section, or the text layer of a page.
    title: the headings above a section, the title of a PDF, or the id of an item of a list.
    problems: sentences on parts of the same file that could not be read; the same in all rows of the file.
    """

    uri: str
    kind: Kind
    part: int
    size: int
    mtime_ns: int
    content_hash: str
    width: int = 0
    height: int = 0
    thumbnail: bytes = b""
    text: str = ""
    title: str = ""
    problems: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """32 hex digits that name the place: a later version of the same page of the same file has the same id."""
        return hashlib.sha256(f"{self.uri}#{self.part}".encode()).hexdigest()[:32]

    @property
    def content_key(self) -> str:
        """Names what is shown, wherever it is: the same page of copies of a file has the same one."""
        return content_key(self.content_hash, self.part)


_FIELDS = tuple(Row.__dataclass_fields__)


def content_key(content_hash: str, part: int) -> str:
    """See :attr:`Row.content_key`."""
    return f"{content_hash}#{part}"


def schema(dimension: int, precision: VectorPrecision = "float32") -> pa.Schema:
    """The columns of a table of ``dimension``-wide vectors."""
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            *vector_fields(dimension, precision),
            pa.field("uri", pa.string(), nullable=False),
            pa.field("kind", pa.string(), nullable=False),
            pa.field("part", pa.int32(), nullable=False),
            pa.field("size", pa.int64(), nullable=False),
            pa.field("mtime_ns", pa.int64(), nullable=False),
            pa.field("content_hash", pa.string(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("thumbnail", pa.binary(), nullable=False),
            pa.field("text", pa.string(), nullable=False),
            pa.field("title", pa.string(), nullable=False),
            pa.field("problems", pa.list_(pa.string()), nullable=False),
        ]
    )


def to_table(
    rows: Sequence[Row], vector_ND: npt.NDArray[np.float32], precision: VectorPrecision = "float32"
) -> pa.Table:
    """``rows`` and their vectors, one to one, as columns."""
    assert len(rows) == len(vector_ND)
    columns: dict[str, Any] = {name: [getattr(row, name) for row in rows] for name in ("id", *_FIELDS)}
    columns |= to_columns(vector_ND, precision)
    return pa.table(columns, schema=schema(vector_ND.shape[1], precision))


def from_record(record: dict[str, Any]) -> Row:
    """The row that a record of a table (any superset of the columns of :class:`Row`) describes."""
    values = {name: record[name] for name in _FIELDS}
    return Row(**values | {"problems": tuple(record["problems"])})


def uri_of(path: str | os.PathLike[str]) -> str:
    """The URI of a file or folder, made absolute but not resolved: a symbolic link stays one.

    >>> uri_of("/tmp/it's 5%.png")
    'file:///tmp/it%27s%205%25.png'
    """
    return "file://" + quote_from_bytes(os.fsencode(os.path.abspath(path)), safe="/")  # noqa: PTH100 resolves nothing


def uri_of_item(path: str | os.PathLike[str], id: str, listed_in: str | os.PathLike[str]) -> str:
    """The URI of an item that shows a file, or stands in one.

    >>> uri_of_item("/tmp/a.png", "shoe 7#b", listed_in="/tmp/list.jsonl")
    'file:///tmp/a.png#shoe%207%23b#d5bc58ce3772d130'
    """
    return f"{uri_of(path)}#{quote_from_bytes(id.encode('utf-8', 'surrogatepass'), safe='/')}#{list_key(listed_in)}"


def list_key(path: str | os.PathLike[str]) -> str:
    """16 hex digits that stand for a list of items."""
    return hashlib.sha256(uri_of(path).encode()).hexdigest()[:16]


def list_key_of(uri: str) -> str | None:
    """The list that an item stands in, see :func:`list_key`; ``None`` for a file."""
    return uri.rpartition("#")[2] if is_item(uri) else None


def is_item(uri: str) -> bool:
    """Whether it names an item of a list rather than a file."""
    return "#" in uri


def path_of(uri: str) -> Path:
    """The inverse of :func:`uri_of` and :func:`uri_of_item`: of an item the file that it shows, or stands in."""
    return Path(os.fsdecode(unquote_to_bytes(uri.removeprefix("file://").partition("#")[0])))
