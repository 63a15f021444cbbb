"""Embeddings in files of their own, made in bulk on one machine or many, which an index takes up without a model.

    FOLDER/embeddings.json           which model made them, and their precision
    FOLDER/shards/<hash>.parquet     some rows with their vectors, columns as in quarterlight.index.rows, and `piece`
    FOLDER/problems.jsonl            what could not be embedded, and why, when the last run ended
    FOLDER/lists.json                which lists of items have been embedded to their ends

A shard holds all rows of some pieces (a piece is a file, or some lines of a list of items) and says in its metadata
which these are, so that a later run knows what is done already.  It appears under its name when it is complete.
While a run is under way there may be two states of a file, in two shards: the one that was written later counts.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from quarterlight.errors import StoreError
from quarterlight.files import UNFINISHED, replace_file, replacing
from quarterlight.images import describe
from quarterlight.index.lance import readable, writable
from quarterlight.index.precision import VectorPrecision, bytes_per_vector, check_precision, from_columns
from quarterlight.index.rows import Row, from_record, to_table
from quarterlight.index.store import ModelIdentity

_METADATA = b"quarterlight"
_PIECE = "piece"


class ShardProblem(NamedTuple):
    """Something that could not be embedded: in which piece, where exactly, and why; ends a sentence."""

    piece: str
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What a shard says of itself.

    done, failed: keys of the pieces that gave rows, and of those that gave none.
    written_ns: when.
    """

    path: Path
    model: ModelIdentity
    precision: VectorPrecision
    num_rows: int
    done: tuple[str, ...]
    failed: tuple[str, ...]
    problems: tuple[ShardProblem, ...]
    written_ns: int


