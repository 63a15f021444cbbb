"""Files and lists of items embedded in bulk, into shards that an index takes up without a model.

The work is cut into shards, a shard into groups of decoded parts, small enough to wait in memory or to be sent about:

    decode (shard) -> groups -> encode (model) -> groups with vectors -> a shard is written when it is whole

On one machine (:class:`Local`) threads decode ahead of the model; :mod:`quarterlight.search.cluster` runs the same two
functions on the workers of a Ray cluster.  Vectors come back to the process that asked, so that only it must be able
to write, and a shard is written once, whoever worked on it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from quarterlight.errors import InputError
from quarterlight.images import content_hash, describe
from quarterlight.index import Row
from quarterlight.index.rows import is_item, list_key, path_of, uri_of
from quarterlight.index.shards import ShardFolder, ShardInfo, ShardProblem
from quarterlight.records import Item
from quarterlight.search.documents import BrokenPart, Part, place_of, read_parts, reason_of
from quarterlight.search.encoder import Encoder, Pictures, encode_each
from quarterlight.search.items import SUFFIX, BrokenLine, Lines, ListedItem, read_items, split_list
from quarterlight.search.reading import ReadAhead
from quarterlight.search.walk import FoundFile, Problem, Walk, walk

_BYTES_PER_PAGE = 100_000  # of a PDF: a guess, only used to make shards of about the same size


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How the work is cut."""

    items_per_shard: int = 500
    """files, or lines of a list (at least a piece of it), in a shard: the most work that a kill can cost each worker"""
    items_per_group: int = 32
    """parts decoded before they go to the model together"""
    bytes_per_group: int = 32 * 2**20
    """decoded pictures after which fewer parts go, so that pages do not fill the memory"""
    num_readers: int = 2
    """threads that decode, without a cluster"""

    def __post_init__(self) -> None:
        for name in ("items_per_shard", "items_per_group", "bytes_per_group", "num_readers"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")


class Piece(NamedTuple):
    """What is embedded as a whole: a file, or some lines of a list; key is its URI, a blank, and its state."""

    file: FoundFile
    key: str
    lines: Lines | None = None

    @property
    def num_items(self) -> int:
        """What progress counts: files, and lines of lists."""
        return self.lines.number if self.lines else 1


@dataclass(frozen=True)
class Shard:
    """Pieces that are written together; name is a hash of their keys."""

    name: str
    pieces: tuple[Piece, ...]


class Entry(NamedTuple):
    """A row on its way: the number of its piece in the shard, its id, and what the model gets, if it is still to."""

    piece: int
    id: str
    row: Row
    item: Item | None


@dataclass(kw_only=True)
class Group:
    """Some parts of a shard, in the order of its pieces.

    number: from 0, in the shard.  is_last: of the shard.
    num_items: files and lines that were finished in this group.
    problems: number of a piece, and a reason that follows the name of its file.
    vectors: of the entries, once they are there.
    """

    shard: Shard
    number: int
    is_last: bool = False
    num_items: int = 0
    entries: list[Entry] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)
    vectors: npt.NDArray[np.float32] | None = None


class Engine(Protocol):
    """Has shards worked on: their groups with vectors, in any order."""

    def __call__(self, shards: Sequence[Shard], config: EmbedConfig, /) -> Iterator[Group]: ...


@dataclass(kw_only=True)
class EmbedReport:
    """What came of a run.

    num_items: files and lines of the inputs.  num_embedded: of these, in this run; the others were there already.
    num_rows: in all shards afterwards, of other inputs too.  num_bytes: what their vectors take.
    problems: one for each file, page or line of the inputs that has no embedding.  num_other: files of other kinds.
    """

    num_items: int = 0
    num_embedded: int = 0
    num_rows: int = 0
    num_shards: int = 0
    num_bytes: int = 0
    num_other: int = 0
    seconds: float = 0.0
    problems: list[Problem] = field(default_factory=list)


