"""What the commands share when they talk: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from quarterlight.manifest import environment

out = Console(highlight=False)
"""Results: tables a person reads.  Programs read :func:`print_json`."""

err = Console(stderr=True, highlight=False)
"""Progress, warnings and summaries; never mixed into a result."""


class RateColumn(ProgressColumn):
    """``123.4 images/s``: recent speed while running, overall speed once finished."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self.unit}/s" if speed else f"- {self.unit}/s", style="progress.data.speed")


def progress(unit: str = "items", *, quiet: bool = False) -> Progress:
    """A progress bar on stderr with count, rate and time left; silent when stderr is not a terminal.

    unit: plural noun of what is counted, e.g. ``"images"``.

    >>> with progress("pages", quiet=True) as bar:
    ...     for page in bar.track(range(3), description="Reading"):
    ...         pass
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(unit),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=err,
        disable=quiet or not err.is_terminal,
    )


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> Table:
    """An empty table in the house look; columns named in ``right`` hold numbers and are aligned right."""
    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for name in columns:
        result.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return result


def score(value: float | None) -> str:
    """A score as tables show it; nothing where there is none."""
    return "" if value is None else f"{value:.3f}"


def program() -> str:
    """How the program can be called again from this folder: by name only where the shell finds it by name."""
    script = Path(sys.executable).with_name("quarterlight")
    if not script.is_file():
        return f"{shlex.quote(sys.executable)} -m quarterlight"
    found = shutil.which("quarterlight")
    if found is not None and script.samefile(found):
        return "quarterlight"
    here = Path.cwd()
    if script.is_relative_to(here):
        script = script.relative_to(here)
    return shlex.quote(os.path.join(".", script) if script.name == str(script) else str(script))  # noqa: PTH118


def print_json(value: Any) -> None:
    """Write ``value`` to stdout as one line of pure-ASCII JSON, so that no file name and no locale can break it.

    NaN and infinity raise ValueError, since JSON has no word for them; unknown objects are written as ``str(object)``.
    """
    sys.stdout.write(json.dumps(value, ensure_ascii=True, allow_nan=False, default=str) + "\n")
    sys.stdout.flush()


def print_record(record: Mapping[str, Any], out: Path | None) -> None:
    """Print a benchmark's record as JSON, with the command and the environment put in, and write it to ``out``."""
    full = {**record, "command": shlex.join(["quarterlight", *sys.argv[1:]]), **environment()}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(full, indent=1) + "\n", encoding="utf-8")
    print_json(full)
