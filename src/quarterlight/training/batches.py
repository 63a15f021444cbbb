"""The batches of a stage, made ahead of the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from torch.utils.data import DataLoader, Dataset

from quarterlight.training.threads import InputThreads


class Batches(Dataset[dict[str, Any]]):
    """Batches by number, so that ``Trainer`` resumes by skipping numbers; the next ones are made ahead in threads."""

    def __init__(self, make: Callable[[int], dict[str, Any]], total: int, *, num_threads: int) -> None:
        self.waited_s = 0.0
        self._make = make
        self._total = total
        self._num_threads = num_threads
        self._pool = InputThreads(max(1, num_threads))
        self._ahead: dict[int, Future[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, number: int) -> dict[str, Any]:
        started = time.monotonic()
        for one in range(number, min(number + self._num_threads + 1, self._total)):
            if one not in self._ahead:
                self._ahead[one] = self._pool.submit(self._make, one)
        batch = self._ahead.pop(number).result()
        self.waited_s += time.monotonic() - started
        return batch

    def loader(self) -> DataLoader[dict[str, Any]]:
        """What ``Trainer`` reads: the batches of this process, which accelerate must not divide once more."""
        # batches of one, not of None, or Trainer could not skip those that a stopped run has done
        return DataLoader(self, batch_size=1, collate_fn=_only)

    def close(self) -> None:
        """Stops working ahead."""
        self._pool.close()


def _only(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return batches[0]
