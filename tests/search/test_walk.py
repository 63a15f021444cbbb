"""The walk finds every file once and says what it could not look at."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.search.files import write_image

from quarterlight.errors import InputError
from quarterlight.search.walk import walk


def names(root: Path, *roots: Path) -> list[str]:
    found = walk(roots or [root])
    return [str(Path(file.path).relative_to(root)) for file in found.files]


def test_kinds_by_suffix_and_by_content(tmp_path: Path) -> None:
    png = write_image(tmp_path / "a.PNG", "red").read_bytes()
    for name, data in {"b": png, "c.bak": b"%PDF-1.4", "d.md": b"", "e.txt": b"", "f.zip": b"PK", "g": b"text"}.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe.png")
    found = walk([tmp_path])
    readers = {Path(file.path).name: file.reader for file in found.files}
    assert readers == {"a.PNG": "image", "b": "image", "c.bak": "pdf", "d.md": "markdown", "e.txt": "text"}
    assert found.num_other == 3 and found.problems == []


def test_hidden_files_and_the_store_are_left_out(tmp_path: Path) -> None:
    for name in ("a.png", ".b.png", ".git/c.png", "store/d.png"):
        write_image(tmp_path / name, "red")
    assert [Path(file.path).name for file in walk([tmp_path], skip=tmp_path / "store").files] == ["a.png"]
    assert names(tmp_path, tmp_path / ".git", tmp_path / ".b.png") == [".b.png", ".git/c.png"]


def test_no_folder_is_entered_twice(tmp_path: Path) -> None:
    write_image(tmp_path / "z" / "a.png", "red")
    (tmp_path / "link").symlink_to("z")
    (tmp_path / "outside").mkdir()
    assert names(tmp_path) == ["z/a.png"]
    assert names(tmp_path, tmp_path, tmp_path / "z") == ["z/a.png"]
    assert names(tmp_path, tmp_path / "link") == ["link/a.png"]


def test_links_that_lead_nowhere_or_round(tmp_path: Path) -> None:
    write_image(tmp_path / "sub" / "a.png", "red")
    (tmp_path / "sub" / "up").symlink_to("..")
    (tmp_path / "sub" / "here").symlink_to(".")
    (tmp_path / "broken.png").symlink_to("missing.png")
    (tmp_path / "x.png").symlink_to("y.png")
    (tmp_path / "y.png").symlink_to("x.png")
    found = walk([tmp_path])
    assert len(found.files) == 1
    assert {Path(path).name: reason for path, reason in found.problems} == {
        "up": "is a symbolic link to a folder that it lies in: not followed",
        "here": "is a symbolic link to a folder that it lies in: not followed",
        "broken.png": "is a broken symbolic link: missing.png does not exist",
        "x.png": "is a symbolic link that leads back to itself",
        "y.png": "is a symbolic link that leads back to itself",
    }


def test_a_link_above_the_root_is_a_loop(tmp_path: Path) -> None:
    write_image(tmp_path / "root" / "a.png", "red")
    write_image(tmp_path / "secret" / "b.png", "red")
    (tmp_path / "root" / "up").symlink_to(tmp_path)
    assert names(tmp_path, tmp_path / "root") == ["root/a.png"]


def test_roots(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing cannot be indexed: No such file"):
        walk([tmp_path / "missing"])
    (tmp_path / "a.zip").write_bytes(b"PK")
    (problem,) = walk([tmp_path / "a.zip"]).problems
    assert "of no kind that is indexed" in problem.reason
