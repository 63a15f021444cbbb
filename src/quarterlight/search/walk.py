"""Which files there are to index, and which cannot even be looked at."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from quarterlight.errors import InputError
from quarterlight.images import describe

Reader: TypeAlias = Literal["image", "pdf", "markdown", "text", "items"]
"""How a file is taken apart; "items" are lists that `embed` is given by name, no walk finds them."""

READERS: dict[str, Reader] = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".jp2", ".avif", ".ico", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".pcx", ".qoi"), "image"),
    ".pdf": "pdf",
    **dict.fromkeys((".md", ".markdown"), "markdown"),
    **dict.fromkeys((".txt", ".text", ".rst"), "text"),
}
"""Suffix, in lower case -> reader."""

_SIGNATURES: tuple[tuple[bytes, Reader], ...] = (
    (b"\xff\xd8\xff", "image"),
    (b"\x89PNG\r\n\x1a\n", "image"),
    (b"GIF8", "image"),
    (b"%PDF-", "pdf"),
)


class FoundFile(NamedTuple):
    """A file worth reading; size in bytes, time of change in ns."""

    path: str
    reader: Reader
    size: int
    mtime_ns: int


class Problem(NamedTuple):
    """A file, folder or part of a file that is not in the index, and why: the end of a sentence that begins with it."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{describe(self.path)}: {self.reason}"


@dataclass
class Walk:
    """What :func:`walk` found.

    files: what to index.  problems: what cannot be looked at; closed: the folders among it.
    num_other: files of other kinds, which are left alone.
    """

    files: list[FoundFile] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    num_other: int = 0

    def is_out_of_sight(self, path: Path) -> bool:
        """Whether a file that was not found may be there all the same: in a closed folder, or on a dead disk."""
        if any(path.is_relative_to(folder) for folder in self.closed):
            return True
        try:
            path.lstat()
        except OSError as error:
            return not isinstance(error, (FileNotFoundError, NotADirectoryError))
        return False


def is_gone(path: str | os.PathLike[str]) -> bool:
    """Whether there is nothing at this path; what cannot be looked at is not gone."""
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def walk(roots: Iterable[str | os.PathLike[str]], *, skip: str | os.PathLike[str] | None = None) -> Walk:
    """All files to index in some files and folders, in order of their names.

    Hidden files and folders (``.name``) are left out unless they are named as roots, and so is the folder ``skip``.
    Symbolic links are followed, but no folder is entered twice.  Raises InputError when a root does not exist.
    """
    found = Walk()
    visited = {_identity(Path(skip).stat())} if skip is not None and Path(skip).exists() else set()
    folders: list[str] = []
    linked: list[str] = []  # entered last, so that a folder is known by its own name rather than by a link's
    for root in reversed([os.path.abspath(root) for root in roots]):  # noqa: PTH100 keeps links
        try:
            status = Path(root).stat()
        except OSError as error:
            raise InputError(f"{describe(root)} cannot be indexed: {error.strerror}.") from error
        if stat.S_ISDIR(status.st_mode):
            folders.append(root)
        elif not _add(found, root, status):
            found.problems.append(Problem(root, "is of no kind that is indexed (pictures, PDFs, .md and .txt)"))
    while folders or linked:
        folder = folders.pop() if folders else linked.pop(0)
        try:
            identity = _identity(Path(folder).stat())
            if identity in visited:
                continue
            visited.add(identity)
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            found.problems.append(Problem(folder, f"cannot be opened: {error.strerror}"))
            found.closed.append(folder)
            continue
        below = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                status = entry.stat()
            except OSError as error:
                found.problems.append(Problem(entry.path, _unreachable(entry, error)))
                continue
            if not stat.S_ISDIR(status.st_mode):
                found.num_other += not _add(found, entry.path, status)
            elif not entry.is_symlink():
                below.append(entry.path)
            elif Path(folder).resolve().is_relative_to(Path(entry.path).resolve()):
                found.problems.append(
                    Problem(entry.path, "is a symbolic link to a folder that it lies in: not followed")
                )
            else:
                linked.append(entry.path)
        folders.extend(reversed(below))
    return found


def _add(found: Walk, path: str, status: os.stat_result) -> bool:
    reader = _reader(path) if stat.S_ISREG(status.st_mode) else None
    if reader is not None:
        found.files.append(FoundFile(path, reader, status.st_size, status.st_mtime_ns))
    return reader is not None


def _reader(path: str) -> Reader | None:
    """By suffix; by the first bytes where the suffix says nothing."""
    known = READERS.get(Path(path).suffix.lower())
    if known is not None:
        return known
    try:
        with Path(path).open("rb") as file:
            head = file.read(16)
    except OSError:
        return None
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image"
    return next((reader for signature, reader in _SIGNATURES if head.startswith(signature)), None)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _unreachable(entry: os.DirEntry[str], error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "is a symbolic link that leads back to itself"
    if error.errno == errno.ENOENT and entry.is_symlink():
        return f"is a broken symbolic link: {describe(Path(entry.path).readlink())} does not exist"
    return f"cannot be looked at: {error.strerror}"
