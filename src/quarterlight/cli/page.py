"""The page of results that a command writes, see :mod:`quarterlight.search.contact_sheet`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quarterlight.errors import InputError
from quarterlight.images import describe
from quarterlight.records import ItemLike

if TYPE_CHECKING:
    from quarterlight.search.contact_sheet import Hits


def check_page(file: Path) -> None:
    """Raises InputError when a page cannot be written there, as far as one can see before a model is loaded."""
    folder = file.absolute().parent
    if not folder.is_dir():
        raise InputError(f"{describe(file)} cannot be written: there is no folder {describe(folder)}.")
    if file.is_dir():
        raise InputError(f"{describe(file)} cannot be written: it is a folder.")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{describe(file)} cannot be written: {describe(folder)} is closed to writing.")


def write_page(file: Path, results: Sequence[tuple[ItemLike, Hits]], *, title: str) -> None:
    """Writes queries and their hits. Raises InputError when the file cannot be written."""
    from quarterlight.search.contact_sheet import write_contact_sheet

    try:
        write_contact_sheet(file, results, title=title)
    except OSError as error:
        raise InputError(f"{describe(file)} cannot be written: {error.strerror}.") from error
