"""What a result was made with: hardware, versions and commit, as every manifest and benchmark records them."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "quarterlight",
    "torch",
    "transformers",
    "sentence-transformers",
    "accelerate",
    "tokenizers",
    "numpy",
    "pillow",
    "lancedb",
    "pypdfium2",
)
"""Distributions whose version can change a result."""

_HERE = Path(__file__).resolve().parent


def environment() -> dict[str, Any]:
    """The state of this process as plain JSON: ``time``, ``commit``, ``dirty``, ``versions``, ``hardware``.

    commit is ``None``, and so is dirty, unless the package runs from a git checkout of its own.  GPUs are listed only
    if torch has been imported: asking for them must not be what imports it.  Never raises.
    """
    commit, dirty = _revision()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB and GPUs of this machine."""
    torch = sys.modules.get("torch")
    gpus = []
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": _usable_cores(),
        "threads": torch.get_num_threads() if torch is not None else None,
        "memory_gib": _memory_gib(),
        "gpus": gpus,
    }


def _revision() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this file belongs to, and whether tracked files differ from it."""
    checkout = _HERE.parents[1]
    if not (checkout / ".git").exists() or checkout / "src" / "quarterlight" != _HERE:
        return None, None  # installed, perhaps inside somebody else's repository
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        return commit, bool(_git(checkout, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The model name with the instruction sets that decide how fast bf16 runs, e.g. ``... (avx512_bf16, amx_bf16)``."""
    name, flags = platform.processor() or platform.machine(), ""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = value
                break
    except OSError:
        pass  # not Linux
    extensions = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags.split()]
    return f"{name} ({', '.join(extensions)})" if extensions else name


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
