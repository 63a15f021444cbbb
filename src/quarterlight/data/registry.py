"""The published datasets of this field: what each is, where it lies, and the instructions that the paper gives it.

The tables are ``resources/datasets.csv`` and ``resources/instructions.csv``; every fact in them names its source.
Beside them lie the texts to take off the front of MMEB's (``mmeb_prefixes.csv``) and the instructions of M-BEIR
(``mbeir_instructions.csv``).
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from importlib.resources import files
from typing import Literal, TypeAlias, get_args

from quarterlight.errors import InputError, did_you_mean

DatasetRole: TypeAlias = Literal[
    "train-stage1",
    "train-stage2",
    "train-stage3",
    "eval-mmeb",
    "eval-visdoc",
    "eval-crossmodal",
    "eval-mbeir",
    "eval-zeroshot",
]
"""What a dataset is used for; the stages are those of Magic-MM-Embedding."""

_UNITS = {"": 1, "K": 1_000, "M": 1_000_000}
_PARTS = re.compile(r"^MMEB-train/|_(?:t2i|i2t)$| train set$| \(.*\)$")
# registry -> instructions, as printed
_SPELLINGS = {"ColPali": "Colpali", "InfographicsVQA": "InfographicVQA", "Country211": "Country-211"}
_DIRECTIONS = {("N24News", "IT→T"): "IT→I"}  # the paper's Table 12 has it among the searches for pictures


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """One use of a dataset: a role and a direction. A dataset with several uses has an entry for each.

    Empty is what does not apply, "unknown" is what no source says.
    """

    name: str
    """as recipes write it; the parts of a collection have its name before a slash: MMEB-train/CIRR"""
    role: DatasetRole
    meta_task: str
    """group in the table that the dataset comes from"""
    direction: str
    """query → candidate (T text, I image, VD visual document, V video), or generative SFT"""
    in_distribution: str
    """IND or OOD, as MMEB divides its sets"""
    metric: str
    """that the benchmark reports"""
    hub_id: str
    """repository on the Hugging Face hub"""
    hub_subset: str
    """its configs, divided by bars"""
    split: str
    num_queries: str
    """with ~ where a source rounds; see :attr:`size`"""
    pool: str
    """what is searched: the query's own list, or one corpus"""
    license: str
    source_of_fact: str
    pool_size: str
    hub_revision: str
    notes: str

    @property
    def task(self) -> str | None:
        """The direction as our task names spell it, ``t2vd``; ``None`` for what is no retrieval between these."""
        name = self.direction.replace("→", "2").lower()
        return name if re.fullmatch(r"(t|i|it)2(t|i|it|vd)", name) else None

    @property
    def size(self) -> int | None:
        """``num_queries`` as a number, as exact as its source; ``None`` where it is unknown."""
        number = re.match(r"[~>]?(\d[\d.]*)([KM]?)\b", self.num_queries)
        return None if number is None else round(float(number[1]) * _UNITS[number[2]])

    @property
    def instructions(self) -> tuple[str | None, str] | None:
        """(query, target) as in Tables 11 and 12 of the paper; ``None`` for a dataset that they do not have.

        The query's is ``None`` where it comes with the row, as in mmE5-synthetic.
        """
        name = self.name
        while (shorter := _PARTS.sub("", name)) != name:
            name = shorter
        direction = _DIRECTIONS.get((name, self.direction), self.direction)
        return _instructions().get((_SPELLINGS.get(name, name), direction))


@cache
def _entries() -> tuple[DatasetEntry, ...]:
    return tuple(DatasetEntry(**row) for row in resource_rows("datasets.csv"))  # type: ignore[arg-type]


@cache
def _instructions() -> dict[tuple[str, str], tuple[str | None, str]]:
    return {
        (row["dataset"], row["task"]): (
            None if row["query_instruction"] == "-" else row["query_instruction"],
            row["target_instruction"],
        )
        for row in resource_rows("instructions.csv")
    }


def resource_rows(name: str) -> list[dict[str, str]]:
    """The rows of a table among this package's resources, by column."""
    text = (files("quarterlight.data") / "resources" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def datasets(role: DatasetRole | None = None) -> list[DatasetEntry]:
    """All entries, or those of one role, in the order of the papers' tables. Raises InputError for an unknown role."""
    if role is not None and role not in get_args(DatasetRole):
        raise InputError(f"There is no role {role!r} of datasets. {did_you_mean(role, get_args(DatasetRole))}")
    return [entry for entry in _entries() if role in (None, entry.role)]


def find(name: str) -> list[DatasetEntry]:
    """The entries of a dataset by its exact name: one for each role and direction in which it is used.

    Raises InputError, with the nearest names, when there is none.

    >>> [entry.role for entry in find("MMEB-train/CIRR")]
    ['train-stage2', 'train-stage3']
    """
    found = [entry for entry in _entries() if entry.name == name]
    if found:
        return found
    names = sorted({entry.name for entry in _entries()})

    def likeness(other: str) -> tuple[float, float]:
        # first without the collection's name, which would make all of its parts alike
        part, other_part = (one.rpartition("/")[2].lower() for one in (name, other))
        return SequenceMatcher(None, part, other_part).ratio(), SequenceMatcher(None, name, other).ratio()

    near = [one for one in sorted(names, key=likeness, reverse=True)[:3] if likeness(one)[0] > 0.6]
    hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise InputError(
        f"The registry of datasets has no {name!r}. {hint}"
        f"Its {len(names)} names are in the first column of quarterlight/data/resources/datasets.csv."
    )