def embed(
    paths: Iterable[str | os.PathLike[str]],
    folder: ShardFolder,
    engine: Engine,
    *,
    config: EmbedConfig | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> EmbedReport:
    """Embed files, folders and lists of items (``.jsonl``) into shards.

    What the shards of earlier runs hold unchanged is kept, and so is what lies outside of ``paths`` or cannot be looked
    at.  What has changed or vanished goes at the end, when everything new is written: a run that is stopped takes
    nothing away.  Files that failed as a whole are tried again.
    on_progress: called with the numbers of files and lines done and in all.
    Raises InputError when one of ``paths`` does not exist, StoreError when a shard cannot be read or written.
    """
    started = time.monotonic()
    config = config or EmbedConfig()
    report = EmbedReport()
    inputs = Inputs.find(paths, skip=folder.folder)
    report.num_other = inputs.found.num_other
    report.num_items = num_done = sum(piece.num_items for piece in inputs.pieces)
    elsewhere = [Problem(*one) for one in folder.problems() if not inputs.include(Path(one[0]))]
    folder.remove([])
    kept = inputs.kept(folder.shards())
    done = {key for keys in kept.values() for key in keys}
    shards = cut([piece for piece in inputs.pieces if piece.key not in done], config)
    num_done -= sum(piece.num_items for shard in shards for piece in shard.pieces)
    on_progress(num_done, report.num_items)
    for num_items, groups in whole_shards(shards, engine, config):
        if groups is not None:
            _write(groups, folder)
        num_done += num_items
        report.num_embedded += num_items
        on_progress(num_done, report.num_items)
    new = {shard.name for shard in shards}
    _sweep(folder, new, inputs, config)
    infos = folder.shards()
    report.problems = sorted([*inputs.found.problems, *_problems(infos, new, inputs)])
    report.num_shards, report.num_rows = len(infos), sum(info.num_rows for info in infos)
    folder.write_problems(sorted([*report.problems, *elsewhere]))
    folder.add_lists(map(list_key, inputs.lists))
    report.num_bytes = folder.size_in_bytes(report.num_rows)
    report.seconds = time.monotonic() - started
    return report


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run is told to embed.

    roots: the files and folders that were named, absolute; lists: those of items among them.
    found: what is in the others.  pieces: everything that is to be embedded, lists of items last.
    """

    roots: tuple[str, ...]
    lists: frozenset[str]
    found: Walk
    pieces: tuple[Piece, ...]

    @classmethod
    def find(cls, paths: Iterable[str | os.PathLike[str]], *, skip: Path) -> Inputs:
        """skip: a folder that is left out.  Raises InputError when a path does not exist."""
        roots = tuple(os.path.abspath(path) for path in paths)  # noqa: PTH100 keeps links
        lists = [path for path in roots if path.endswith(SUFFIX) and Path(path).is_file()]
        found = walk([path for path in roots if path not in lists], skip=skip)
        pieces = pieces_of(found.files)
        seen: set[bytes] = set()
        for path in dict.fromkeys(lists):
            file = FoundFile(path, "items", *_size_and_time(path))
            pieces += [Piece(file, lines.key, lines) for lines in split_list(path, seen)]
        return cls(roots=roots, lists=frozenset(lists), found=found, pieces=tuple(pieces))

    def include(self, path: Path) -> bool:
        """Whether it is one of the roots or below one."""
        return any(path.is_relative_to(root) for root in self.roots)

    def kept(self, infos: Sequence[ShardInfo]) -> dict[Path, list[str]]:
        """Of which pieces the shards' rows stay, by the path of the shard; of repeated ones those written last."""
        wanted = {piece.key for piece in self.pieces}
        known: set[str] = set()
        kept = {}
        for info in reversed(infos):
            kept[info.path] = [key for key in info.done if key not in known and (key in wanted or self._is_alien(key))]
            known.update(kept[info.path])
        return kept

    def _is_alien(self, key: str) -> bool:
        """Whether a piece is none of this run's business, or may be there all the same."""
        path = path_of(key.partition(" ")[0])
        if not self.include(path):
            return True
        if path.suffix == SUFFIX and str(path) not in self.lists and path.is_file():
            return True  # a list is an input only when it is named
        return self.found.is_out_of_sight(path)


def _sweep(folder: ShardFolder, new: Container[str], inputs: Inputs, config: EmbedConfig) -> None:
    """Removes what is out of date; what else the same shards hold goes into others before.

    new: names of the shards of this run.
    """
    infos = folder.shards()
    kept = inputs.kept(infos)
    stale = [
        info
        for info in infos
        if info.path.stem not in new and not (kept[info.path] and len(kept[info.path]) == len(info.done))
    ]
    run: list[ShardInfo] = []
    size = 0.0
    for info in stale:
        num_rows = info.num_rows * len(kept[info.path]) / max(1, len(info.done))  # about
        if run and size + num_rows > config.items_per_shard:
            _replace(folder, run, kept)
            run, size = [], 0.0
        run.append(info)
        size += num_rows
    _replace(folder, run, kept)


def _replace(folder: ShardFolder, stale: Sequence[ShardInfo], kept: Mapping[Path, Sequence[str]]) -> None:
    """Removes some shards, after what is kept of them stands in another one."""
    parts = [(info, kept[info.path]) for info in stale if kept[info.path]]
    merged = folder.merge(_name([key for _, keys in parts for key in keys]), parts).path if parts else None
    folder.remove([info for info in stale if info.path != merged])


def _problems(infos: Sequence[ShardInfo], new: Container[str], inputs: Inputs) -> list[Problem]:
    """What shards tell of the inputs; of what failed as a whole those of this run alone, as that was tried again.

    new: names of the shards of this run.
    """
    return [
        Problem(problem.path, problem.reason)
        for info in infos
        for problem in info.problems
        if (info.path.stem in new or problem.piece not in info.failed) and inputs.include(Path(problem.path))
    ]


def pieces_of(files: Iterable[FoundFile]) -> list[Piece]:
    """Files as pieces, each once, in the same order."""
    pieces = (Piece(file, f"{uri_of(file.path)} {file.size} {file.mtime_ns}") for file in files)
    return list({piece.key: piece for piece in pieces}.values())


def whole_shards(
    shards: Sequence[Shard], engine: Engine, config: EmbedConfig
) -> Iterator[tuple[int, list[Group] | None]]:
    """For each group that comes: how many files and lines it finished, and all groups of its shard if it was the last
    that was missing."""
    if not shards:
        return
    waiting: dict[str, dict[int, Group]] = {shard.name: {} for shard in shards}
    for group in engine(shards, config):
        groups = waiting.get(group.shard.name)
        if groups is None or group.number in groups:
            continue  # done once more, for a worker that died after it had delivered
        groups[group.number] = group
        last = next((one.number for one in groups.values() if one.is_last), None)
        if last is not None and len(groups) == last + 1:
            yield group.num_items, [groups[number] for number in range(last + 1)]
            del waiting[group.shard.name]
        else:
            yield group.num_items, None
    assert not waiting, f"{len(waiting)} shards are not whole"


def decode(shard: Shard, config: EmbedConfig, pictures: Pictures) -> Iterator[Group]:
    """Everything in a shard, read and decoded; the model's turn is next.

    pictures: the model's.
    """
    group, num_bytes = Group(shard=shard, number=0), 0
    for number, piece in enumerate(shard.pieces):
        for part in _parts(piece, number, pictures):
            if isinstance(part, Entry):
                group.entries.append(part)
                num_bytes += _num_bytes(part.item)
            else:
                group.problems.append(part)
            if len(group.entries) >= config.items_per_group or num_bytes >= config.bytes_per_group:
                yield group
                group, num_bytes = Group(shard=shard, number=group.number + 1), 0
        group.num_items += piece.num_items
    group.is_last = True
    yield group


def encode(group: Group, encoder: Encoder) -> Group:
    """The group with a vector for each entry that the model accepts; the pictures are let go of."""
    items = [entry.item for entry in group.entries if entry.item is not None]
    assert len(items) == len(group.entries)
    entries: list[Entry] = []
    vectors: list[npt.NDArray[np.float32]] = []
    problems = list(group.problems)
    encoded: list[npt.NDArray[np.float32] | str] = encode_each(encoder.encode_document, items)
    for entry, one in zip(group.entries, encoded, strict=True):
        if isinstance(one, str):
            listed = is_item(entry.row.uri)
            place = f"id {describe(entry.id)}: " if listed else place_of(entry.row.kind, entry.row.part)
            problems.append((entry.piece, f"{place}is refused by the model: {one}"))
        else:
            entries.append(entry._replace(item=None))
            vectors.append(one)
    vector_ND = np.stack(vectors) if vectors else np.empty((0, encoder.dimension), np.float32)
    return replace(group, entries=entries, vectors=vector_ND, problems=problems)


def reasons_of(groups: Sequence[Group]) -> dict[int, list[str]]:
    """Number of a piece -> what is wrong with it."""
    reasons: dict[int, list[str]] = {}
    for group in groups:
        for number, reason in group.problems:
            reasons.setdefault(number, []).append(reason)
    return reasons


@dataclass(frozen=True)
class Local:
    """Works on shards in this process: threads decode ahead of the model."""

    encoder: Encoder

    def __call__(self, shards: Sequence[Shard], config: EmbedConfig, /) -> Iterator[Group]:
        pictures = self.encoder.pictures
        reading = ReadAhead(
            shards, lambda shard: decode(shard, config, pictures), num_threads=config.num_readers, num_waiting=1
        )
        try:
            for group in reading:
                yield encode(group, self.encoder)
        finally:
            reading.stop()


def _size_and_time(path: str) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns


def cut(pieces: Sequence[Piece], config: EmbedConfig) -> list[Shard]:
    """Runs of pieces of about the wanted size."""
    shards: list[Shard] = []
    run: list[Piece] = []
    size = 0
    for piece in pieces:
        is_pdf = piece.file.reader == "pdf"
        weight = 1 + piece.file.size // _BYTES_PER_PAGE if is_pdf else piece.num_items
        if run and size + weight > config.items_per_shard:
            shards.append(_shard(run))
            run, size = [], 0
        run.append(piece)
        size += weight
    return [*shards, _shard(run)] if run else shards


def _shard(pieces: Sequence[Piece]) -> Shard:
    return Shard(_name([piece.key for piece in pieces]), tuple(pieces))


def _name(keys: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(keys).encode(), digest_size=16).hexdigest()


def _parts(piece: Piece, number: int, pictures: Pictures) -> Iterator[Entry | tuple[int, str]]:
    """What is in a piece, and what is wrong with it."""
    path = piece.file.path
    try:
        if piece.lines is not None:
            for one in read_items(path, piece.lines, pictures):
                match one:
                    case ListedItem():
                        yield Entry(number, one.id, one.row, one.item)
                    case BrokenLine():
                        yield number, one.reason
            return
        hash_of_file = content_hash(path)
        for part in read_parts(piece.file, pictures):
            match part:
                case Part():
                    row = part.row(piece.file, hash_of_file)
                    yield Entry(number, row.id, row, part.item)
                case BrokenPart():
                    yield number, part.reason
    except Exception as error:
        yield number, reason_of(error, path)


def _num_bytes(item: Item | None) -> int:
    """Memory that decoded pictures take."""
    images = item.images if item is not None else ()
    return sum(3 * one.width * one.height for one in images if isinstance(one, Image.Image))


def _write(groups: Sequence[Group], folder: ShardFolder) -> None:
    """A whole shard; rows of a file learn what is wrong with other parts of it, as those of an index do."""
    shard = groups[0].shard
    reasons = reasons_of(groups)
    entries = [entry for group in groups for entry in group.entries]
    rows = [
        entry.row if is_item(entry.row.uri) else replace(entry.row, problems=tuple(reasons.get(entry.piece, ())))
        for entry in entries
    ]
    given = {entry.piece for entry in entries}
    failed = {number for number in reasons if number not in given}
    folder.write(
        shard.name,
        rows,
        np.concatenate([group.vectors for group in groups if group.vectors is not None]),
        ids=[entry.id for entry in entries],
        pieces=[shard.pieces[entry.piece].key for entry in entries],
        done=[piece.key for number, piece in enumerate(shard.pieces) if number not in failed],
        failed=[piece.key for number, piece in enumerate(shard.pieces) if number in failed],
        problems=[
            ShardProblem(shard.pieces[number].key, shard.pieces[number].file.path, reason)
            for number in sorted(reasons)
            for reason in reasons[number]
        ],
    )
