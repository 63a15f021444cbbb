"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".part"
"""How the names of files end that are being written, or were when a process was killed."""


@contextmanager
def replacing(file: Path, *, parents: bool = True) -> Iterator[Path]:
    """A hidden name beside ``file`` to write under, which takes its place at the end.

    parents: makes folders on the way.
    What fails leaves ``file`` as it was, and nothing beside it.  Processes may write the same file at once.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder) / "new" / "words.txt") as draft:
    ...         _ = draft.write_text("all of them")
    ...     (Path(folder) / "new" / "words.txt").read_text()
    'all of them'
    """
    if parents:
        file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}{UNFINISHED}")
    try:
        yield draft
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def replace_file(file: Path, content: str | bytes, *, parents: bool = True) -> None:
    """Writes a whole file or none; text as UTF-8.  parents: makes folders on the way."""
    with replacing(file, parents=parents) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
