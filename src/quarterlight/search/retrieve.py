"""From a query to the pictures, pages and sections that are nearest to it, the first of them ordered by a reranker.

K candidates of the reranker.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from quarterlight.errors import InputError
from quarterlight.images import describe
from quarterlight.index import IndexStore, Kind, Row, VisualTokenStore
from quarterlight.index.rows import is_item, path_of
from quarterlight.index.store import Match
from quarterlight.metrics.fusion import RERANK, fuse
from quarterlight.prompts import QUERY_INSTRUCTIONS, query_instruction
from quarterlight.records import ArchiveMember, Item, ItemLike
from quarterlight.search.documents import TILES, read_again, section_item
from quarterlight.search.encoder import Encoder, Reranker, Tokens
from quarterlight.search.walk import Problem

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
    rerank_score: P(Yes) of the reranker in [0, 1]; ``None`` if it was not asked.
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
    rerank_score: float | None = None


class Searcher:
    """A model and the table it filled, and perhaps a reranker.

    reranker: orders the first hits of a search anew.  Visual tokens that the store has of its eyes spare it the files.
    rerank: how many hits it is given; ``None`` is :data:`RERANK` where there is a reranker, else 0.
    fusion_weight: of its score beside the cosine, see :func:`quarterlight.metrics.fusion.fuse`; ``None`` takes the
        reranker's setting for the direction of the search: from the query to the wanted kind, or to the one kind that
        all hits are that it is given; hits of several kinds have the weight that is of no direction.
    problems: of the last search: hits that could not be given to the reranker, or that changed since they were indexed.
    Raises InputError for a negative number, a weight outside [0, 1], and either of them without a reranker.
    """

    def __init__(
        self,
        store: IndexStore,
        encoder: Encoder,
        *,
        reranker: Reranker | None = None,
        rerank: int | None = None,
        fusion_weight: float | None = None,
    ) -> None:
        self.store = store
        self.encoder = encoder
        self.reranker = reranker
        self.rerank = RERANK if rerank is None and reranker is not None else rerank or 0
        self._check(self.rerank)
        if fusion_weight is not None and (reranker is None or not 0 <= fusion_weight <= 1):
            raise InputError(f"fusion_weight is from 0 to 1 and needs a reranker, got {fusion_weight}.")
        self.fusion_weight = fusion_weight
        self.problems: list[Problem] = []

    def search(
        self,
        query: ItemLike,
        *,
        kind: Kind | None = None,
        within: str | os.PathLike[str] | None = None,
        top_k: int = 10,
        rerank: int | None = None,
    ) -> list[Hit]:
        """The ``top_k`` hits nearest to the query, best first.

        With a reranker the first hits, also when they are more than ``top_k``, are ordered by what it says of them;
        those that it could not be given follow, see ``problems``, and then the rest.
        kind: only pictures, only pages or only sections of texts.
        within: only this file, or the files in this folder.
        rerank: how many hits the reranker is given, for this search; 0 is none.
        Raises InputError for a query without text and picture, and ImageError for a picture that cannot be read.
        """
        item = Item.parse(query)
        if not item.images and not (item.text or "").strip():
            raise InputError("The query is empty: give it words, a picture, or both.")
        if top_k < 1:
            raise InputError(f"top_k must be at least 1, got {top_k}.")
        num_reranked = self.rerank if rerank is None else rerank
        self._check(num_reranked)
        self.problems = []
        instruction = instruction_of(item.modality, kind)
        vector = self.encoder.encode_query([item], instruction=instruction)[0]
        matches = self.store.search(vector, top_k=max(top_k, num_reranked), kind=kind, within=within)
        hits = [_hit(match, item.text or "") for match in matches]
        if self.reranker is not None and num_reranked:
            rows = [match.row for match in matches[:num_reranked]]
            weight = self.fusion_weight
            if weight is None:
                weight = self.reranker.settings.weight_of(direction_of(item.modality, kind or _only_kind(rows)))
            first = self._reranked(self.reranker, weight, item, instruction, rows, hits[: len(rows)])
            hits = [*first, *hits[len(rows) :]]
        return hits[:top_k]

    def _check(self, rerank: int) -> None:
        if rerank < 0 or (rerank and self.reranker is None):
            raise InputError(
                f"rerank is 0 or the number of hits that a reranker is given, and needs one; got {rerank}."
            )

    def _reranked(
        self,
        reranker: Reranker,
        weight: float,
        query: Item,
        instruction: str,
        rows: Sequence[Row],
        hits: Sequence[Hit],
    ) -> list[Hit]:
        """The hits in their new order, with the reranker's scores."""
        folder = self.store.folder
        token_store = VisualTokenStore.find(folder, reranker.vision_hash) if VisualTokenStore.any_in(folder) else None
        stored = token_store.get({row.content_key for row in rows if row.kind != "text"}) if token_store else {}
        items: dict[int, Item] = {}
        for position, row in enumerate(rows):
            try:
                items[position] = self._candidate(reranker, row, row.content_key in stored)
            except InputError as error:
                path = path_of(row.uri)
                reason = str(error).removeprefix(describe(path)).strip().rstrip(".")
                self.problems.append(Problem(str(path), f"{reason}; it was not reranked"))
        given = list(items)
        tokens: list[Tokens] = [stored.get(rows[position].content_key) for position in given]
        score_K = reranker.score(query, list(items.values()), instruction=instruction, visual_tokens=tokens)
        fused_K = fuse(np.array([hits[position].score for position in given], np.float32), score_K, weight)
        order = np.argsort(-fused_K, kind="stable")
        scored = [replace(hits[given[n]], rerank_score=float(score_K[n])) for n in order]
        return [*scored, *(hit for position, hit in enumerate(hits) if position not in items)]

    def _candidate(self, reranker: Reranker, row: Row, has_tokens: bool) -> Item:
        """What was embedded, once more. Raises InputError when the file cannot be read."""
        if row.kind == "text":
            return Item(text=row.text) if is_item(row.uri) else section_item(row.title, row.text)
        words = row.text if is_item(row.uri) and row.text else None
        if has_tokens:  # nothing is read, so the picture is only a name
            return Item(image=ArchiveMember(row.content_hash, str(row.part)), text=words, max_tiles=TILES[row.kind])
        path = path_of(row.uri)
        item = replace(read_again(str(path), row.kind, row.part, reranker.pictures), text=words)
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{describe(path)} cannot be read: {error.strerror}.") from error
        if (status.st_size, status.st_mtime_ns) != (row.size, row.mtime_ns):
            self.problems.append(
                Problem(str(path), "has changed since it was indexed, and was reranked as it is now: index it again")
            )
        return item


def instruction_of(modality: str, kind: Kind | None) -> str:
    """What the model is told to look for, by modality of the query and wanted kind.

    Where the paper has no such direction (a picture in search of pages), or no kind is wanted: the one for pictures.
    """
    direction = direction_of(modality, kind)
    return query_instruction(direction if direction in QUERY_INSTRUCTIONS else None, modality)


def direction_of(modality: str, kind: Kind | None) -> str | None:
    """The task that a search is, such as ``t2i``; ``None`` where every kind is wanted.

    >>> direction_of("image,text", "page")
    'it2vd'
    """
    return f"{_QUERY_LETTERS[modality]}2{_TARGET_LETTERS[kind]}" if kind else None


def _only_kind(rows: Sequence[Row]) -> Kind | None:
    """The kind that all rows are; ``None`` of several and of no rows."""
    kinds = {row.kind for row in rows}
    return kinds.pop() if len(kinds) == 1 else None


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
