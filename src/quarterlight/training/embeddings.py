"""Embeddings on disk: each distinct item once, made by one process or several, kept when they stop.

Legend of shapes: N items, D columns.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm.auto import tqdm

from quarterlight.errors import DatasetError, ImageError
from quarterlight.files import replacing
from quarterlight.images import content_hash
from quarterlight.models.readable import encode_readable
from quarterlight.prompts import Role
from quarterlight.records import ImageSource, Item
from quarterlight.training.distributed import gather_objects, processes, share

SHARD = 2048
"""Items put to the embedder and written at once: so many are lost at most when a process is killed."""

_PLACES = 2**32  # more than rows in a shard: a place is the number of a shard times this, plus the row
_THREADS = 8  # that read pictures to hash them; hashing lets go of the interpreter's lock


class Encoder(Protocol):
    """What embeds. Rows are float32 with L2 norm 1; a picture that cannot be read raises InputError.

    model_hash: hex, over everything that changes a vector.
    """

    @property
    def model_hash(self) -> str: ...
    def encode_query(self, items: Sequence[Item], /) -> npt.NDArray[np.float32]: ...
    def encode_document(self, items: Sequence[Item], /) -> npt.NDArray[np.float32]: ...


class Contents:
    """What items show, in 16 bytes: the same for copies of a text or a picture, whatever they are called."""

    def __init__(self) -> None:
        self._picture: dict[ImageSource | int, bytes] = {}
        self._problem: dict[ImageSource | int, str] = {}

    @property
    def num_pictures(self) -> int:
        """How many pictures, told apart by their names, have been looked at."""
        return len(self._picture) + len(self._problem)

    @property
    def problems(self) -> list[str]:
        """Why some of them could not be."""
        return list(self._problem.values())

    def read(self, items: Iterable[Item], *, show_progress: bool = False) -> None:
        """Reads the pictures of items, each once.  Under a launcher the processes share them: all must call alike."""
        known = self._picture.keys() | self._problem.keys()
        missing = {_name(one): one for item in items for one in item.images if _name(one) not in known}
        own = share([*missing.values()])
        with ThreadPoolExecutor(_THREADS) as pool:
            unit: dict[str, Any] = {"unit": "picture", "desc": "read pictures", "total": len(own)}
            found = [*tqdm(pool.map(self._read, own), disable=not (show_progress and own), **unit)]
        for name, value in zip(missing, gather_objects(found), strict=True):
            if isinstance(value, bytes):
                self._picture[name] = value
            else:
                self._problem[name] = value

    def of(self, item: Item) -> bytes | None:
        """The content of an item whose pictures have been read; ``None`` if one of them could not be."""
        if self.problem(item):
            return None
        pictures = b"".join(self._picture[_name(one)] for one in item.images)
        return _digest(b"%d " % len(pictures), pictures, (item.text or "").encode())

    def problem(self, item: Item) -> str | None:
        """Why a picture of the item cannot be read."""
        return next((self._problem[_name(one)] for one in item.images if _name(one) in self._problem), None)

    def key(self, item: Item) -> bytes | None:
        """What the embedding of an item depends on: its content, how it is cut and what it is told."""
        if (content := self.of(item)) is None:
            return None
        return _digest(content, f"{item.max_tiles} {item.instruction}".encode())

    @staticmethod
    def _read(source: ImageSource) -> bytes | str:
        try:
            return bytes.fromhex(content_hash(source))
        except ImageError as error:
            return str(error)


class Embeddings:
    """The vectors of one model, in ``folder/<hash of the model>/<role>/<shard>.npz``, by :meth:`Contents.key`.

    Under a launcher the processes share the work; they must see the same folder.
    problems: key of an item -> why it has no vector.
    """

    def __init__(self, embedder: Encoder, folder: Path) -> None:
        self.folder = folder / embedder.model_hash
        self.problems: dict[Role, dict[bytes, str]] = {"query": {}, "document": {}}
        self._encode: dict[Role, Callable[..., npt.NDArray[np.float32]]] = {
            "query": embedder.encode_query,
            "document": embedder.encode_document,
        }
        self._process = processes()
        self._shards: dict[Role, list[Path]] = {"query": [], "document": []}
        self._place: dict[Role, dict[bytes, int]] = {"query": {}, "document": {}}  # shard and row: see _PLACES

    def missing(self, role: Role, keys: Iterable[bytes]) -> list[bytes]:
        """The items, by key, that neither this nor an earlier run has embedded."""
        self._find(role)
        return [key for key in keys if not self._has(role, key)]

    def add(
        self,
        role: Role,
        items: Mapping[bytes, Item],
        *,
        show_progress: bool = False,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Embeds the items, by key, that neither this nor an earlier run has embedded.

        on_progress: called with how many more this process has embedded.
        """
        self._find(role)
        keys = list(items)
        # Which process embeds what does not depend on what is there already, which they would not see alike.
        blocks = [keys[start : start + SHARD] for start in range(0, len(keys), SHARD)]
        own = blocks[self._process.process_index :: self._process.num_processes]
        todo = [missing for block in own if (missing := [key for key in block if not self._has(role, key)])]
        show = show_progress and self._process.is_main_process and bool(todo)
        with tqdm(total=sum(map(len, todo)), desc=f"embed {role}", unit="item", disable=not show) as bar:
            for block in todo:
                self._write(role, block, *encode_readable(self._encode[role], [items[key] for key in block]))
                bar.update(len(block))
                on_progress(len(block))
        self._process.wait_for_everyone()
        self._find(role)

    def rows(self, role: Role, keys: Sequence[bytes]) -> Stored:
        """The vectors of items that have been added without a problem, read when they are looked at."""
        return Stored(self._shards[role], np.array([self._place[role][key] for key in keys], np.int64))

    def _has(self, role: Role, key: bytes) -> bool:
        return key in self._place[role] or key in self.problems[role]

    def _find(self, role: Role) -> None:
        """Learns of the shards that have come since the last time."""
        known = set(self._shards[role])
        for file in sorted((self.folder / role).glob("*.npz")):
            if file not in known:
                number = len(self._shards[role])
                for row, key in enumerate(_read(file, "key").tolist()):
                    self._place[role][bytes(key)] = number * _PLACES + row
                reasons = _read(file, "reason").tolist()
                self.problems[role] |= zip(map(bytes, _read(file, "bad").tolist()), reasons, strict=True)
                self._shards[role].append(file)

    def _write(self, role: Role, keys: list[bytes], vector_ND: npt.NDArray[np.float32], bad: dict[int, str]) -> None:
        file = self.folder / role / f"{_digest(*keys).hex()}.npz"
        with replacing(file) as draft, draft.open("wb") as stream:
            np.savez(
                stream,
                key=np.array([key for number, key in enumerate(keys) if number not in bad], dtype="V16"),
                vector=vector_ND,
                bad=np.array([keys[number] for number in bad], dtype="V16"),
                reason=np.array(list(bad.values()), dtype=np.str_),
            )


