"""Brings a table to the state of some folders.

Threads read files into a short queue, the calling thread embeds what comes out and writes whole files, so memory does
not grow with the corpus, and a process that is killed has either all rows of a file in the table or those of before.
The table then depends on the files alone, not on how often or when indexing was interrupted.

Where visual tokens are kept, those of a file are written before its rows, so that after a kill no new row lacks them;
tokens without a row are harmless, and removed at the end of the next run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from quarterlight.errors import InputError, StoreError
from quarterlight.images import content_hash, describe
from quarterlight.index import IndexStore, Precision, Row, VisualTokenStore
from quarterlight.index.rows import is_item, path_of, uri_of
from quarterlight.index.store import Picture, models_of
from quarterlight.records import Item
from quarterlight.search.documents import BrokenPart, Part, place_of, read_again, read_parts, reason_of
from quarterlight.search.embed import EmbedConfig, Engine, Group, cut, pieces_of, reasons_of, whole_shards
from quarterlight.search.encoder import Encoder, Eyes, Tokens, encode_each
from quarterlight.search.reading import ReadAhead
from quarterlight.search.walk import READERS, FoundFile, Problem, Walk, is_gone, walk

_ROWS_OF_A_COPY = 10  # a guess: the rows of a file that is a copy are fetched when they are written


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """How much is under way at a time."""

    num_readers: int = 2
    """threads that read and decode files"""
    batch_size: int = 32
    """parts embedded together; as many again wait in the queue"""
    rows_per_commit: int = 2000
    """rows kept in memory before they are written"""
    seconds_per_commit: float = 20.0
    """time after which fewer rows are written too: the most work that a kill can cost"""
    token_bytes_per_write: int = 64 * 2**20
    """visual tokens kept in memory before they are written, ahead of their rows; pages have up to megabytes of them"""


@dataclass(frozen=True, kw_only=True)
class TokenReport:
    """The visual tokens that are kept beside the rows.

    num_added, num_removed: pictures and pages in this run.  num_items, num_bytes: all there are, and what they take.
    """

    precision: Precision
    num_added: int
    num_removed: int
    num_items: int
    num_bytes: int


@dataclass(kw_only=True)
class IngestReport:
    """What happened to each file, and what could not be indexed.

    new, changed, moved, copied, unchanged, deleted: numbers of files; moved ones were known under another name or
        time, copied ones show what is also in another file that is still there.
    num_other: files of kinds that are not indexed.  num_rows: rows of the table afterwards.
    problems: one for each file, folder or page that is not in the index.
    stopped: why indexing ended early, e.g. a full disk; what was written before is in the index.
    visual_tokens: ``None`` where none are kept.
    """

    new: int = 0
    changed: int = 0
    moved: int = 0
    copied: int = 0
    unchanged: int = 0
    deleted: int = 0
    num_other: int = 0
    num_rows: int = 0
    seconds: float = 0.0
    problems: list[Problem] = field(default_factory=list)
    stopped: str | None = None
    visual_tokens: TokenReport | None = None


class _Encoded(NamedTuple):
    """What the model made of a part."""

    vector: npt.NDArray[np.float32]
    tokens: Tokens


@dataclass
class _Document:
    """A file on its way into the table."""

    file: FoundFile
    uri: str
    content_hash: str = ""
    copy_of: str | None = None  # URI of a file in the table that has the same content
    rows: list[Row] = field(default_factory=list)
    vectors: list[npt.NDArray[np.float32]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    failed: str | None = None

    def row(self, part: Part) -> Row:
        return part.row(self.file, self.content_hash)


def ingest(
    paths: Iterable[str | os.PathLike[str]],
    store: IndexStore,
    encoder: Encoder | None,
    *,
    engine: Engine | None = None,
    visual_tokens: Precision | None = None,
    config: IngestConfig | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> IngestReport:
    """Index files and folders: new and changed files are embedded, rows of deleted ones removed.

    A file whose size and time of change are known is taken as unchanged; else its content decides, and content that
    the table knows under another name is not embedded again.  After a normal end the rows below ``paths`` are those of
    the files that can be read, and of those that could not be looked at.
    engine: embeds instead of ``encoder``, with the same model; it makes no visual tokens, and does not know copies, so
        that a file under a new name is embedded again.
    visual_tokens: also keep what the encoder's eyes made of pictures and pages, in this precision, for a reranker with
        the same eyes; what is known already but has none is looked at again.  ``None`` keeps them where the store has
        some of these eyes, in the precision they have.
    on_progress: called with the numbers of files done and in all.
    Raises InputError when one of ``paths`` does not exist and the table knows nothing of it, or an engine should make
    visual tokens, StoreError when another process writes to the store.
    """
    assert (encoder is None) != (engine is None)
    started = time.monotonic()
    roots = list(paths)
    with store.writing():
        found = walk([root for root in roots if not (is_gone(root) and knows(store, root))], skip=store.folder)
        config = config or IngestConfig()
        token_store = _token_store(store, encoder, visual_tokens)
        tokens = _TokenWriter(token_store, config.token_bytes_per_write) if token_store else None
        run = _Run(store, encoder, config, found, tokens, on_progress)
        try:
            run.embed_and_write() if engine is None else run.embed_with(engine)
            run.fill_visual_tokens()
            run.delete_vanished(roots)
            store.optimize()
            if tokens is not None:
                tokens.clean(store)
        except StoreError as error:
            run.report.stopped = str(error)
        run.report.num_rows = store.count()
        if tokens is not None:
            run.report.visual_tokens = tokens.report()
    run.report.problems.sort()
    run.report.seconds = time.monotonic() - started
    return run.report


def knows(store: IndexStore, path: str | os.PathLike[str]) -> bool:
    """Whether the table has rows of this file, or of files in this folder, whether it is still there or not."""
    return any(not is_item(uri) for uri in store.files(within=path))


def _token_store(store: IndexStore, encoder: Encoder | None, precision: Precision | None) -> VisualTokenStore | None:
    """Where visual tokens are kept, if they are."""
    if encoder is None and (precision is not None or VisualTokenStore.any_in(store.folder)):
        raise InputError(
            f"The index in {describe(store.folder)} keeps visual tokens, which are not made on a cluster: index "
            "without --ray, or into another index with --store."
        )
    if precision is not None:
        return VisualTokenStore.create(store.folder, cast(Eyes, encoder).vision_hash, precision)
    if not VisualTokenStore.any_in(store.folder):
        return None
    return VisualTokenStore.find(store.folder, cast(Eyes, encoder).vision_hash)


class _TokenWriter:
    """Visual tokens on their way to the disk: each picture's once."""

    def __init__(self, store: VisualTokenStore, bytes_per_write: int) -> None:
        self.store = store
        self.bytes_per_write = bytes_per_write
        self.keys = store.keys()
        self.num_added = self.num_removed = 0
        self._waiting: dict[str, npt.NDArray[np.floating]] = {}
        self._num_bytes = 0

    def add(self, key: str, tokens: Tokens) -> None:
        if tokens is None or key in self.keys:
            return
        self.keys.add(key)
        self._waiting[key] = tokens
        self._num_bytes += tokens.nbytes
        if self._num_bytes >= self.bytes_per_write:
            self.flush()

    def flush(self) -> None:
        self.store.add(self._waiting)
        self.num_added += len(self._waiting)
        self._waiting, self._num_bytes = {}, 0

    def clean(self, store: IndexStore) -> None:
        """Removes what no row of any model refers to, and what is no longer in use."""
        tables = [IndexStore.open(store.folder, model) for model in models_of(store.folder)]
        keep = {one.key for table in tables for pictures in table.pictures().values() for one in pictures}
        self.num_removed = self.store.prune(keep)
        self.store.drop_others()
        self.store.optimize()

    def report(self) -> TokenReport:
        size = self.store.size()
        return TokenReport(
            precision=self.store.precision,
            num_added=self.num_added,
            num_removed=self.num_removed,
            num_items=size.num_items,
            num_bytes=size.num_bytes,
        )


