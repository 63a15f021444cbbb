from __future__ import annotations

import os

import pytest

from quarterlight.cli import console


@pytest.fixture(autouse=True)
def width_by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are as wide as ``COLUMNS`` says in a test, whatever another test has left behind in its process."""
    for one in (console.out, console.err):
        monkeypatch.setattr(one, "_environ", os.environ)
        monkeypatch.setattr(one, "_width", None)
        monkeypatch.setattr(one, "_height", None)
