"""Kept memory is not fetched again, seen in a process of its own: this one keeps its allocator as it is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quarterlight.cli.allocator import OWN_SETTINGS, VARIABLE, keep_freed_memory

FAULTS = """
import ctypes, resource, sys
from quarterlight.cli.allocator import keep_freed_memory
assert keep_freed_memory({}) if sys.argv[1] == "keep" else not keep_freed_memory({"QUARTERLIGHT_KEEP_MEMORY": "0"})
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def layer():
    block = ctypes.c_void_p(libc.malloc(2**26))
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
layer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    layer()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    environ = {name: value for name, value in os.environ.items() if name not in OWN_SETTINGS}
    environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    return int(subprocess.check_output([sys.executable, "-c", FAULTS, how], env=environ))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is a Linux library")
def test_what_is_freed_is_used_again() -> None:
    if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
        pytest.skip("the C library is not glibc")
    assert faults("keep") < 20
    assert faults("leave") > 20


@pytest.mark.parametrize("environ", [{VARIABLE: "0"}, {"LD_PRELOAD": "libjemalloc.so"}, {"GLIBC_TUNABLES": "x"}])
def test_who_wants_something_else_gets_it(environ: dict[str, str]) -> None:
    assert keep_freed_memory(environ) is False
