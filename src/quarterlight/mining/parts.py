"""Tables that are written in parts: several processes share them, and a run that was stopped finds them again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from quarterlight.files import replacing
from quarterlight.training.distributed import processes

_METADATA = b"quarterlight"

_T = TypeVar("_T")


class Parts(Generic[_T]):
    """Rows of a task in parts of ``size``, each with a Parquet file of its own in ``folder``.

    own: the rows of the parts that are this process's, by number of the part.
    """

    def __init__(self, rows: Sequence[_T], size: int, folder: Path) -> None:
        process = processes()
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        self.own = dict(list(enumerate(parts))[process.process_index :: process.num_processes])
        self._files = [folder / f"{number}.parquet" for number in range(len(parts))]

    def write(self, make: Callable[[Sequence[_T]], pa.Table], on_part: Callable[[Sequence[_T]], object]) -> None:
        """Makes the own parts that no earlier run has made. on_part: called with the rows of each that is there."""
        for number, part in self.own.items():
            if not self._files[number].is_file():
                write_table(self._files[number], make(part))
            on_part(part)

    def read(self) -> list[pa.Table]:
        """All parts in order; all processes must have written theirs."""
        return [pq.read_table(file) for file in self._files]


def write_table(file: Path, table: pa.Table) -> None:
    """Writes a whole Parquet file or none."""
    with replacing(file) as draft:
        pq.write_table(table, draft)


def noted(table: pa.Table, notes: Mapping[str, Any]) -> pa.Table:
    """The table with notes, which :func:`notes_of` finds again, in place of any that it has."""
    return table.replace_schema_metadata({_METADATA: json.dumps(notes)})


def notes_of(table: pa.Table | Path) -> dict[str, Any]:
    """The notes of a table, or of a file that may be missing or damaged; empty where there are none."""
    try:
        schema = pq.read_schema(table) if isinstance(table, Path) else table.schema
    except (OSError, pa.ArrowException):
        return {}
    notes: dict[str, Any] = json.loads((schema.metadata or {}).get(_METADATA, b"{}"))
    return notes
