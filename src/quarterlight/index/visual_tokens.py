"""Visual tokens on disk: what a reranker is given of a picture or page, so that it need not look at it again.

    STORE/tokens_<vision hash>_<precision>.lance/   the tokens of each distinct picture and page
    STORE/tokens_<vision hash>_<precision>.json     which eyes made them, and when that began

They are kept by what is shown, not by where it lies: copies of a file share them, and so do all models with the same
vision tower and connector.  They are a cache: whoever misses some works them out again.

T tokens of a picture (of all its tiles, in order), D columns.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from quarterlight.errors import InputError, StoreError, did_you_mean
from quarterlight.files import replace_file
from quarterlight.images import describe
from quarterlight.index.lance import KEEP_VERSIONS, connect, readable, writable

Precision: TypeAlias = Literal["float16", "int8"]
"""How tokens are stored: as the model's numbers, or in half the space as whole numbers with a scale for each token."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

MAX_FLAT_KEYS = 10_000
"""Keys outside the index of keys that a look-up may compare one by one; when there are more, it is built anew."""

MAX_FRAGMENTS = 100
"""Pieces, one to a commit, from which on they are merged."""

MAX_MERGED_BYTES = 256 * 2**20
"""Tables larger than this are not merged: LanceDB holds thousands of rows at once for it, which of tokens is nearly all
(measured: 0.6 GB for a table of 0.75 GB).  They are written in large pieces to begin with; what is removed from them
keeps its space on the disk until `index --store-visual-tokens` makes a new table, in the other precision."""

_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),  # 0: cannot be stored in this precision
        pa.field("tokens", pa.large_binary(), nullable=False),  # float16 or int8 [T, D], little-endian
        pa.field("scales", pa.large_binary(), nullable=False),  # float32 [T], for int8
        pa.field("num_bytes", pa.int32(), nullable=False),  # of tokens and scales
    ]
)

_KEY_INDEX = "key_idx"


@dataclass(frozen=True, kw_only=True)
class TokenSize:
    """What the tokens of a store take.

    num_items: distinct pictures and pages.  num_bytes: of the numbers themselves, keys left out.
    """

    num_items: int
    num_tokens: int
    num_bytes: int


