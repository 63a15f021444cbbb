"""What the benches of models share: how long a call takes, and what the machine could do at best."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def seconds(function: Callable[[], Any], device: str) -> float:
    """Wall time of one call, all that it started on a GPU included."""
    import torch

    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def ceiling_of(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches on a 4096^3 matrix product, in TFLOP/s, and on reading 1 GiB, in GB/s."""
    import torch

    n = 4096
    square = torch.randn(n, n, device=device).to(dtype)
    product = min(seconds(lambda: square @ square, device) for _ in range(5))
    block = torch.ones(2**28, device=device)
    read = min(seconds(block.sum, device) for _ in range(5))
    return {"matmul_tflops": 2 * n**3 / product / 1e12, "read_gb_s": block.nbytes / read / 1e9}
