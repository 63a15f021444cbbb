"""The nouns that every part shares: what is embedded, what is asked, what is found."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from PIL import Image

from quarterlight.errors import InputError, did_you_mean


class ArchiveMember(NamedTuple):
    """A picture inside a zip archive, read without unpacking the archive."""

    archive: str
    member: str


ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | ArchiveMember"
"""Where a picture comes from: a file, its bytes, an opened picture, or a member of a zip archive. Never a URL."""

_ONE_IMAGE = (str, bytes, os.PathLike, Image.Image, ArchiveMember)

ItemLike: TypeAlias = "Item | str | os.PathLike[str] | Image.Image | Mapping[str, Any]"
"""What the public methods accept in place of an :class:`Item`."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that can be embedded: text, pictures, or both.

    text: the words; empty or ``None`` when there are none.
    image: one picture or several (in reading order); ``None`` when there are none.
    instruction: overrides the instruction given to the whole call; ``None`` keeps it.
    max_tiles: the most tiles a picture is cut into (a thumbnail is added to more than one): 1 for natural images,
        4 for document pages (Magic-MM-Embedding, section 5.2); ``None`` takes the checkpoint's default.
        A backbone that does not cut pictures lets one have so many times the pixels.
    """

    text: str | None = None
    image: ImageSource | Sequence[ImageSource] | None = None
    instruction: str | None = None
    max_tiles: int | None = None

    def __post_init__(self) -> None:
        if self.text is not None and not isinstance(self.text, str):
            raise InputError(f"Item.text must be a string, got {type(self.text).__name__}.")
        if self.instruction is not None and not isinstance(self.instruction, str):
            raise InputError(f"Item.instruction must be a string, got {type(self.instruction).__name__}.")
        several = isinstance(self.image, Sequence) and not isinstance(self.image, _ONE_IMAGE)
        for one in self.image if several else (self.image,):  # type: ignore[union-attr]
            if not (isinstance(one, _ONE_IMAGE) or self.image is None):
                raise InputError(
                    "Item.image must be the name of a file, its bytes, a PIL image or several of these, got "
                    f"{type(one).__name__}."
                )
        if self.max_tiles is not None and (not isinstance(self.max_tiles, int) or self.max_tiles < 1):
            raise InputError(f"Item.max_tiles must be a whole number of at least 1, got {self.max_tiles!r}.")

    @classmethod
    def parse(cls, value: ItemLike) -> Item:
        """The item that ``value`` stands for.

        A string is always text, also when it looks like a path; a ``pathlib.Path`` or an opened picture is an image; a
        mapping holds the fields of an item.  Raises InputError for anything else, and for unknown keys.

        >>> Item.parse("a red apple").modality
        'text'
        >>> Item.parse({"text": "sliced", "image": "apple.jpg"}).modality
        'image,text'
        """
        if isinstance(value, Item):
            return value
        if isinstance(value, str):
            return cls(text=value)
        if isinstance(value, (Image.Image, Path, ArchiveMember)):
            return cls(image=value)
        if isinstance(value, Mapping):
            known = ("text", "image", "instruction", "max_tiles")
            for key in value:
                if key not in known:
                    raise InputError(f"An item has no field {key!r}. {did_you_mean(str(key), known)}")
            return cls(**value)
        raise InputError(
            "An item is text, a pathlib.Path, a PIL image, a mapping such as {'text': ..., 'image': ...} or an Item; "
            f"got {type(value).__name__}."
        )

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """The pictures, in order; empty when there are none."""
        if self.image is None:
            return ()
        if isinstance(self.image, _ONE_IMAGE):
            return (self.image,)
        return tuple(self.image)

    @property
    def modality(self) -> str:
        """``"text"``, ``"image"`` or ``"image,text"``, as M-BEIR writes it. An empty item counts as text."""
        if not self.images:
            return "text"
        return "image,text" if self.text and self.text.strip() else "image"


@dataclass(frozen=True, kw_only=True)
class Query:
    """A question with its known answers.

    positives, negatives: ids of candidates; negatives are hard negatives, labelled or mined, and may be empty.
    also_relevant: ids of candidates judged relevant: never a negative of this query, and never its target in training.
    candidates: ids of those that this query alone chooses from, in the order of the data; empty for the whole pool.
    excluded: ids of candidates that may not be found, such as pictures that the query has shown.
    grades: id of a positive -> how relevant it is; 1 where it is not named.
    fields: everything else the dataset says about the row (``lang``, ``text_kind``, ``change``, ...).
    """

    qid: str
    item: Item
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    also_relevant: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    grades: Mapping[str, int] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something that can be found, known by its id."""

    did: str
    item: Item


class Problem(NamedTuple):
    """A query, a candidate or a row of a file that cannot be used, and why."""

    id: str
    reason: str
