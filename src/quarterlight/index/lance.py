"""LanceDB in the folder of a store: opened on demand, its errors told as sentences."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quarterlight.errors import StoreError
from quarterlight.images import describe

KEEP_VERSIONS = datetime.timedelta(minutes=10)
"""How long a version of the table outlives its successor, for the sake of searches that are under way."""


def connect(folder: Path) -> Any:
    """The tables in a folder. What is read is what was committed last, by whatever process."""
    import lancedb  # takes a second, which a --help should not

    return lancedb.connect(folder, read_consistency_interval=datetime.timedelta(0))


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Whatever goes wrong inside is a StoreError: the index cannot be read."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        advice = "" if isinstance(error, PermissionError) else " If this stays so, delete the folder and index again."
        raise StoreError(f"The index in {describe(folder)} cannot be read: {_reason(error)}.{advice}") from error


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Whatever goes wrong inside is a StoreError: the index cannot be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise StoreError(
            f"The index in {describe(folder)} cannot be written: {_reason(error)}. What was written before is kept; "
            "run the same command again when this is mended."
        ) from error


def _reason(error: Exception) -> str:
    """``No space left on device`` out of what Lance wraps around it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    inner = re.search(r"LanceError\(\w+\): (.+?)(?: \(os error \d+\))?(?:, /\S+:\d+:\d+|$)", text)
    return (inner[1] if inner else text).rstrip(".")
