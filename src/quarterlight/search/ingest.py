"""Brings a table to the state of some folders.

Threads read files into a short queue, the calling thread embeds what comes out and writes whole files, so memory does
not grow with the corpus, and a process that is killed has either all rows of a file in the table or those of before.
The table then depends on the files alone, not on how often or when indexing was interrupted.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from quarterlight.errors import InputError, StoreError
from quarterlight.images import content_hash, describe
from quarterlight.index import IndexStore, Row
from quarterlight.index.rows import path_of, uri_of
from quarterlight.search.documents import BrokenPart, Part, read_parts
from quarterlight.search.encoder import Encoder
from quarterlight.search.walk import READERS, FoundFile, Problem, Walk, walk

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


@dataclass(kw_only=True)
class IngestReport:
    """What happened to each file, and what could not be indexed.

    new, changed, moved, unchanged, deleted: numbers of files; moved ones were known under another name or time.
    num_other: files of kinds that are not indexed.  num_rows: rows of the table afterwards.
    problems: one for each file, folder or page that is not in the index.
    stopped: why indexing ended early, e.g. a full disk; what was written before is in the index.
    """

    new: int = 0
    changed: int = 0
    moved: int = 0
    unchanged: int = 0
    deleted: int = 0
    num_other: int = 0
    num_rows: int = 0
    seconds: float = 0.0
    problems: list[Problem] = field(default_factory=list)
    stopped: str | None = None


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
        return Row(
            uri=self.uri,
            kind=part.kind,
            part=part.part,
            size=self.file.size,
            mtime_ns=self.file.mtime_ns,
            content_hash=self.content_hash,
            width=part.width,
            height=part.height,
            thumbnail=part.thumbnail,
            text=part.text,
            title=part.title,
        )


def ingest(
    paths: Iterable[str | os.PathLike[str]],
    store: IndexStore,
    encoder: Encoder,
    *,
    config: IngestConfig | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> IngestReport:
    """Index files and folders: new and changed files are embedded, rows of deleted ones removed.

    A file whose size and time of change are known is taken as unchanged; else its content decides, and content that
    the table knows under another name is not embedded again.  After a normal end the rows below ``paths`` are those of
    the files that can be read, and of those that could not be looked at.
    on_progress: called with the numbers of files done and in all.
    Raises InputError when one of ``paths`` does not exist, StoreError when another process writes to the store.
    """
    started = time.monotonic()
    roots = list(paths)
    with store.writing():
        found = walk(roots, skip=store.folder)
        run = _Run(store, encoder, config or IngestConfig(), found, on_progress)
        try:
            run.embed_and_write()
            run.delete_vanished(roots)
            store.optimize()
        except StoreError as error:
            run.report.stopped = str(error)
        run.report.num_rows = store.count()
    run.report.problems.sort()
    run.report.seconds = time.monotonic() - started
    return run.report


class _Run:
    def __init__(
        self,
        store: IndexStore,
        encoder: Encoder,
        config: IngestConfig,
        found: Walk,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self.store, self.encoder, self.config, self.on_progress = store, encoder, config, on_progress
        self.report = IngestReport(num_other=found.num_other, problems=found.problems)
        self.files = {uri_of(file.path): file for file in found.files}
        self.closed = found.closed
        self.known = store.files()
        self.fresh = {uri: file for uri, file in self.files.items() if not self._is_unchanged(uri, file)}
        self.origins = {
            (_reader_of(uri), file.content_hash): uri for uri, file in self.known.items() if uri not in self.fresh
        }
        self.num_done = 0
        self.failed: list[str] = []
        self.ready: list[_Document] = []
        self.last_commit = time.monotonic()

    def embed_and_write(self) -> None:
        """Reads, embeds and writes what is not known yet.  What is complete is written even when stopped half-way."""
        for uri in self.files.keys() - self.fresh.keys():
            self._report_broken(self.files[uri].path, self.known[uri].problems)
            self._done("unchanged")
        documents: list[_Document] = []
        parts: list[Part | None] = []
        # made one by one and dropped when written: they hold rows
        fresh = (_Document(file, uri) for uri, file in self.fresh.items())
        reading = _Reading(fresh, self._origin, self.config)
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

    def delete_vanished(self, roots: Sequence[str | os.PathLike[str]]) -> None:
        """Removes the rows of files below ``roots`` that are no longer there, or can no longer be read."""
        below = set().union(*(self.store.files(within=root) for root in roots))
        vanished = [uri for uri in below if uri not in self.files and not self._is_out_of_sight(path_of(uri))]
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

    def _is_out_of_sight(self, path: Path) -> bool:
        """Whether a file that was not found may be there all the same: in a closed folder, or on a dead disk."""
        if any(path.is_relative_to(folder) for folder in self.closed):
            return True
        try:
            path.lstat()
        except OSError as error:
            return not isinstance(error, (FileNotFoundError, NotADirectoryError))
        return False

    def _embed(self, documents: Sequence[_Document], parts: Sequence[Part | None]) -> None:
        """Vectors for the parts; ``None`` in place of a part ends its document, which then goes to the writer."""
        vectors = iter(self._vectors([part for part in parts if part is not None]))
        for document, part in zip(documents, parts, strict=True):
            if part is None:
                self._finish(document)
                continue
            vector = next(vectors)
            if isinstance(vector, str):
                place = {"image": "", "page": f"page {part.part} ", "text": f"section {part.part} "}[part.kind]
                document.broken.append(f"{place}is refused by the model: {vector}")
            else:
                document.rows.append(document.row(part))
                document.vectors.append(vector)

    def _vectors(self, parts: Sequence[Part]) -> Sequence[npt.NDArray[np.float32] | str]:
        """A vector for each part, or why the model refuses it."""
        if not parts:
            return []
        try:
            return list(self.encoder.encode_document([part.item for part in parts]))
        except InputError as error:
            if len(parts) == 1:
                return [" ".join(str(error).split())]
            return [self._vectors([part])[0] for part in parts]

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
        self.store.upsert(rows, vectors, known=[one.uri for one in documents if one.uri in self.known])
        for document in documents:
            if document.copy_of:
                self._report_broken(document.file.path, document.rows[0].problems)
            self._done("moved" if document.copy_of else "changed" if document.uri in self.known else "new")
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

    def _done(self, what: Literal["new", "changed", "moved", "unchanged"] | None) -> None:
        if what is not None:
            setattr(self.report, what, getattr(self.report, what) + 1)
        self.num_done += 1
        self.on_progress(self.num_done, len(self.files))


class _Reading:
    """What several threads read: ``(document, part)`` for each part, and ``(document, None)`` at a document's end."""

    def __init__(
        self, documents: Iterable[_Document], origin: Callable[[_Document], str | None], config: IngestConfig
    ) -> None:
        self._documents = iter(documents)
        self._origin = origin
        self._taking = threading.Lock()
        self._stopped = threading.Event()
        self._queue: queue.Queue[tuple[_Document, Part | None] | BaseException | None] = queue.Queue(config.batch_size)
        self._threads = [
            threading.Thread(target=self._work, name=f"quarterlight-read-{number}", daemon=True)
            for number in range(config.num_readers)
        ]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[tuple[_Document, Part | None]]:
        running = len(self._threads)
        while running:
            event = self._queue.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                running -= 1
            else:
                yield event

    def stop(self) -> None:
        """Ends the threads, whatever they are waiting for."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        try:
            while not self._stopped.is_set():
                with self._taking:
                    document = next(self._documents, None)
                if document is None:
                    break
                for part in self._parts(document):
                    self._put((document, part))
                self._put((document, None))
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _parts(self, document: _Document) -> Iterator[Part]:
        path = document.file.path
        try:
            document.content_hash = content_hash(path)
            document.copy_of = self._origin(document)
            if document.copy_of is not None:
                return
            for part in read_parts(document.file):
                if self._stopped.is_set():
                    return
                if isinstance(part, BrokenPart):
                    document.broken.append(part.reason)
                else:
                    yield part
        except InputError as error:
            document.failed = str(error).removeprefix(describe(path)).strip().rstrip(".")
        except Exception as error:  # damaged data trips decoders in ways nobody foresaw; one file must not end the job
            document.failed = f"cannot be read: {type(error).__name__}: {describe(str(error))}"

    def _put(self, event: tuple[_Document, Part | None] | BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(event, timeout=0.1)
            except queue.Full:
                continue


def _reader_of(uri: str) -> str | None:
    return READERS.get(path_of(uri).suffix.lower())
