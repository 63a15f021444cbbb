"""What the benches of models share: rounds in which systems take turns, and what the machine could do at best."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quarterlight.errors import InputError

if TYPE_CHECKING:
    import torch

_K = TypeVar("_K", bound=Hashable)


def find_dtype(name: str | None, device: str) -> torch.dtype:
    """That of ``--dtype``; without a name, the faster on the device. Raises InputError for any other name."""
    import torch

    from quarterlight.models.embedder import best_dtype

    if name is None:
        return best_dtype(torch.device(device))
    if name not in ("float32", "bfloat16"):
        raise InputError(f"--dtype is float32 or bfloat16, got {name!r}.")
    found: torch.dtype = getattr(torch, name)
    return found


def with_compression(model: Any, processor: Any, compression: int) -> tuple[Any, Any]:
    """The same weights with another s, and a processor that agrees; both as they were are left as they were."""
    model, processor = copy.copy(model), copy.copy(processor)
    model.config = compressed_config(model.config, compression)
    processor.agree_with(model.config)
    return model, processor


def compressed_config(config: Any, compression: int) -> Any:
    """The configuration with another s, and the tokens of a tile that follow from it."""
    return type(config).from_dict({**config.to_dict(), "visual_token_compression": compression})


def seconds(function: Callable[[], Any], device: str, now: Callable[[], float] = time.perf_counter) -> float:
    """Wall time of one call, all that it started on a GPU included; by another clock if ``now`` reads one."""
    import torch

    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = now()
    function()
    wait()
    return now() - start


def rounds(
    systems: Mapping[_K, Callable[[], Any]], repeats: int, device: str, on_run: Callable[[], None] = lambda: None
) -> dict[_K, list[float]]:
    """Seconds of each system in each round; a round runs every system once, each second one in reverse order.

    One round more, the first, warms up and is not among them: ``(1 + repeats) * len(systems)`` runs, after each of
    which ``on_run`` is called.
    """
    times: dict[_K, list[float]] = {name: [] for name in systems}
    for turn in range(1 + repeats):
        for name in systems if turn % 2 else reversed(list(systems)):
            taken = seconds(systems[name], device)
            times[name] += [taken] * (turn > 0)
            on_run()
    return times


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, least and most, rounded.

    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'min': 1.0, 'max': 3.0}
    """
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def times_faster(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """The spread of the ratio of times of the same round."""
    return spread([one / other for one, other in zip(slow, fast, strict=True)])


def ceiling_of(device: str, dtype: torch.dtype, now: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """What this machine reaches on a 4096^3 matrix product, in TFLOP/s, and on reading 1 GiB, in GB/s."""
    import torch

    n = 4096
    square = torch.randn(n, n, device=device).to(dtype)
    product = min(seconds(lambda: square @ square, device, now) for _ in range(5))
    block = torch.ones(2**28, device=device)
    read = min(seconds(block.sum, device, now) for _ in range(5))
    return {"matmul_tflops": 2 * n**3 / product / 1e12, "read_gb_s": block.nbytes / read / 1e9}


class MemoryPeak:
    """The most memory that was taken inside a ``with`` beyond what was in use at its beginning.

    What was freed before and is kept for later use is given back to the system at its beginning, or taking it again
    would count as nothing.  So do not time what it surrounds, which has to fetch it anew.

    mb: in 2^20 bytes, of the GPU or else of the process; ``None`` where the system does not say (not Linux).
    total_mb: the same with what was in use at its beginning.
    """

    def __init__(self, device: str) -> None:
        self.mb: float | None = None
        self.total_mb: float | None = None
        self._gpu = device.startswith("cuda")
        self._start = 0.0

    def __enter__(self) -> MemoryPeak:
        gc.collect()
        if self._gpu:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated() / 2**20
        else:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # glibc keeps some of it: 1.4 of 2 GB after a large training batch
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the kernel starts its own peak anew; see proc(5)
            self._start = _status_mb("VmRSS") or 0.0
        return self

    def __exit__(self, *error: object) -> None:
        if self._gpu:
            import torch

            peak: float | None = torch.cuda.max_memory_allocated() / 2**20
        else:
            peak = _status_mb("VmHWM")
        if peak is not None:
            self.mb, self.total_mb = round(max(0.0, peak - self._start), 1), round(peak, 1)


def _status_mb(name: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), None)