class ShardFolder:
    """The shards of one model in a folder.  Made by :meth:`create` and :meth:`open`."""

    def __init__(self, folder: Path, model: ModelIdentity, precision: VectorPrecision) -> None:
        self.folder = folder
        self.model = model
        self.precision: VectorPrecision = precision

    @classmethod
    def create(
        cls, folder: str | os.PathLike[str], model: ModelIdentity, *, precision: VectorPrecision | None = None
    ) -> ShardFolder:
        """The folder of this model, made if it is not there.

        precision: of the vectors; ``None`` is that of the folder, and float32 in a new one.
        Raises StoreError when it holds embeddings of another model or precision, or cannot be written.
        """
        if precision is not None:
            check_precision(precision)
        folder = Path(folder)
        if (folder / "embeddings.json").exists():
            there = cls.open(folder)
            if there.model.hash != model.hash:
                raise StoreError(
                    f"{describe(folder)} holds embeddings of model {there.model}, but this is model {model}: name "
                    "another folder with --out, or the other model with --model."
                )
            if precision not in (None, there.precision):
                raise StoreError(
                    f"{describe(folder)} holds embeddings as {there.precision}, not as {precision}: leave out "
                    "--precision to go on, or name another folder with --out."
                )
            return there
        with writable(folder):
            (folder / "shards").mkdir(parents=True, exist_ok=True)
            kept: VectorPrecision = precision or "float32"
            created = datetime.datetime.now(datetime.UTC).isoformat()
            about = {"model": asdict(model), "precision": kept, "created": created}
            replace_file(folder / "embeddings.json", json.dumps(about, indent=2) + "\n")
        return cls(folder, model, kept)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> ShardFolder:
        """An existing folder.  Raises StoreError when it is none."""
        folder = Path(folder)
        manifest = folder / "embeddings.json"
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            check_precision(content["precision"])
            return cls(folder, ModelIdentity(**content["model"]), content["precision"])
        except FileNotFoundError as error:
            raise StoreError(
                f"{describe(folder)} is not a folder of embeddings: it has no embeddings.json. Make one with "
                f"`quarterlight embed FILES --out {describe(folder)}`."
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{describe(manifest)} does not describe embeddings: {error}.") from error

    def shards(self) -> list[ShardInfo]:
        """All shards, in the order in which they were written.

        Raises StoreError for one that is damaged or of another model.
        """
        infos = [self._info(path) for path in sorted((self.folder / "shards").glob("*.parquet"))]
        return sorted(infos, key=lambda info: info.written_ns)

    def write(
        self,
        name: str,
        rows: Sequence[Row],
        vector_ND: npt.NDArray[np.float32],
        *,
        ids: Sequence[str],
        pieces: Sequence[str],
        done: Sequence[str],
        failed: Sequence[str],
        problems: Sequence[ShardProblem],
    ) -> ShardInfo:
        """A complete shard: rows and their vectors, one to one; fields as in :class:`ShardInfo`.

        ids: of the rows, for those who read the file itself.  pieces: the key of the piece that each row is of.
        """
        table = to_table(rows, vector_ND.reshape(len(rows), self.model.dimension), self.precision)
        table = table.set_column(0, table.schema.field("id"), pa.array(ids, pa.string()))
        table = table.append_column(_PIECE, pa.array(pieces, pa.string()))
        return self._write(name, table, done, failed, problems)

    def merge(self, name: str, shards: Sequence[tuple[ShardInfo, Sequence[str]]]) -> ShardInfo:
        """A complete shard of some pieces of others, which stay; their rows and vectors are copied as they are.

        shards: with the keys, among those that are done, of what is wanted of them.
        """
        tables: list[pa.Table] = []
        done: list[str] = []
        problems: list[ShardProblem] = []
        for info, keys in shards:
            with readable(self.folder):
                table = pq.read_table(info.path)
            tables.append(table.filter(pc.is_in(table[_PIECE], pa.array(keys, pa.string()))))
            done += keys
            problems += [problem for problem in info.problems if problem.piece in set(keys)]
        return self._write(name, pa.concat_tables(tables), done, [], problems)

    def _write(
        self, name: str, table: pa.Table, done: Sequence[str], failed: Sequence[str], problems: Sequence[ShardProblem]
    ) -> ShardInfo:
        about = {
            "model": asdict(self.model),
            "precision": self.precision,
            "done": done,
            "failed": failed,
            "problems": [one._asdict() for one in problems],
            "written_ns": time.time_ns(),
        }
        table = table.replace_schema_metadata({_METADATA: json.dumps(about).encode()})
        path = self.folder / "shards" / f"{name}.parquet"
        with writable(self.folder), replacing(path) as draft:
            pq.write_table(table, draft, compression="zstd")
        return self._info(path)

    def remove(self, shards: Iterable[ShardInfo]) -> None:
        """Removes some shards, and what killed writers left behind."""
        with writable(self.folder):
            for shard in shards:
                shard.path.unlink(missing_ok=True)
            for draft in (self.folder / "shards").glob(f"*{UNFINISHED}"):
                draft.unlink(missing_ok=True)

    def write_problems(self, problems: Iterable[tuple[str, str]]) -> None:
        """The file of problems: path and reason of each."""
        lines = (json.dumps({"path": path, "reason": reason}) + "\n" for path, reason in problems)
        with writable(self.folder):
            replace_file(self.folder / "problems.jsonl", "".join(lines))

    def problems(self) -> list[tuple[str, str]]:
        """What :meth:`write_problems` wrote last; nothing before the first run has ended."""
        try:
            lines = (self.folder / "problems.jsonl").read_text(encoding="utf-8").splitlines()
            return [(one["path"], one["reason"]) for one in map(json.loads, lines)]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{describe(self.folder / 'problems.jsonl')} cannot be read: {error}. Remove it, and run "
                "`quarterlight embed` once more."
            ) from error

    def add_lists(self, keys: Iterable[str]) -> None:
        """Notes that some lists of items, by :func:`quarterlight.index.rows.list_key`, are embedded as a whole."""
        with writable(self.folder):
            replace_file(self.folder / "lists.json", json.dumps(sorted(self.lists().union(keys)), indent=2) + "\n")

    def lists(self) -> set[str]:
        """What :meth:`add_lists` was told: the shards have every item that these lists had then, and no other one."""
        try:
            return set(json.loads((self.folder / "lists.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return set()
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(
                f"{describe(self.folder / 'lists.json')} cannot be read: {error}. Remove it, and run "
                "`quarterlight embed` once more."
            ) from error

    def read(self, shard: ShardInfo) -> tuple[list[Row], npt.NDArray[np.float32]]:
        """The rows of a shard and their vectors, float32 [rows, dimension]."""
        with readable(self.folder):
            table = pq.read_table(shard.path)
            vector_ND = from_columns(table, self.model.dimension, self.precision)
            return [
                from_record(record) for record in table.select(list(Row.__dataclass_fields__)).to_pylist()
            ], vector_ND

    def size_in_bytes(self, num_rows: int) -> int:
        """What the numbers of so many vectors take, uncompressed."""
        return num_rows * bytes_per_vector(self.model.dimension, self.precision)

    def _info(self, path: Path) -> ShardInfo:
        try:
            metadata = pq.read_metadata(path)
            about: dict[str, Any] = json.loads(metadata.metadata[_METADATA])
            info = ShardInfo(
                path=path,
                model=ModelIdentity(**about["model"]),
                precision=about["precision"],
                num_rows=metadata.num_rows,
                done=tuple(about["done"]),
                failed=tuple(about["failed"]),
                problems=tuple(ShardProblem(**one) for one in about["problems"]),
                written_ns=about["written_ns"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{describe(path)} is not a shard of embeddings, or damaged: {error}. Remove it, and its items are "
                "embedded again."
            ) from error
        if (info.model.hash, info.precision) != (self.model.hash, self.precision):
            raise StoreError(
                f"{describe(path)} holds embeddings of model {info.model} as {info.precision}, the others are of model "
                f"{self.model} as {self.precision}: they cannot be mixed. Take it out of the folder."
            )
        return info
