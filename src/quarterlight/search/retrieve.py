"""From a query to the pictures, pages and sections that are nearest to it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from quarterlight.errors import InputError
from quarterlight.index import IndexStore, Kind
from quarterlight.index.rows import path_of
from quarterlight.index.store import Match
from quarterlight.prompts import QUERY_INSTRUCTIONS, query_instruction
from quarterlight.records import Item, ItemLike
from quarterlight.search.encoder import Encoder

SNIPPET_CHARS = 200

_QUERY_LETTERS = {"text": "t", "image": "i", "image,text": "it"}
_TARGET_LETTERS: dict[Kind, str] = {"image": "i", "page": "vd", "text": "t"}


@dataclass(frozen=True, kw_only=True)
class Hit:
    """Something that was found.

    score: cosine of query and hit, 1 at best.
    page: number from 1, for pages only; section: number from 1, for texts only.
    width, height: pixels of a picture, points of a page.
    title: headings above a section, or title of a PDF; snippet: the words around the query's, if there are words.
    thumbnail: WebP, empty for texts.
    """

    path: Path
    uri: str
    kind: Kind
    score: float
    page: int | None = None
    section: int | None = None
    width: int = 0
    height: int = 0
    title: str = ""
    snippet: str = ""
    thumbnail: bytes = b""


class Searcher:
    """A model and the table it filled."""

    def __init__(self, store: IndexStore, encoder: Encoder) -> None:
        self.store = store
        self.encoder = encoder

    def search(
        self,
        query: ItemLike,
        *,
        kind: Kind | None = None,
        within: str | os.PathLike[str] | None = None,
        top_k: int = 10,
    ) -> list[Hit]:
        """The ``top_k`` hits nearest to the query, best first.

        kind: only pictures, only pages or only sections of texts.
        within: only this file, or the files in this folder.
        Raises InputError for a query without text and picture, and ImageError for a picture that cannot be read.
        """
        item = Item.parse(query)
        if not item.images and not (item.text or "").strip():
            raise InputError("The query is empty: give it words, a picture, or both.")
        instruction = instruction_of(item.modality, kind)
        vector = self.encoder.encode_query([item], instruction=instruction)[0]
        matches = self.store.search(vector, top_k=top_k, kind=kind, within=within)
        return [_hit(match, item.text or "") for match in matches]


def instruction_of(modality: str, kind: Kind | None) -> str:
    """What the model is told to look for, by modality of the query and wanted kind.

    Where the paper has no such direction (a picture in search of pages), or no kind is wanted: the one for pictures.
    """
    direction = f"{_QUERY_LETTERS[modality]}2{_TARGET_LETTERS[kind]}" if kind else None
    return query_instruction(direction if direction in QUERY_INSTRUCTIONS else None, modality)


def snippet(text: str, query: str, *, max_chars: int = SNIPPET_CHARS) -> str:
    """One line of ``text`` around the first word that it shares with ``query``, else its beginning.

    >>> snippet("one two three four five six", "FOUR?", max_chars=12)
    '… three four …'
    """
    text = " ".join(text.split())
    if len(text) <= max_chars:
        return text
    words = [re.escape(word) for word in re.findall(r"\w{3,}", query)]
    shared = re.search(rf"\b(?:{'|'.join(words)})\b", text, re.IGNORECASE) if words else None
    start = max(0, shared.start() - max_chars // 2) if shared else 0
    start = text.find(" ", start - 1) + 1 if start else 0
    end = start + max_chars
    if end < len(text):
        blank = text.rfind(" ", start, end + 1)
        end = blank if blank > start else end
    return ("… " if start else "") + text[start:end].strip() + (" …" if end < len(text) else "")


def _hit(match: Match, query: str) -> Hit:
    row = match.row
    return Hit(
        path=path_of(row.uri),
        uri=row.uri,
        kind=row.kind,
        score=match.score,
        page=row.part if row.kind == "page" else None,
        section=row.part if row.kind == "text" else None,
        width=row.width,
        height=row.height,
        title=row.title,
        snippet=snippet(row.text, query),
        thumbnail=row.thumbnail,
    )
