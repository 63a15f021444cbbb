"""Kept memory is not fetched again, seen in a process of its own: this one keeps its allocator as it is."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from quarterlight.cli.allocator import BYTES, OLD_BYTES, OWN_SETTINGS, VARIABLE, embeds, keep_freed_memory

# blocks below the 32 MiB that an older glibc keeps, and more of them than it keeps of itself
FAULTS = """
import ctypes, resource, sys
from quarterlight.cli.measure import MemoryPeak
from quarterlight.cli.allocator import keep_freed_memory
assert keep_freed_memory({}) if sys.argv[1] == "keep" else not keep_freed_memory({"QUARTERLIGHT_KEEP_MEMORY": "0"})
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def layer():
    blocks = [ctypes.c_void_p(libc.malloc(24 * 2**20)) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 24 * 2**20)
    for block in blocks:
        libc.free(block)
layer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    layer()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
with MemoryPeak("cpu") as peak:
    layer()
print(peak.mb)
"""


def faults_and_peak(how: str) -> tuple[int, float]:
    """Pages that three rounds of 96 MiB fetch, and the peak in MiB of a fourth."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(OWN_SETTINGS)}
    environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    fetched, peak = subprocess.check_output([sys.executable, "-c", FAULTS, how], env=environ).split()
    return int(fetched), float(peak)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is a Linux library")
def test_what_is_freed_is_used_again() -> None:
    if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
        pytest.skip("the C library is not glibc")
    kept, peak = faults_and_peak("keep")
    assert kept < 20
    assert peak == pytest.approx(96, abs=8)  # though the process had that much already
    left, peak = faults_and_peak("leave")
    assert left > 20
    assert peak == pytest.approx(96, abs=8)


@pytest.mark.parametrize(("most", "expected"), [(BYTES, BYTES), (OLD_BYTES, OLD_BYTES), (0, None)])
def test_a_glibc_that_refuses_large_blocks(most: int, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[int, int] = {}

    def mallopt(name: int, size: int) -> int:
        if name == -3 and size > most:
            return 0
        taken[name] = size
        return 1

    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.17")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert keep_freed_memory({}) is (expected is not None)
    assert taken == ({} if expected is None else {-3: expected, -1: BYTES})


@pytest.mark.parametrize("line", ["embed x", "bench throughput", "bench"])
def test_what_embeds_keeps_memory(line: str) -> None:
    assert embeds(line.split())


@pytest.mark.parametrize("line", ["", "train x", "bench train --what vtc", "bench mine", "--version"])
def test_what_trains_does_not(line: str) -> None:
    assert not embeds(line.split())


@pytest.mark.parametrize(
    "environ",
    [{VARIABLE: "0"}, {"LD_PRELOAD": "libjemalloc.so"}, {"GLIBC_TUNABLES": "x"}, {"MALLOC_ARENA_MAX": "1"}],
)
def test_who_wants_something_else_gets_it(environ: dict[str, str]) -> None:
    assert keep_freed_memory(environ) is False
