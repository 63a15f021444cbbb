"""What training writes down when data or loss go wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from quarterlight.errors import DatasetError, RecipeError
from quarterlight.files import replace_file
from quarterlight.training.distributed import rank

_FIRST = 200  # pictures; the share of fewer says little


class PictureLog:
    """Counts the pictures of all processes, and adds each that cannot be read once to ``unreadable.txt``.

    max_unreadable: share of the pictures above which :meth:`add` stops the run.
    """

    def __init__(self, folder: Path, max_unreadable: float) -> None:
        self.file = folder / "unreadable.txt"
        self.max_unreadable = max_unreadable
        self.num_pictures = 0
        self.num_unreadable = 0
        self._example = ""

    def add(self, num_pictures: int, reasons: Sequence[str]) -> None:
        """Takes notes of a batch.

        num_pictures: of all processes.  reasons: a sentence for each of them that cannot be read.
        Raises DatasetError, on all processes, when there are too many.
        """
        self.num_pictures += num_pictures
        self.num_unreadable += len(reasons)
        if reasons:
            self._example = reasons[0]
            self._write(reasons)
        if self.num_pictures >= _FIRST and self.num_unreadable > self.max_unreadable * self.num_pictures:
            raise DatasetError(
                f"{self.num_unreadable} of the {self.num_pictures} pictures seen so far cannot be read, more than "
                f"max_unreadable ({self.max_unreadable}) allows: mend those listed in {self.file}, or raise it. "
                f"For example: {self._example}"
            )

    def _write(self, reasons: Sequence[str]) -> None:
        if rank() != 0:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+", encoding="utf-8") as stream:
            stream.seek(0)
            known = {*stream.read().splitlines()}
            stream.writelines(f"{reason}\n" for reason in dict.fromkeys(reasons) if reason not in known)


def stop_at(folder: Path, step: int, value: float, *, what: str, **ids: Any) -> NoReturn:
    """Saves what a batch held whose loss or gradient is not finite to ``nonfinite.json``, and raises RecipeError."""
    file = folder / "nonfinite.json"
    values: Mapping[str, Any] = {"step": step, what: str(value), **ids}
    replace_file(file, json.dumps(values, indent=2))
    raise RecipeError(
        f"The {what} became {value} at step {step}: look at the batch, whose ids are in {file}, and mend the data; or "
        "begin the stage anew, in another folder, with a lower learning rate. The last checkpoint is kept."
    )
