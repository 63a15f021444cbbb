"""Rows of published tables, whatever the file: Parquet, JSON lines, a JSON list or object, CSV.

Every row comes with its place, so that what is wrong with it can be told with file and row.  Rows count from 1.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

import yaml

from quarterlight.errors import DatasetError, did_you_mean

Row: TypeAlias = "dict[str, Any]"

_BATCH = 64  # rows of Parquet held at once: pages of documents take a megabyte each
_TABLES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv")


class Place(NamedTuple):
    """Where a row stands."""

    path: Path
    row: int

    def __str__(self) -> str:
        return f"{self.path}, row {self.row}"

    def fail(self, problem: str) -> NoReturn:
        """Raises DatasetError with the place and the problem, which is the rest of a sentence."""
        raise DatasetError(f"{self}: {problem.rstrip('.')}.")

    def text(self, row: Row, column: str) -> str:
        """The text of a column; empty for null.  Raises DatasetError when it is something else."""
        value = row.get(column)
        if value is None:
            return ""
        if not isinstance(value, str):
            self.fail(f"{column} must be a string, got {value!r:.60}")
        return value

    def texts(self, row: Row, column: str) -> list[str]:
        """The texts of a column that holds a list of them; null counts as empty.  Raises DatasetError likewise."""
        value = row.get(column)
        if not isinstance(value, list) or not all(one is None or isinstance(one, str) for one in value):
            self.fail(f"{column} must be a list of strings, got {value!r:.60}")
        return [one or "" for one in value]

    def ids(self, row: Row, column: str) -> list[str]:
        """The ids of a column that holds a list of them, each once; null counts as empty.  Raises likewise."""
        value = row.get(column)
        if not isinstance(value, list | None):
            self.fail(f"{column} must be a list of ids, got {value!r:.60}")
        return list(dict.fromkeys(map(str, value or ())))


def find_tables(folder: Path, config: str, split: str) -> list[Path]:
    """The files of one config and split of a repository in the layout of the Hugging Face hub, in order.

    What the header of README.md says comes first; without it, ``<config>/<split>-*``, ``<config>/<split>/*``,
    ``<config>/*`` and ``<config>.*`` are tried in turn; a config ``default`` also lies in ``data/`` or in the folder
    itself.  Raises DatasetError when there is no such file.
    """
    patterns = _declared(folder, config, split)
    bases = [f"{config}/", f"data/{config}/"] + (["data/", ""] if config == "default" else [])
    patterns += [f"{base}{tail}" for base in bases for tail in (f"{split}-*", f"{split}.*", f"{split}/*")]
    patterns += [f"{config}-{split}*", f"{config}.*"] + ([f"{config}/*"] if split in ("train", "test") else [])
    for pattern in patterns:
        found = sorted(path for path in folder.glob(pattern) if path.is_file() and path.name.endswith(_TABLES))
        if found:
            return found
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    raise DatasetError(
        f"{folder} has no table for the config {config!r} and the split {split!r}: expected "
        f"{config}/{split}-*.parquet. It has: {', '.join(there[:12]) or 'nothing'}."
    )


def read_rows(
    path: Path,
    columns: Sequence[str],
    *,
    known: Collection[str] | None = None,
    on_rows: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[Place, Row]]:
    """The rows of a table, one after the other.

    columns: must be there.  known: the others that may be; ``None`` allows any.
    on_rows: called with how many rows a Parquet file has, before the first.
    Raises DatasetError, naming file and row, for a file that cannot be read and for a missing or unknown column.
    """
    checked = False
    for place, row in _rows(path, on_rows):
        if not isinstance(row, dict):
            place.fail(f"a row must be an object with columns, got {type(row).__name__}")
        if not checked or path.suffix != ".parquet":
            checked = True
            for column in columns:
                if column not in row:
                    place.fail(f"the column {column!r} is missing. {did_you_mean(column, row)}")
            for column in row if known is not None else ():
                if column not in columns and column not in (known or ()):
                    place.fail(
                        f"the column {column!r} is not known: is the file in another layout or revision? "
                        + did_you_mean(column, [*columns, *(known or ())])
                    )
        yield place, row


def _declared(folder: Path, config: str, split: str) -> list[str]:
    """The patterns that the header of README.md gives for a config and split; none if it is silent."""
    readme = folder / "README.md"
    if not readme.is_file():
        return []
    head, _, rest = readme.read_text(encoding="utf-8", errors="replace").partition("---")
    if head.strip():
        return []
    try:
        card = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return []
    configs = card.get("configs") if isinstance(card, dict) else None
    patterns: list[str] = []
    for one in configs if isinstance(configs, list) else ():
        files = one.get("data_files") if isinstance(one, dict) and one.get("config_name") == config else None
        for part in files if isinstance(files, list) else ():
            if isinstance(part, dict) and str(part.get("split")) == split:
                path = part.get("path")
                patterns += [str(each) for each in (path if isinstance(path, list) else [path])]
    return [pattern for pattern in patterns if not pattern.startswith("/") and ".." not in pattern]


def _rows(path: Path, on_rows: Callable[[int], None]) -> Iterator[tuple[Place, Any]]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield from _parquet(path, on_rows)
        return
    number = 0
    try:
        with gzip.open(path, "rb") if name.endswith(".gz") else path.open("rb") as stream:
            if name.endswith((".jsonl", ".jsonl.gz")):
                for number, line in enumerate(stream, 1):
                    if not line.isspace():
                        yield Place(path, number), json.loads(line)
            elif name.endswith((".csv", ".tsv")):
                csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
                lines = io.TextIOWrapper(stream, encoding="utf-8", newline="")
                for number, row in enumerate(csv.DictReader(lines, dialect=_DIALECTS[name[-4:]]), 1):
                    yield Place(path, number), row
            else:
                yield from _json(path, json.loads(stream.read()))
    except ValueError as error:
        raise DatasetError(f"{path}, row {number or 1}: not valid JSON or text in UTF-8 ({error}).") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"{path} cannot be read after row {number} ({reason}): is it truncated?") from error


_DIALECTS = {".csv": "excel", ".tsv": "excel-tab"}


def _json(path: Path, value: Any) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, dict):  # numbered rows, with gaps
        value = [row | {"_key": key} if isinstance(row, dict) else row for key, row in value.items()]
    if not isinstance(value, list):
        raise DatasetError(f"{path} must be a JSON list of rows or an object of rows, got {type(value).__name__}.")
    for number, row in enumerate(value, 1):
        yield Place(path, number), row


def _parquet(path: Path, on_rows: Callable[[int], None]) -> Iterator[tuple[Place, Any]]:
    import pyarrow as pa  # a third of a second
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            on_rows(file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(path, number), row
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise DatasetError(f"{path} cannot be read after row {number} ({reason:.200}): is it truncated?") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file.  Raises DatasetError when it cannot be read."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            return json.loads(stream.read())
    except ValueError as error:
        raise DatasetError(f"{path} is not valid JSON ({error}): is it truncated?") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
