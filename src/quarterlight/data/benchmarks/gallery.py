"""Pictures of a published dataset by the paths that its rows give: in folders, or in zip archives that stay packed."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from quarterlight.errors import DatasetError
from quarterlight.records import ArchiveMember, ImageSource


class Gallery:
    """Finds pictures; none is opened here.

    folders: tried in order, the path below each.  archives: likewise, those that exist; a folder inside the archive
        that the paths do not name is passed over, since publishers differ in what they pack.
    Folders are listed once, which is much faster than asking for each of a million files.
    """

    def __init__(self, folders: Iterable[Path], archives: Iterable[Path] = ()) -> None:
        self.folders = [folder for folder in folders if folder.is_dir()]
        self.archives = [archive for archive in archives if archive.is_file()]
        self._listed: dict[Path, frozenset[str]] = {}
        self._members: dict[Path, dict[str, list[str]]] = {}
        self._found: dict[str, ImageSource] = {}

    def find(self, path: str) -> ImageSource:
        """The picture of a path; the same object for the same path, so that a large pool costs one reference a row.

        Raises DatasetError, as the end of a sentence, for a picture that is not there and a path that leaves the
        folder.
        """
        found = self._found.get(path)
        if found is None:
            pure = PurePosixPath(path)
            if pure.is_absolute() or ".." in pure.parts:
                raise DatasetError(f"the picture path {path!r} leaves the dataset's folder")
            found = self._found[path] = self._search(path)
        return found

    def _search(self, path: str) -> ImageSource:
        for folder in self.folders:
            file = folder / path
            if file.name in self._list(file.parent):
                return str(file)
        for archive in self.archives:
            for member in self._index(archive).get(path.rpartition("/")[2], ()):
                if member == path or member.endswith(f"/{path}"):
                    return ArchiveMember(str(archive), member)
        where = ", ".join(map(str, [*self.folders, *self.archives])) or "any folder or archive of the dataset"
        raise DatasetError(f"the picture {path!r} is not in {where}")

    def _list(self, folder: Path) -> frozenset[str]:
        if folder not in self._listed:
            try:
                self._listed[folder] = frozenset(entry.name for entry in os.scandir(folder))
            except OSError:
                self._listed[folder] = frozenset()
        return self._listed[folder]

    def _index(self, archive: Path) -> dict[str, list[str]]:
        """The members of an archive by the last part of their names."""
        if archive not in self._members:
            index: dict[str, list[str]] = {}
            try:
                with zipfile.ZipFile(archive) as file:
                    for member in file.namelist():
                        index.setdefault(member.rpartition("/")[2], []).append(member)
            except (OSError, zipfile.BadZipFile) as error:
                raise DatasetError(f"the archive {archive} cannot be read ({error}): is it truncated") from error
            self._members[archive] = index
        return self._members[archive]
