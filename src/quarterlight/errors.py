"""What can go wrong on the user's side.

    QuarterlightError
    |-- InputError (also ValueError)     an item, picture or argument that cannot be used
    |   |-- ImageError                   a picture that cannot be read, or must not be
    |   `-- NotFiniteError               items whose embeddings are not numbers
    |-- CheckpointError                  a model folder that is missing, incomplete or of another kind
    |-- DatasetError                     a dataset folder, file or row that breaks its format
    |-- RecipeError                      a recipe key or value that is unknown or impossible
    |-- JudgeError                       a judge that cannot be asked, or does not answer
    `-- StoreError                       an index that is missing, or belongs to another model

Every message is a sentence: what was expected, what came, where, and what to do. ``assert`` is kept for our own bugs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

NOT_FINITE = "its embedding is not finite (NaN or infinity)"
"""What lists of problems say of one such item."""


class QuarterlightError(Exception):
    """Base of every error that a user can cause and mend."""


class InputError(QuarterlightError, ValueError):
    """An item, picture or argument that cannot be used."""


class ImageError(InputError):
    """A picture that cannot be read (truncated, not a picture), or must not be (decompression bomb)."""


class NotFiniteError(InputError):
    """Items whose embeddings are not numbers, while those of others are.

    positions: theirs among the items that were given.
    """

    def __init__(self, message: str, positions: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.positions = tuple(positions)


class CheckpointError(QuarterlightError):
    """A model folder that is missing, incomplete or of another kind."""


class DatasetError(QuarterlightError):
    """A dataset folder, file or row that breaks its format."""


class RecipeError(QuarterlightError):
    """A recipe key or value that is unknown or impossible."""


class JudgeError(QuarterlightError):
    """A judge that cannot be asked, or does not answer."""


class StoreError(QuarterlightError):
    """An index that is missing, or that was built with another model."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence for an error message: the nearest known name if there is one, and all of them.

    >>> did_you_mean("tempratur", ["temperature", "seed"])
    "Did you mean 'temperature'? Known: seed, temperature."
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(names)}."


def check_least(recipe: object, **least: float) -> None:
    """Raises RecipeError for the first field that is below what it must be at least; ``None`` is not given.

    >>> check_least(range(3), start=0, stop=4)
    Traceback (most recent call last):
    quarterlight.errors.RecipeError: stop must be at least 4, got 3.
    """
    for name, lowest in least.items():
        value = getattr(recipe, name)
        if value is not None and value < lowest:
            raise RecipeError(f"{name} must be at least {lowest}, got {value}.")


def check_share(recipe: object, *names: str) -> None:
    """Raises RecipeError for the first field that is no share from 0 to 1."""
    for name in names:
        if not 0 <= getattr(recipe, name) <= 1:
            raise RecipeError(f"{name} must be a share from 0 to 1, got {getattr(recipe, name)}.")
