"""``quarterlight data``: exit codes, counts and problems."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.data import layouts

from quarterlight.cli.main import program

FIXTURE = Path(__file__).parents[1] / "fixtures" / "retrieval"


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, stdout and stderr (without line breaks) of ``quarterlight data`` with these arguments."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            program()(args=["data", *map(str, arguments)], prog_name="quarterlight")
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, " ".join(err.split())

    return call


@pytest.fixture
def rows(tmp_path: Path, picture: Callable[..., Image.Image]) -> Path:
    """A file of a conversation with a picture, one without, and two that are no good."""
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"nothing")
    answer = {"role": "assistant", "content": "an apple"}
    file = tmp_path / "rows.jsonl"
    lines: list[dict[str, Any]] = [
        {"id": 1, "messages": [{"role": "user", "content": "<image>"}, answer], "images": ["a.png"]},
        {"id": 2, "messages": [{"role": "user", "content": "What?"}, answer]},
        {"id": 2, "messages": [{"role": "user", "content": "<image>"}, answer], "images": ["b.png"]},
        {"messages": [answer]},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_check_lists_problems_by_line(run: Run, rows: Path) -> None:
    code, out, err = run("check", rows)
    assert code == 1 and "Problems: 3." in err
    for problem in (
        "line 3: the id '2' occurs a second time",
        f"line 3: {rows.parent / 'b.png'} is not a picture",
        "line 4: turn 1 must be the user's",
    ):
        assert problem.replace(" ", "") in err.replace(" ", "")  # lines may break anywhere
    assert "picture" in out


def test_check_counts_tokens(run: Run, rows: Path, tiny_checkpoint: Path) -> None:
    rows.write_text("".join(line + "\n" for line in rows.read_text().splitlines()[:2]))
    code, out, _ = run("check", rows, "--model", tiny_checkpoint, "--max-tiles", "1", "--json")
    (found,) = json.loads(out)
    assert code == 0 and found["problems"] == []
    counts = found["counts"]
    assert (counts["picture"], counts["text"], counts["turns"], counts["tiles"]) == (1, 1, 4, 1)
    assert 0 < counts["labelled tokens"] < counts["most tokens"] * 2 < counts["tokens"] * 2


def test_check_of_retrieval_datasets(run: Run, tmp_path: Path) -> None:
    code, _, err = run("check", FIXTURE)
    assert (code, "No problems." in err) == (0, True)
    shutil.copytree(FIXTURE / "emoji", tmp_path / "emoji")
    (tmp_path / "emoji" / "images.zip").unlink()
    pool = tmp_path / "emoji" / "pools" / "i2i.train.jsonl"
    pool.write_text(pool.read_text() + "{\n")
    code, _, err = run("check", tmp_path, "--json")
    assert code == 1
    code, out, _ = run("check", tmp_path / "emoji", "--json")
    problems = [problem for one in json.loads(out) for problem in one["problems"]]
    assert any("i2i.train.jsonl, line" in problem and "not a line of JSON" in problem for problem in problems)
    assert any(problem.startswith("emoji/t2i.train, 101:") and "cannot be read" in problem for problem in problems)


def test_check_of_nothing(run: Run, tmp_path: Path) -> None:
    code, _, err = run("check", tmp_path / "nothing.jsonl")
    assert code == 1 and "does not exist" in err
    (tmp_path / "empty.jsonl").touch()
    code, _, err = run("check", tmp_path)
    assert code == 1 and "no conversations" in err


def test_convert_says_what_became_of_the_rows(run: Run, rows: Path) -> None:
    out = rows.with_name("clean.jsonl")
    code, stdout, stderr = run("convert", rows, "--from", "messages", "--out", out, "--json")
    counts = json.loads(stdout)
    assert code == 0 and len(counts["problems"]) == 1 and "line 4" in stderr
    assert (counts["read"], counts["written"], counts["duplicates"]) == (4, 3, 0)
    assert run("check", out)[0] == 1  # the picture that is none is still named
    code, _, stderr = run("convert", rows, "--from", "message", "--out", out)
    assert code == 1 and "There is no layout 'message'" in stderr
    code, _, stderr = run("convert", rows, "--from", "grounding", "--boxes", "xyz", "--out", out)
    assert code == 1 and "xyxy or xywh" in stderr


def test_training_data_becomes_a_retrieval_folder(run: Run, tmp_path: Path) -> None:
    layouts.write_mme5(tmp_path / "mme5")
    arguments = ["convert", tmp_path / "mme5", "--from", "mme5", "--to", "retrieval", "--out", tmp_path / "out"]
    code, _, err = run(*arguments, "--task", "i2t", "--option", "config=Retrieval")
    assert code == 1 and "2 rows are of another direction than i2t" in err
    code, out, _ = run(*arguments, "--task", "t2i", "--option", "config=Retrieval", "--json")
    assert code == 0
    assert json.loads(out)["queries"] == 1 and json.loads(out)["other"] == 1
    code, _, err = run("check", tmp_path / "out")
    assert (code, err) == (0, "No problems.")
    assert "--to retrieval needs a --task" in run(*arguments)[2]
    assert "written name=value, got 'config'" in run(*arguments, "--task", "t2i", "--option", "config")[2]
