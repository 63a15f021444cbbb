"""Files are there whole or not at all, whoever writes them at the same time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from quarterlight.files import UNFINISHED, replace_file, replacing


def drafts(folder: Path) -> list[Path]:
    return sorted(folder.glob(f".*{UNFINISHED}"))


def test_two_writers_of_one_file_at_once(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    with replacing(file) as first:
        first.write_text("first")
        with replacing(file) as second:
            second.write_text("second")
        assert (file.read_text(), first.read_text()) == ("second", "first")
    assert file.read_text() == "first"  # who ends last has the say
    assert [*tmp_path.iterdir()] == [file]


def test_a_writer_that_fails_leaves_the_draft_of_another(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    with replacing(file) as draft:
        draft.write_text("whole")
        with pytest.raises(ZeroDivisionError), replacing(file) as other:
            other.write_text("half")
            1 / 0  # noqa: B018
        assert drafts(tmp_path) == [draft]
    assert file.read_text() == "whole"


def test_drafts_of_killed_processes_go(tmp_path: Path) -> None:
    """But neither young ones, which may be written on, nor what others call a part."""
    elsewhere = tmp_path / "elsewhere"
    with replacing(elsewhere / "scores.json") as draft:
        draft.touch()
        names = [draft.name, draft.name.replace("scores", "others")]
    folder = tmp_path / "folder"
    folder.mkdir()
    foreign = [".film.1.part", "film.part"]
    long_ago = time.time() - 2 * 24 * 60 * 60
    for name in (*names, *foreign):
        (folder / name).touch()
        os.utime(folder / name, (long_ago, long_ago))
    young = folder / names[0].replace("scores", "young")
    young.touch()
    replace_file(folder / "scores.json", "{}")
    assert {one.name for one in folder.iterdir()} == {"scores.json", young.name, *foreign}
