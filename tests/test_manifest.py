"""What a manifest says about where a result comes from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quarterlight import manifest


def test_environment_is_plain_json_with_versions_and_hardware() -> None:
    environment = json.loads(json.dumps(manifest.environment()))
    assert environment["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["versions"]["numpy"]
    assert environment["hardware"]["cpu_cores"] >= 1


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_is_that_of_the_checkout_and_dirty_says_if_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "src" / "quarterlight"
    package.mkdir(parents=True)
    file = package / "manifest.py"
    file.write_text("")

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "first", "--no-verify")
    monkeypatch.setattr(manifest, "_HERE", package)
    assert manifest._revision() == (git("rev-parse", "HEAD"), False)
    file.write_text("changed")
    assert manifest._revision() == (git("rev-parse", "HEAD"), True)
    monkeypatch.setattr(manifest, "_HERE", tmp_path / "venv" / "lib" / "quarterlight")
    assert manifest._revision() == (None, None)


def test_asking_does_not_import_torch() -> None:
    script = (
        "import sys; from quarterlight.manifest import environment; environment(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
