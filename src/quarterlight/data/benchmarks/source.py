"""Which dataset a loader reads, and where."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quarterlight.errors import DatasetError
from quarterlight.files import replace_file
from quarterlight.records import ImageSource


@dataclass(frozen=True, kw_only=True)
class Source:
    """One use of a dataset in one direction.

    dataset, task, split: as the result names them.
    folder: of the files, in the layout in which they are published.
    options: what the layout has several of: config, file, kind.
    max_tiles: of every picture: 1 for photographs, 4 for pages (Magic-MM-Embedding, section 5.2).
    pictures: where pictures that lie inside tables are kept as files, one for each content; ``None`` keeps their bytes
        in memory.
    revision: of the data, where it is known.
    """

    dataset: str
    task: str
    split: str
    folder: Path
    options: Mapping[str, str] = field(default_factory=dict)
    max_tiles: int = 1
    pictures: Path | None = None
    revision: str | None = None

    def option(self, name: str, default: str | None = None) -> str:
        """The value of an option.  Raises DatasetError when there is neither one nor a default."""
        value = self.options.get(name, default)
        if value is None:
            raise DatasetError(f"{self.dataset}: its loader needs to be told the option {name!r}.")
        return value

    def keep(self, picture: bytes) -> ImageSource:
        """A picture of a table, as a file if there is a folder for them."""
        if self.pictures is None:
            return picture
        name = hashlib.sha256(picture).hexdigest()
        path = self.pictures / name[:2] / name
        if not path.exists():
            replace_file(path, picture)
        return str(path)
