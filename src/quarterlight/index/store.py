"""Vectors on disk: one LanceDB table for each model, changed one whole file at a time.

    STORE/vectors_<model hash>.lance/    the table, see quarterlight.index.rows
    STORE/vectors_<model hash>.json      which model made it, and the precision of its vectors
    STORE/lock                           held by the one process that writes
    STORE/tokens_...                     visual tokens, see quarterlight.index.visual_tokens

Every change is one commit of LanceDB: a process that is killed leaves the table as it was before or after the commit.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import json
import operator
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from quarterlight.errors import InputError, StoreError, did_you_mean
from quarterlight.files import replace_file
from quarterlight.images import describe
from quarterlight.index.lance import KEEP_VERSIONS, connect, readable, writable
from quarterlight.index.precision import (
    VectorPrecision,
    bytes_per_vector,
    check_precision,
    from_columns,
    is_signed,
    signs,
)
from quarterlight.index.rows import KINDS, Kind, Row, content_key, from_record, schema, to_table, uri_of

if TYPE_CHECKING:  # LanceDB takes a second to import, which a --help should not
    from lancedb.expr import Expr

MAX_FLAT_ROWS = 10_000
"""So many rows may be compared with the query one by one; when there are more outside the index, it is built anew."""

MAX_FRAGMENTS = 100
"""Pieces, one to a commit, from which on they are merged.  LanceDB rewrites the whole table for that, and the larger it
is the more of it is in memory (measured: 150 MB at 20,000 rows, 360 MB at 60,000), so it is done only now and then."""

NUM_PROBES = 20
"""Partitions (of some 8,000 rows) that a search opens at least; with a filter, as many more as it needs."""

REFINE_FACTOR = 10
"""The index proposes so many times the wanted number of rows, which are then ranked by their exact vectors."""

MIN_PROPOSED = 100
"""So many rows at least are proposed by their signs, which are a coarse measure."""

_VECTOR_INDEX = "vector_idx"


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What makes vectors comparable.

    name: as the user wrote it.  hash: hex, over weights and everything else that changes an embedding.
    dimension: the width of a vector.
    """

    name: str
    hash: str
    dimension: int

    def __str__(self) -> str:
        return f"{self.name!r} ({self.dimension} dimensions, hash {self.hash[:12]})"

    @property
    def table_name(self) -> str:
        return f"vectors_{self.hash[:16]}"


class IndexedFile(NamedTuple):
    """What the store knows of a file that it holds rows of; fields as in :class:`Row`."""

    size: int
    mtime_ns: int
    content_hash: str
    problems: tuple[str, ...]


class Picture(NamedTuple):
    """A picture or page that has a row; fields as in :class:`Row`."""

    kind: Kind
    part: int
    content_hash: str

    @property
    def key(self) -> str:
        """As of its row, see :attr:`Row.content_key`."""
        return content_key(self.content_hash, self.part)


class Match(NamedTuple):
    """A row that a search found; score is the cosine, 1 at best."""

    row: Row
    score: float


