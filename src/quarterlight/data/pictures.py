"""Where the pictures of a data file are: beside it, in ``images.zip``, in ``images/``, or in any folders."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from quarterlight.errors import DatasetError
from quarterlight.records import ArchiveMember, ImageSource


class PictureFolder:
    """Turns the relative paths that a data file gives into pictures; none of them is opened here.

    folder: of the data file.  Its ``images.zip`` has the pictures if there is one, else its ``images/``, else itself.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        root = Path(folder)
        self.archive = str(root / "images.zip") if (root / "images.zip").is_file() else None
        self.root = root / "images" if (root / "images").is_dir() else root

    def source(self, path: str) -> ImageSource:
        """The picture of a path.  Raises DatasetError, as the end of a sentence, for one that leaves the folder."""
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts:
            raise DatasetError(f"the picture path {path!r} leaves the dataset's folder")
        return ArchiveMember(self.archive, path) if self.archive else str(self.root / path)
