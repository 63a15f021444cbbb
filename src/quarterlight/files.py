"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

UNFINISHED = ".part"
"""How the names of files end that are being written, or were when a process was killed."""

_DRAFT = re.compile(rf"\..+\.[0-9]+\.[0-9a-f]{{16}}{re.escape(UNFINISHED)}")
_OLD_S = 24 * 60 * 60  # without a write: whoever wrote it has been killed


@contextmanager
def replacing(file: Path, *, parents: bool = True) -> Iterator[Path]:
    """A hidden name beside ``file`` to write under, which takes its place at the end.

    parents: makes folders on the way.
    What fails leaves ``file`` as it was, and nothing beside it.  Processes and threads may write the same file at once:
    the last one to end has the say.  Drafts of processes that were killed more than a day ago go when a process first
    writes to the folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder) / "new" / "words.txt") as draft:
    ...         _ = draft.write_text("all of them")
    ...     (Path(folder) / "new" / "words.txt").read_text()
    'all of them'
    """
    if parents:
        file.parent.mkdir(parents=True, exist_ok=True)
    _tidy(file.parent)
    # containers and the nodes of a cluster number their processes alike
    draft = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(8)}{UNFINISHED}")
    try:
        yield draft
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def replace_file(file: Path, content: str | bytes, *, parents: bool = True) -> None:
    """Writes a whole file or none; text as UTF-8.  parents: makes folders on the way."""
    with replacing(file, parents=parents) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


@lru_cache(maxsize=1024)  # a folder may hold very many files: it is looked through once, not with every file
def _tidy(folder: Path) -> None:
    """Removes the drafts in a folder that nobody writes any more."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _DRAFT.fullmatch(entry.name):
                with suppress(OSError):  # another process may be tidying up as well
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > _OLD_S:
                        Path(entry.path).unlink()
