"""The command line as a program: help, errors, exit codes, pipes, Ctrl-C."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import quarterlight
from quarterlight.cli import console, main

HELP_SECONDS = 0.5

STUBS = """
import atexit
import time

import typer

from quarterlight.cli import main
from quarterlight.errors import StoreError


def broken() -> None:
    raise StoreError("There is no index here:\\n make one with quarterlight index.")


def buggy() -> None:
    secret = "hunter2"
    raise RuntimeError("our own bug")


def chatty() -> None:
    while True:
        typer.echo("x" * 1000)


def slow() -> None:
    typer.echo("ready")
    time.sleep(30)


def stubborn() -> None:
    atexit.register(lambda: (typer.echo("leaving"), time.sleep(30)))
    slow()


main.COMMANDS = {name: ("__main__:" + name, "For tests.") for name in ("broken", "buggy", "chatty", "slow", "stubborn")}
main.main()
"""
"""A program of the same machinery with commands that fail in every way."""


@pytest.fixture
def stubs(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    script = tmp_path / "stubs.py"
    script.write_text(STUBS)
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), *arguments]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["quarterlight", *arguments])
    with pytest.raises(SystemExit) as left:
        main.main()
    return int(left.value.code or 0)


def commands(table: dict[str, object], *above: str) -> Iterator[tuple[str, ...]]:
    for name, entry in table.items():
        yield from commands(entry, *above, name) if isinstance(entry, dict) else [(*above, name)]


@pytest.mark.parametrize("command", list(commands(main.COMMANDS)), ids=" ".join)
def test_every_command_helps_with_an_example(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command, "--help", monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    example = [line for line in shown.splitlines() if line.strip().startswith(f"quarterlight {' '.join(command)}")]
    assert example, f"quarterlight {' '.join(command)} --help shows no example:\n{shown}"


def test_help_lists_commands_without_importing_them() -> None:
    script = (
        "import sys; sys.argv = ['quarterlight', '--help']\n"
        "from quarterlight.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'lancedb', 'rich', 'quarterlight.cli.index'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        after = os.times()  # of the processor: on a busy machine the clock on the wall measures the others
        seconds.append(after.children_user - before.children_user + after.children_system - before.children_system)
        assert done.returncode == 0, done.stderr
    assert "evaluate" in done.stdout and "bench" in done.stdout
    assert min(seconds) < HELP_SECONDS


@pytest.mark.parametrize(
    ("arguments", "rerank", "others"),
    [
        (["red"], 0, ["red"]),
        (["red", "--rerank"], 5, ["red"]),
        (["--rerank", "red"], 5, ["red"]),
        (["--rerank", "--json", "red"], 5, ["red"]),
        (["--rerank", "10", "red"], 10, ["red"]),
        (["red", "--rerank", "0"], 0, ["red"]),
        (["--rerank=7", "red"], 7, ["red"]),
        (["--rerank", "--", "12"], 5, ["12"]),
        (["--", "--rerank"], 0, ["--rerank"]),
    ],
)
def test_rerank_takes_a_number_or_stands_alone(arguments: list[str], rerank: int, others: list[str]) -> None:
    search = main.program().commands["search"].make_context("search", [*arguments])
    assert (search.params["rerank"], [search.params["text"]]) == (rerank, others)
    evaluate = main.program().commands["evaluate"].make_context("evaluate", [*arguments])
    assert (evaluate.params["rerank"], [str(folder) for folder in evaluate.params["folders"]]) == (rerank, others)
    if rerank:  # of which there is nothing to tune without one
        tune = main.program().commands["tune-fusion"].make_context("tune-fusion", ["--model", "x", *arguments])
        assert (tune.params["rerank"], [str(folder) for folder in tune.params["folders"]]) == (rerank, others)


def test_other_numbers_are_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("search", "red", "--rerank", "-1", monkeypatch=monkeypatch) == 2  # not taken for a word to look for
    assert "Invalid value for '--rerank'" in capsys.readouterr().err
    assert run("tune-fusion", "data", "--model", "x", "--rerank", "0", monkeypatch=monkeypatch) == 2
    assert "Invalid value for '--rerank'" in capsys.readouterr().err


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == f"quarterlight {quarterlight.__version__}\n"


def test_changelog_knows_the_version() -> None:
    changelog = Path(__file__).resolve().parents[2] / "CHANGELOG.md"
    assert f"## {quarterlight.__version__}" in changelog.read_text(encoding="utf-8")


def test_wrong_usage_leaves_with_2_and_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serach", monkeypatch=monkeypatch) == 2
    assert "Did you mean 'search'?" in capsys.readouterr().err


def test_user_error_is_one_line_on_stderr(stubs: Callable[..., subprocess.Popen[str]]) -> None:
    process = stubs("broken")
    out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert err == "Error: There is no index here: make one with quarterlight index.\n"


def test_our_bug_shows_a_plain_traceback(stubs: Callable[..., subprocess.Popen[str]]) -> None:
    process = stubs("buggy")
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.splitlines()[-1] == "RuntimeError: our own bug"
    assert "hunter2" not in err, "the values of local variables do not belong into a terminal or a log"


def test_closed_pipe_is_quiet(stubs: Callable[..., subprocess.Popen[str]]) -> None:
    process = stubs("chatty")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=10) == main.BROKEN_PIPE
    assert process.stderr.read() == ""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_is_one_line(stubs: Callable[..., subprocess.Popen[str]]) -> None:
    process = stubs("slow")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n" or process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == main.INTERRUPTED
    assert process.stderr.read() == "Stopped.\n"


def test_the_program_is_called_as_the_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "two words"
    scripts = here / ".venv" / "bin"
    scripts.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    assert console.program() == f"'{scripts / 'python'}' -m quarterlight"
    (scripts / "quarterlight").touch(mode=0o755)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert console.program() == ".venv/bin/quarterlight"
    monkeypatch.chdir(scripts)
    assert console.program() == "./quarterlight"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert console.program() == f"'{scripts / 'quarterlight'}'"
    monkeypatch.setenv("PATH", f"/usr/bin:{scripts}")
    assert console.program() == "quarterlight"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_second_ctrl_c_ends_it_at_once(stubs: Callable[..., subprocess.Popen[str]]) -> None:
    process = stubs("stubborn")
    assert process.stdout is not None and process.stderr is not None
    for said in ("ready\n", "leaving\n"):
        assert process.stdout.readline() == said
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT
    assert process.stderr.read() == "Stopped.\n"


def test_json_is_one_line_of_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"path": "caf\u00e9/\udcff.png", "file": Path("a b"), "text": "two\nlines"}
    console.print_json(value)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and line.isascii()
    assert json.loads(line) == value | {"file": "a b"}
    with pytest.raises(ValueError, match="JSON"):
        console.print_json({"score": math.nan})


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("pages") as bar:
        assert list(bar.track(range(3), description="Reading")) == [0, 1, 2]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
