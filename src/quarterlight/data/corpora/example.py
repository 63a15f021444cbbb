"""One row of training data for retrieval, whatever file it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

from quarterlight.data.benchmarks.gallery import Gallery
from quarterlight.data.benchmarks.tables import Place
from quarterlight.errors import DatasetError
from quarterlight.records import ImageSource


class Part(NamedTuple):
    """A query or a candidate: words, pictures in reading order, or both."""

    text: str = ""
    pictures: tuple[ImageSource, ...] = ()

    @property
    def kind(self) -> str:
        """``t``, ``i`` or ``it``, as directions spell it; empty for nothing."""
        return ("i" if self.pictures else "") + ("t" if self.text.strip() else "")


class Example(NamedTuple):
    """A query and what answers it, with what does not."""

    place: Place
    query: Part
    positives: tuple[Part, ...]
    negatives: tuple[Part, ...] = ()


Examples: TypeAlias = "Iterator[Example | DatasetError]"
"""Rows in order; an error, with file and row, in the place of one that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training data as it is published.

    path: the file, or the folder of the repository.  task, split: to make of it; ``train`` for most.
    images: folder or zip archive that pictures are named relative to; ``None`` for the folder of ``path``.
    options: what the layout has several of: config, columns.
    """

    path: Path
    task: str
    split: str = "train"
    images: Path | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder of the files."""
        return self.path if self.path.is_dir() else self.path.parent

    def gallery(self) -> Gallery:
        """Where its pictures are."""
        images = self.images or self.folder
        return Gallery([], [images]) if images.is_file() else Gallery([images])


def placed(place: Place, error: DatasetError) -> DatasetError:
    """The error with its place, which those of pictures do not have."""
    return error if str(error).startswith(str(place)) else DatasetError(f"{place}: {str(error).rstrip('.')}.")
