"""Threads that prepare the inputs of a model beside it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


class InputThreads(ThreadPoolExecutor):
    """Threads that each work alone: teams of their own would only take the cores from the model.

    PyTorch keeps the size of a team by thread, but a thread that has not used it yet takes what was set last; so the
    thread that makes this object says its own again.
    """

    def __init__(self, num_threads: int) -> None:
        self._cores = torch.get_num_threads()
        torch.set_num_threads(self._cores)
        super().__init__(num_threads, "inputs", torch.set_num_threads, (1,))

    def close(self) -> None:
        """Drops what has not begun and waits for what has."""
        self.shutdown(cancel_futures=True)
        torch.set_num_threads(self._cores)