class Stored:
    """Rows on disk, float32 ``[N, D]``, of which a slice is in memory at a time."""

    def __init__(self, shards: Sequence[Path], place_N: npt.NDArray[np.int64]) -> None:
        self._shards = shards
        self._place_N = place_N

    @property
    def shape(self) -> tuple[int, ...]:
        """N and D."""
        if not len(self._place_N):
            return 0, 1
        return len(self._place_N), _read(self._shards[self._place_N[0] // _PLACES], "vector").shape[1]

    def __getitem__(self, rows: slice, /) -> npt.NDArray[np.float32]:
        place_N = self._place_N[rows]
        shard_N, row_N = np.divmod(place_N, _PLACES)
        vector_ND: npt.NDArray[np.float32] | None = None
        for number in np.unique(shard_N).tolist():
            vectors = _read(self._shards[number], "vector")
            if vector_ND is None:
                vector_ND = np.empty((len(place_N), vectors.shape[1]), np.float32)
            here_N = shard_N == number
            vector_ND[here_N] = vectors[row_N[here_N]]
        return np.empty((0, self.shape[1]), np.float32) if vector_ND is None else vector_ND


def _read(file: Path, name: str) -> npt.NDArray[Any]:
    """One of the arrays of a shard; the others are not read."""
    try:
        with file.open("rb") as stream, np.load(stream) as shard:
            return shard[name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{file} is damaged ({error}): remove it, and its items are embedded again.") from error


def _digest(*parts: bytes) -> bytes:
    """16 bytes that differ when the parts do."""
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def _name(source: ImageSource) -> ImageSource | int:
    """What a picture is remembered by; an opened one has no name and no hash."""
    return id(source) if isinstance(source, Image.Image) else source