class IndexStore:
    """The table of one model in a store folder.  Made by :meth:`open` and :meth:`create`.

    precision: in which all of its vectors are kept, see :mod:`quarterlight.index.precision`.
    """

    def __init__(self, folder: Path, model: ModelIdentity, table: Any, precision: VectorPrecision = "float32") -> None:
        self.folder = folder
        self.model = model
        self.precision: VectorPrecision = precision
        self._table = table

    @classmethod
    def open(cls, folder: str | os.PathLike[str], model: ModelIdentity) -> IndexStore:
        """The existing table of ``model``.  Raises StoreError when there is no store, or only of other models."""
        folder = Path(folder)
        known = models_in(folder)
        if model.hash not in {other.hash for other in known}:
            others = " and ".join(map(str, known))
            raise StoreError(
                f"The index in {describe(folder)} was built with model {others}, but this is model {model}: their "
                "vectors cannot be compared. Choose the model of the index with --model, or run `quarterlight index` "
                "again with this one."
            )
        precision = precision_of(folder, model) or "float32"
        with readable(folder):
            return cls(folder, model, connect(folder).open_table(model.table_name), precision)

    @classmethod
    def create(
        cls, folder: str | os.PathLike[str], model: ModelIdentity, *, precision: VectorPrecision | None = None
    ) -> IndexStore:
        """The table of ``model``, made empty if it is not there yet.

        precision: of its vectors; ``None`` is that of the table that is there, and float32 of a new one.
        Raises InputError for an unknown precision, StoreError when the table is there in another one, or cannot be
        written.
        """
        if precision is not None:
            check_precision(precision)
        folder = Path(folder)
        existing = precision_of(folder, model)
        if precision is not None and existing not in (None, precision):
            raise StoreError(
                f"The index in {describe(folder)} keeps vectors of this model as {existing}, not as {precision}, and "
                f"an index cannot mix the two. Leave out --precision to go on in {existing}, or make another index "
                "with --store."
            )
        kept = existing or precision or "float32"
        with writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            manifest = folder / f"{model.table_name}.json"
            columns = schema(model.dimension, kept)
            database = connect(folder)
            try:
                table = database.create_table(model.table_name, schema=columns, exist_ok=True)
            except ValueError:
                if existing is not None:
                    raise
                # left in another precision by a process that was killed before it wrote the manifest
                table = database.create_table(model.table_name, schema=columns, mode="overwrite")
            if existing is None:
                created = datetime.datetime.now(datetime.UTC).isoformat()
                content = {"model": asdict(model), "precision": kept, "created": created}
                replace_file(manifest, json.dumps(content, indent=2) + "\n")
        return cls(folder, model, table, kept)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps other writers out, of this and every other model.  Raises StoreError when one is at work."""
        with writable(self.folder):
            lock = (self.folder / "lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when the process dies
            except BlockingIOError:
                raise StoreError(
                    f"Another process is writing to the index in {describe(self.folder)}: wait until it has finished."
                ) from None
            yield

    def count(self, kind: Kind | None = None, *, within: str | os.PathLike[str] | None = None) -> int:
        """The number of rows in all, or of one kind, or of this file or the files in this folder."""
        where = _where(kind, within)
        with readable(self.folder):
            return int(self._table.count_rows(where.to_sql() if where is not None else None))

    def files(self, *, within: str | os.PathLike[str] | None = None) -> dict[str, IndexedFile]:
        """URI -> what is known of the file, for every file that has rows, or only those in the folder ``within``."""
        where = _where(None, within)
        columns = ["uri", *IndexedFile._fields]
        files: dict[str, IndexedFile] = {}
        with readable(self.folder):
            for batch in self._select(where, columns).to_batches():
                for record in batch.to_pylist():
                    uri = record.pop("uri")
                    files[uri] = IndexedFile(**record | {"problems": tuple(record["problems"])})
        return files

    def pictures(self) -> dict[str, list[Picture]]:
        """URI -> the pictures and pages of the file that have rows, for every file that has any."""
        from lancedb.expr import col, lit

        pictures: dict[str, list[Picture]] = {}
        with readable(self.folder):
            for batch in self._select(col("kind") != lit("text"), ["uri", *Picture._fields]).to_batches():
                for record in batch.to_pylist():
                    pictures.setdefault(record.pop("uri"), []).append(Picture(**record))
        return pictures

    def rows(self, uris: Collection[str]) -> tuple[list[Row], npt.NDArray[np.float32]]:
        """All rows of some files with their vectors, float32 [rows, dimension], in no particular order.

        Vectors are as near to what was written as the precision keeps them, and can be written again without change.
        """
        with readable(self.folder):
            table = self._select(_of(uris), None).to_arrow()
        vector_ND = from_columns(table, self.model.dimension, self.precision)
        return [from_record(record) for record in table.select(list(Row.__dataclass_fields__)).to_pylist()], vector_ND

    def upsert(self, rows: Sequence[Row], vector_ND: npt.NDArray[np.float32], *, known: Collection[str] = ()) -> None:
        """Write all rows of some files in one commit, in place of what the table held of these files.

        vector_ND: one vector of L2 norm 1 for each row.
        known: URIs, among those of ``rows``, that may have older rows.
        Raises StoreError when it cannot be written; the table is then as before.
        """
        if not rows:
            return
        if vector_ND.shape != (len(rows), self.model.dimension):
            raise InputError(
                f"Expected {len(rows)} vectors of {self.model.dimension} dimensions for {len(rows)} rows, "
                f"got an array of shape {list(vector_ND.shape)}."
            )
        merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        if known:
            merge = merge.when_not_matched_by_source_delete(_of(known))
        with writable(self.folder):
            merge.execute(to_table(rows, vector_ND, self.precision))

    def delete(self, uris: Collection[str]) -> None:
        """Remove all rows of some files."""
        if uris:
            with writable(self.folder):
                self._table.delete(_of(uris))

    def optimize(self) -> None:
        """Build the vector index anew when many rows are not in it, and merge pieces when there are many.

        Call it while :meth:`writing`: it also removes what killed writers left behind.
        """
        from lancedb.index import IvfFlat, IvfRq

        with writable(self.folder):
            if self._table.stats()["fragment_stats"]["num_fragments"] > MAX_FRAGMENTS:
                self._table.optimize(cleanup_older_than=KEEP_VERSIONS, delete_unverified=True)
            stats = self._table.index_stats(_VECTOR_INDEX)
            num_outside = self._table.count_rows() if stats is None else stats.num_unindexed_rows
            if num_outside > MAX_FLAT_ROWS:
                column: str = "vector"
                config: IvfFlat | IvfRq = IvfFlat(distance_type="cosine")
                if is_signed(self.precision):
                    column, config = "signs", IvfFlat(distance_type="hamming")
                elif self.model.dimension % 8 == 0:  # RaBitQ packs the signs of eight dimensions in a byte
                    config = IvfRq(distance_type="cosine")
                self._table.create_index(column, config=config, name=_VECTOR_INDEX, replace=True)

    def search(
        self,
        vector_D: npt.NDArray[np.float32],
        *,
        top_k: int = 10,
        kind: Kind | None = None,
        within: str | os.PathLike[str] | None = None,
    ) -> list[Match]:
        """The ``top_k`` rows of highest cosine, best first; equal ones in order of file and part.

        vector_D: one vector of L2 norm 1.
        kind, within: only rows of this kind, and only this file or the files in this folder.
        """
        if top_k < 1:
            raise InputError(f"top_k must be at least 1, got {top_k}.")
        if vector_D.shape != (self.model.dimension,):
            raise InputError(
                f"Expected a vector of {self.model.dimension} dimensions, got shape {list(vector_D.shape)}."
            )
        where = _where(kind, within)
        with readable(self.folder):
            if is_signed(self.precision):
                matches = self._found_by_signs(vector_D, top_k, where)
            else:
                query = self._nearest("vector", vector_D, "cosine", top_k, where).refine_factor(REFINE_FACTOR)
                found = query.select([*Row.__dataclass_fields__, "_distance"]).to_list()
                matches = [Match(from_record(record), 1.0 - record["_distance"]) for record in found]
        return sorted(matches, key=lambda match: (-match.score, match.row.uri, match.row.part))

    def size_in_bytes(self) -> int:
        """What the numbers of all vectors take, uncompressed."""
        return self.count() * bytes_per_vector(self.model.dimension, self.precision)

    def _found_by_signs(self, vector_D: npt.NDArray[np.float32], top_k: int, where: Expr | None) -> list[Match]:
        """Those that share most signs with the query, ranked by all that is kept of their vectors."""
        num_proposed = max(MIN_PROPOSED, REFINE_FACTOR * top_k)
        query = self._nearest("signs", signs(vector_D), "hamming", num_proposed, where)
        columns = [name for name in self._table.schema.names if name in ("id", "vector", "signs")]
        proposed = query.with_row_id(True).select([*columns, "_distance"]).to_arrow()
        score_N = from_columns(proposed, self.model.dimension, self.precision) @ vector_D
        best = np.argsort(-score_N, kind="stable")[:top_k]
        ids = proposed["id"].take(best).to_pylist()
        fields = ["id", *Row.__dataclass_fields__]
        places = proposed["_rowid"].take(best).to_pylist()
        records = {one["id"]: one for one in self._table.take_row_ids(places).select(fields).to_list()}
        if not records.keys() >= set(ids):  # somebody merged pieces of the table meanwhile, which moves rows
            from lancedb.expr import col

            records = {one["id"]: one for one in self._select(col("id").isin(ids), fields).to_list()}
        return [
            Match(from_record(records[id]), float(score))
            for id, score in zip(ids, score_N[best], strict=True)
            if id in records
        ]

    def _nearest(self, column: str, query: npt.NDArray[Any], metric: str, limit: int, where: Expr | None) -> Any:
        found = self._table.search(query, vector_column_name=column).distance_type(metric).limit(limit)
        found = found.minimum_nprobes(NUM_PROBES).maximum_nprobes(0)
        return found if where is None else found.where(where, prefilter=True)

    def _select(self, where: Expr | None, columns: list[str] | None) -> Any:
        query = self._table.search()
        if where is not None:
            query = query.where(where)
        return query.select(columns or self._table.schema.names)


def models_of(folder: str | os.PathLike[str]) -> list[ModelIdentity]:
    """The models that have a table in a store, oldest first; none when there is no store."""
    found = [_read_manifest(manifest) for manifest in Path(folder).glob("vectors_*.json")]
    return [model for _, model, _ in sorted(found, key=lambda one: one[0])]


def models_in(folder: str | os.PathLike[str]) -> list[ModelIdentity]:
    """The same where there must be some. Raises StoreError when there is no store."""
    found = models_of(folder)
    if not found:
        raise StoreError(
            f"There is no index in {describe(folder)}. Make one with `quarterlight index FOLDER --store "
            f"{describe(folder)}`, or name the folder of an existing one with --store."
        )
    return found


def precision_of(folder: str | os.PathLike[str], model: ModelIdentity) -> VectorPrecision | None:
    """How a store keeps the vectors of a model; ``None`` where it has none."""
    manifest = Path(folder) / f"{model.table_name}.json"
    try:
        return _read_manifest(manifest)[2] if manifest.exists() else None
    except OSError as error:
        raise StoreError(f"{describe(manifest)} cannot be read: {error.strerror}.") from error


def _read_manifest(manifest: Path) -> tuple[str, ModelIdentity, VectorPrecision]:
    """When a table was made, by which model, and its precision; the first tables knew only float32 and do not say."""
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        precision = content.get("precision", "float32")
        check_precision(precision)
        return content["created"], ModelIdentity(**content["model"]), precision
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{describe(manifest)} does not describe an index: {error}. Remove it to index anew."
        ) from error


def _of(uris: Collection[str]) -> Expr:
    from lancedb.expr import col

    return col("uri").isin(sorted(uris))


def _where(kind: Kind | None, within: str | os.PathLike[str] | None) -> Expr | None:
    from lancedb.expr import col, lit

    conditions = []
    if kind is not None:
        if kind not in KINDS:
            raise InputError(f"There is no kind of result {kind!r}. {did_you_mean(kind, KINDS)}")
        conditions.append(col("kind") == lit(kind))
    if within is not None:
        uri = uri_of(within).rstrip("/")
        below = (col("uri") >= lit(f"{uri}/")) & (col("uri") < lit(f"{uri}0"))  # "0" follows "/" in ASCII
        items = (col("uri") >= lit(f"{uri}#")) & (col("uri") < lit(f"{uri}$"))  # "$" follows "#"
        conditions.append((col("uri") == lit(uri)) | below | items)
    return functools.reduce(operator.and_, conditions) if conditions else None