class VisualTokenStore:
    """The tokens that one pair of eyes made, in a store folder.  Made by :meth:`create` and :meth:`find`.

    Write only while :meth:`quarterlight.index.IndexStore.writing`, which keeps other writers out of the folder.
    """

    def __init__(self, folder: Path, vision_hash: str, precision: Precision, table: Any) -> None:
        self.folder = folder
        self.vision_hash = vision_hash
        self.precision: Precision = precision
        self._table = table

    @classmethod
    def create(cls, folder: str | os.PathLike[str], vision_hash: str, precision: Precision) -> VisualTokenStore:
        """The table of these eyes in this precision, made empty if it is not there, and from now on the one in use.

        vision_hash: hex, over all that changes a visual token.
        Raises InputError for an unknown precision, StoreError when it cannot be written.
        """
        if precision not in PRECISIONS:
            raise InputError(f"There is no precision {precision!r}. {did_you_mean(str(precision), PRECISIONS)}")
        folder = Path(folder)
        in_use = cls.find(folder, vision_hash)
        if in_use is not None and in_use.precision == precision:
            return in_use
        name = _name(vision_hash, precision)
        with writable(folder):
            table = connect(folder).create_table(name, schema=_SCHEMA, exist_ok=True)
            manifest = folder / f"{name}.json"
            about = {"vision_hash": vision_hash, "precision": precision}
            created = datetime.datetime.now(datetime.UTC).isoformat()
            replace_file(manifest, json.dumps({"visual_tokens": about, "created": created}, indent=2) + "\n")
        return cls(folder, vision_hash, precision, table)

    @classmethod
    def find(cls, folder: str | os.PathLike[str], vision_hash: str) -> VisualTokenStore | None:
        """The table of these eyes that is in use, which is the newest; ``None`` where there is none.

        Raises StoreError when it cannot be read.
        """
        folder = Path(folder)
        found: list[tuple[str, Precision]] = []
        for precision in PRECISIONS:
            manifest = folder / f"{_name(vision_hash, precision)}.json"
            try:
                content = json.loads(manifest.read_text(encoding="utf-8"))
                if content["visual_tokens"] == {"vision_hash": vision_hash, "precision": precision}:
                    found.append((content["created"], precision))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{describe(manifest)} does not describe visual tokens: {error}. Remove it, and store them anew "
                    "with `quarterlight index --store-visual-tokens`."
                ) from error
        if not found:
            return None
        _, precision = max(found)
        with readable(folder):
            return cls(folder, vision_hash, precision, connect(folder).open_table(_name(vision_hash, precision)))

    @staticmethod
    def any_in(folder: str | os.PathLike[str]) -> bool:
        """Whether a store has tokens of any eyes; if not, nobody need work out a vision hash, which reads weights."""
        return any(Path(folder).glob("tokens_*.json"))

    def keys(self) -> set[str]:
        """The keys of all pictures and pages that need not be worked out again, see ``Row.content_key``."""
        with readable(self.folder):
            return {key for batch in self._columns("key") for key in batch["key"].to_pylist()}

    def add(self, tokens: Mapping[str, npt.NDArray[np.floating[Any]]]) -> None:
        """Store the tokens of some pictures, float [T, D], under keys that are not there yet, in one commit.

        Tokens that are too large for the precision, or no numbers, are not stored, but remembered as such.
        """
        if not tokens:
            return
        with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinity, which is looked for next
            packed = [_pack(one, self.precision) for one in tokens.values()]
        columns = {
            "key": list(tokens),
            "num_tokens": [len(one) if values else 0 for one, (values, _) in zip(tokens.values(), packed, strict=True)],
            "tokens": [values for values, _ in packed],
            "scales": [scales for _, scales in packed],
            "num_bytes": [len(values) + len(scales) for values, scales in packed],
        }
        with writable(self.folder):
            self._table.add(pa.table(columns, schema=_SCHEMA))

    def get(self, keys: Collection[str]) -> dict[str, npt.NDArray[np.floating[Any]]]:
        """Key -> tokens [T, D] of those of the keys that are stored: float16, or float32 where stored as int8."""
        if not keys:
            return {}
        from lancedb.expr import col

        with readable(self.folder):
            query = self._table.search().where(col("key").isin(sorted(keys)))
            found = query.select(["key", "num_tokens", "tokens", "scales"]).to_list()
        return {
            record["key"]: _unpack(record["tokens"], record["scales"], record["num_tokens"], self.precision)
            for record in found
            if record["num_tokens"]
        }

    def prune(self, keep: Collection[str]) -> int:
        """Remove the tokens under all other keys; how many pictures and pages these were."""
        from lancedb.expr import col

        gone = sorted(self.keys().difference(keep))
        with writable(self.folder):
            for start in range(0, len(gone), MAX_FLAT_KEYS):
                self._table.delete(col("key").isin(gone[start : start + MAX_FLAT_KEYS]))
        return len(gone)

    def drop_others(self) -> None:
        """Remove the tables of the same eyes in other precisions, which are no longer in use."""
        with writable(self.folder):
            for precision in PRECISIONS:
                if precision != self.precision:
                    name = _name(self.vision_hash, precision)
                    (self.folder / f"{name}.json").unlink(missing_ok=True)
                    connect(self.folder).drop_table(name, ignore_missing=True)

    def optimize(self) -> None:
        """Index the keys anew when many are not in the index, and merge pieces when they are many and small."""
        from lancedb.index import BTree

        with writable(self.folder):
            stats = self._table.stats()
            if stats["fragment_stats"]["num_fragments"] > MAX_FRAGMENTS and stats["total_bytes"] <= MAX_MERGED_BYTES:
                self._table.optimize(cleanup_older_than=KEEP_VERSIONS, delete_unverified=True)
            indexed = self._table.index_stats(_KEY_INDEX)
            num_outside = self._table.count_rows() if indexed is None else indexed.num_unindexed_rows
            if num_outside > MAX_FLAT_KEYS:
                self._table.create_index("key", config=BTree(), name=_KEY_INDEX, replace=True)

    def size(self) -> TokenSize:
        """How much is stored."""
        num_items = num_tokens = num_bytes = 0
        with readable(self.folder):
            for batch in self._columns("num_tokens", "num_bytes"):
                num_items += batch.num_rows
                num_tokens += int(batch["num_tokens"].to_numpy().sum())
                num_bytes += int(batch["num_bytes"].to_numpy().sum(dtype=np.int64))
        return TokenSize(num_items=num_items, num_tokens=num_tokens, num_bytes=num_bytes)

    def _columns(self, *names: str) -> Any:
        return self._table.search().select(list(names)).to_batches()


def _name(vision_hash: str, precision: Precision) -> str:
    return f"tokens_{vision_hash[:16]}_{precision}"


def _pack(tokens_TD: npt.NDArray[np.floating[Any]], precision: Precision) -> tuple[bytes, bytes]:
    """The bytes of the tokens and of their scales; none where the precision cannot hold them."""
    if precision == "float16":
        half_TD = tokens_TD.astype("<f2")
        return (half_TD.tobytes(), b"") if np.isfinite(half_TD).all() else (b"", b"")
    full_TD = tokens_TD.astype(np.float32)
    scale_T = np.abs(full_TD).max(axis=1) / 127
    if not np.isfinite(scale_T).all():
        return b"", b""
    whole_TD = np.rint(full_TD / np.where(scale_T > 0, scale_T, 1)[:, None])
    return whole_TD.astype("i1").tobytes(), scale_T.astype("<f4").tobytes()


def _unpack(tokens: bytes, scales: bytes, num_tokens: int, precision: Precision) -> npt.NDArray[np.floating[Any]]:
    if precision == "float16":
        return np.frombuffer(tokens, "<f2").reshape(num_tokens, -1).copy()  # writable, as torch wants it
    whole_TD = np.frombuffer(tokens, "i1").reshape(num_tokens, -1)
    return whole_TD.astype(np.float32) * np.frombuffer(scales, "<f4")[:, None]