class _Run:
    def __init__(
        self,
        store: IndexStore,
        encoder: Encoder | None,
        config: IngestConfig,
        found: Walk,
        tokens: _TokenWriter | None,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self.store, self.encoder, self.config, self.on_progress = store, encoder, config, on_progress
        self.tokens, self.found = tokens, found
        self.report = IngestReport(num_other=found.num_other, problems=found.problems)
        self.files = {uri_of(file.path): file for file in found.files}
        self.known = {uri: file for uri, file in store.files().items() if not is_item(uri)}
        self.fresh = {uri: file for uri, file in self.files.items() if not self._is_unchanged(uri, file)}
        self.origins = {
            (_reader_of(uri), file.content_hash): uri for uri, file in self.known.items() if uri not in self.fresh
        }
        self.num_done = 0
        self.failed: list[str] = []
        self.blind: set[str] = set()  # files that are unchanged, but whose visual tokens are missing
        if tokens is not None:
            self.blind = {uri for uri in self._missing_tokens() if uri not in self.fresh}
        self.ready: list[_Document] = []
        self.last_commit = time.monotonic()

    def embed_and_write(self) -> None:
        """Reads, embeds and writes what is not known yet.  What is complete is written even when stopped half-way."""
        self._pass_over_known()
        documents: list[_Document] = []
        parts: list[Part | None] = []
        # made one by one and dropped when written: they hold rows
        fresh = (_Document(file, uri) for uri, file in self.fresh.items())
        reading = ReadAhead(fresh, self._parts, num_threads=self.config.num_readers, num_waiting=self.config.batch_size)
        try:
            for document, part in reading:
                documents.append(document)
                parts.append(part)
                if len(parts) - parts.count(None) >= self.config.batch_size or len(parts) >= 1000:
                    self._embed(documents, parts)
                    documents, parts = [], []
            self._embed(documents, parts)
            self._commit()
        except BaseException:  # above all KeyboardInterrupt: the work done so far is worth keeping
            self._commit()
            raise
        finally:
            reading.stop()

    def embed_with(self, engine: Engine) -> None:
        """The same on a cluster, in shards, of which the whole ones are written when stopped half-way."""
        self._pass_over_known()
        config = EmbedConfig()
        try:
            for _, groups in whole_shards(cut(pieces_of(self.fresh.values()), config), engine, config):
                if groups is not None:
                    for document in _documents(groups):
                        self._finish(document)
        finally:
            self._commit()

    def _pass_over_known(self) -> None:
        for uri in self.files.keys() - self.fresh.keys():
            self._report_broken(self.files[uri].path, self.known[uri].problems)
            if uri not in self.blind:
                self._done("unchanged")

    def _parts(self, document: _Document) -> Iterator[tuple[_Document, Part | None]]:
        """A document with each of its parts, and with ``None`` at its end."""
        assert self.encoder is not None
        path = document.file.path
        try:
            document.content_hash = content_hash(path)
            document.copy_of = self._origin(document)
            if document.copy_of is None:
                for part in read_parts(document.file, self.encoder.pictures):
                    if isinstance(part, BrokenPart):
                        document.broken.append(part.reason)
                    else:
                        yield document, part
        except Exception as error:
            document.failed = reason_of(error, path)
        yield document, None

    def fill_visual_tokens(self) -> None:
        """Looks again at the pictures and pages of these files that have rows, but no visual tokens."""
        if self.tokens is None:
            return
        missing = self._missing_tokens()
        batch: list[tuple[str, Picture, Item]] = []
        try:
            for uri in sorted(missing):
                for picture, item in self._seen_again(self.files[uri].path, missing[uri]):
                    batch.append((uri, picture, item))
                    if len(batch) == self.config.batch_size:
                        self._keep_tokens(batch)
                        batch = []
                if uri in self.blind:
                    self._done("unchanged")
            self._keep_tokens(batch)
        finally:
            self.tokens.flush()
        for _ in self.blind.difference(missing):  # copies of what was looked at for the sake of another file
            self._done("unchanged")

    def _missing_tokens(self) -> dict[str, list[Picture]]:
        """The files of this run with pictures or pages that have a row, but no visual tokens; of copies only one."""
        assert self.tokens is not None
        missing: dict[str, list[Picture]] = {}
        asked = set(self.tokens.keys)
        for uri, pictures in self.store.pictures().items():
            if uri in self.files and uri not in self.failed:
                lacking = [picture for picture in pictures if picture.key not in asked]
                asked.update(picture.key for picture in lacking)
                if lacking:
                    missing[uri] = sorted(lacking)
        return missing

    def _seen_again(self, path: str, pictures: Sequence[Picture]) -> Iterator[tuple[Picture, Item]]:
        assert self.encoder is not None
        try:
            if content_hash(path) != pictures[0].content_hash:
                raise InputError("has changed meanwhile: index it again")
            for picture in pictures:
                yield picture, read_again(path, picture.kind, picture.part, self.encoder.pictures)
        except InputError as error:
            reason = str(error).removeprefix(describe(path)).strip().rstrip(".")
            self.report.problems.append(Problem(path, f"{reason}; its visual tokens are not stored"))

    def _keep_tokens(self, batch: Sequence[tuple[str, Picture, Item]]) -> None:
        assert self.tokens is not None
        for (uri, picture, _), encoded in zip(batch, self._encode([item for *_, item in batch]), strict=True):
            if isinstance(encoded, str):
                reason = f"is refused by the model: {encoded}; its visual tokens are not stored"
                self.report.problems.append(Problem(self.files[uri].path, reason))
            else:
                self.tokens.add(picture.key, encoded.tokens)

    def delete_vanished(self, roots: Sequence[str | os.PathLike[str]]) -> None:
        """Removes the rows of files below ``roots`` that are no longer there, or can no longer be read."""
        below = {uri for root in roots for uri in self.store.files(within=root) if not is_item(uri)}
        vanished = [uri for uri in below if uri not in self.files and not self.found.is_out_of_sight(path_of(uri))]
        self.store.delete(vanished)
        self.store.delete([uri for uri in self.failed if uri in below])
        self.report.deleted = len(vanished)

    def _is_unchanged(self, uri: str, file: FoundFile) -> bool:
        known = self.known.get(uri)
        return known is not None and (known.size, known.mtime_ns) == (file.size, file.mtime_ns)

    def _origin(self, document: _Document) -> str | None:
        """URI of a file with the same content whose rows stay as they are until the document's own are written."""
        known = self.known.get(document.uri)
        if known is not None and known.content_hash == document.content_hash:
            return document.uri
        return self.origins.get((document.file.reader, document.content_hash))

    def _embed(self, documents: Sequence[_Document], parts: Sequence[Part | None]) -> None:
        """Vectors for the parts; ``None`` in place of a part ends its document, which then goes to the writer."""
        encoded = iter(self._encode([part.item for part in parts if part is not None]))
        for document, part in zip(documents, parts, strict=True):
            if part is None:
                self._finish(document)
                continue
            one = next(encoded)
            if isinstance(one, str):
                document.broken.append(f"{place_of(part.kind, part.part)}is refused by the model: {one}")
            else:
                document.rows.append(document.row(part))
                document.vectors.append(one.vector)
                if self.tokens is not None:
                    self.tokens.add(document.rows[-1].content_key, one.tokens)

    def _encode(self, items: Sequence[Item]) -> Sequence[_Encoded | str]:
        """A vector for each item, with its visual tokens where these are kept, or why the model refuses it."""
        return encode_each(self._encode_all, items)

    def _encode_all(self, items: Sequence[Item]) -> Sequence[_Encoded]:
        assert self.encoder is not None
        if self.tokens is None:
            return [_Encoded(vector, None) for vector in self.encoder.encode_document(items)]
        vectors, tokens = cast(Eyes, self.encoder).encode_document_with_visual_tokens(items)
        return [_Encoded(*pair) for pair in zip(vectors, tokens, strict=True)]

    def _finish(self, document: _Document) -> None:
        path = document.file.path
        if document.failed is None and not document.rows and not document.copy_of:
            document.failed = "; ".join(document.broken) or "holds nothing to index"
        elif document.broken:
            document.rows = [replace(row, problems=tuple(document.broken)) for row in document.rows]
        if document.failed is not None:
            self.report.problems.append(Problem(path, document.failed))
            self.failed.append(document.uri)
            self._done(None)
            return
        self._report_broken(path, document.broken)
        self.ready.append(document)
        waited = time.monotonic() - self.last_commit
        num_rows = sum(len(ready.rows) or _ROWS_OF_A_COPY for ready in self.ready)
        if num_rows >= self.config.rows_per_commit or waited >= self.config.seconds_per_commit:
            self._commit()

    def _commit(self) -> None:
        documents, self.ready = self.ready, []
        if not documents:
            return
        self._fill_copies([document for document in documents if document.copy_of])
        rows = [row for document in documents for row in document.rows]
        vectors = np.stack([vector for document in documents for vector in document.vectors])
        if self.tokens is not None:
            self.tokens.flush()
        self.store.upsert(rows, vectors, known=[one.uri for one in documents if one.uri in self.known])
        for document in documents:
            if document.copy_of:
                self._report_broken(document.file.path, document.rows[0].problems)
            if document.copy_of:
                is_moved = document.copy_of == document.uri or is_gone(path_of(document.copy_of))
                self._done("moved" if is_moved else "copied")
            else:
                self._done("changed" if document.uri in self.known else "new")
        self.last_commit = time.monotonic()

    def _fill_copies(self, documents: Sequence[_Document]) -> None:
        """Rows and vectors of files whose content the table knows, with their new name and time."""
        if not documents:
            return
        rows, vectors = self.store.rows({document.copy_of for document in documents if document.copy_of})
        rows_of: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            rows_of.setdefault(row.uri, []).append(index)
        for document in documents:
            size, mtime_ns = document.file.size, document.file.mtime_ns
            for index in rows_of[document.copy_of or ""]:
                document.rows.append(replace(rows[index], uri=document.uri, size=size, mtime_ns=mtime_ns))
                document.vectors.append(vectors[index])

    def _report_broken(self, path: str, reasons: Iterable[str]) -> None:
        self.report.problems.extend(Problem(path, reason) for reason in reasons)

    def _done(self, what: Literal["new", "changed", "moved", "copied", "unchanged"] | None) -> None:
        if what is not None:
            setattr(self.report, what, getattr(self.report, what) + 1)
        self.num_done += 1
        self.on_progress(self.num_done, len(self.files))


def _documents(groups: Sequence[Group]) -> list[_Document]:
    """The files of a whole shard, with their rows and vectors."""
    documents = [_Document(piece.file, uri_of(piece.file.path)) for piece in groups[0].shard.pieces]
    for number, reasons in reasons_of(groups).items():
        documents[number].broken += reasons
    for group in groups:
        assert group.vectors is not None
        for entry, vector in zip(group.entries, group.vectors, strict=True):
            documents[entry.piece].rows.append(entry.row)
            documents[entry.piece].vectors.append(vector)
            documents[entry.piece].content_hash = entry.row.content_hash
    return documents


def _reader_of(uri: str) -> str | None:
    return READERS.get(path_of(uri).suffix.lower())
