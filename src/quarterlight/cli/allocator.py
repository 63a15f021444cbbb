"""Memory that one layer of a model lets go is kept for the next.

A layer's buffers are megabytes, which glibc by default fetches from the system and gives back for every layer; the
system hands them out as empty pages, one by one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence

COMMANDS = frozenset({"index", "search", "embed", "demo", "evaluate", "bench"})
"""Commands that embed.  A training step holds far more and lets go of it in another order."""

TRAINING_BENCHES = frozenset({"train", "mine"})
"""Those of ``bench`` that train, or measure what training needs, and so keep nothing."""

VARIABLE = "QUARTERLIGHT_KEEP_MEMORY"
"""0 leaves everything to the allocator."""

OWN_SETTINGS = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_")
"""Beginnings of variables of somebody who knows what they want of the allocator, or of another allocator."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
BYTES = 2**30
OLD_BYTES = 2**25  # the most that older versions of glibc take for a threshold, HEAP_MAX_SIZE / 2


def embeds(arguments: Sequence[str]) -> bool:
    """Whether the arguments of the program are a command that embeds."""
    command, below = arguments[:1], arguments[1:2]
    return bool(COMMANDS.intersection(command)) and not (
        "bench" in command and bool(TRAINING_BENCHES.intersection(below))
    )


def keep_freed_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether glibc was told to reuse blocks up to 1 GiB rather than to give them back to the system.

    An older glibc takes no more than 32 MiB, and then that is what it is told.
    The peak of a process may grow by a tenth; between calls it keeps what the largest needed.  Nothing is done, and
    nothing is wrong, where the C library is another one or ``environ`` says otherwise.
    """
    if environ.get(VARIABLE) == "0" or any(name.startswith(OWN_SETTINGS) and environ[name] for name in environ):
        return False
    try:
        if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return False
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, ValueError):  # no such name, or no such function: macOS, Windows, musl
        return False
    taken = any(mallopt(M_MMAP_THRESHOLD, size) for size in (BYTES, OLD_BYTES))  # it refuses with 0
    return bool(taken and mallopt(M_TRIM_THRESHOLD, BYTES))
