"""Memory that one layer of a model lets go is kept for the next.

A layer's buffers are megabytes, which glibc by default fetches from the system and gives back for every layer; the
system hands them out as empty pages, one by one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

COMMANDS = frozenset({"index", "search", "embed", "demo", "evaluate", "bench"})
"""Commands that embed.  A training step holds far more and lets go of it in another order."""

VARIABLE = "QUARTERLIGHT_KEEP_MEMORY"
"""0 leaves everything to the allocator."""

OWN_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "LD_PRELOAD")
"""Variables of somebody who knows what they want of the allocator, or of another allocator."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
BYTES = 2**30


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether glibc was told to reuse blocks up to 1 GiB rather than to give them back to the system.

    The peak of a process may grow by a tenth; between calls it keeps what the largest needed.  Nothing is done, and
    nothing is wrong, where the C library is another one or ``environ`` says otherwise.
    """
    if environ.get(VARIABLE) == "0" or any(environ.get(name) for name in OWN_SETTINGS):
        return False
    try:
        if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return False
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, ValueError):  # no such name, or no such function: macOS, Windows, musl
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, BYTES) and mallopt(M_TRIM_THRESHOLD, BYTES))
