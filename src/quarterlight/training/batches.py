"""The batches of a stage, made ahead of the model, and the trainer that reads them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from torch.utils.data import DataLoader, Dataset

from quarterlight.training.distributed import gather_objects
from quarterlight.training.threads import InputThreads
from quarterlight.training.watched import WatchedTrainer


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


class BatchTrainer(WatchedTrainer):
    """``Trainer`` over :class:`Batches`, which counts the pictures in them."""

    def __init__(self, *, batches: Batches, **more: Any) -> None:
        super().__init__(train_dataset=batches, **more)
        self.batches = batches

    @property
    def utilisation(self) -> float:
        """The share of the training time, validation aside, in which the model did not wait for its inputs."""
        return 1 - self.batches.waited_s / max(time.monotonic() - self._started, 1e-9)

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The batches of this process, which is what the dataset makes: accelerate must not divide them once more."""
        return self.batches.loader()

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Ends the threads when training ends, however it ends."""
        self._started = time.monotonic()
        try:
            return super().train(*arguments, **options)
        finally:
            self.batches.close()

    def _begin(self, inputs: Mapping[str, Any], ids: Sequence[str]) -> None:
        """Counts the pictures of a batch on all processes, and remembers what it holds.

        ids: names of the inputs that say it.  Raises DatasetError when too many pictures cannot be read.
        """
        found = gather_objects([(inputs["num_pictures"], inputs["unreadable"])])
        self._pictures.add(sum(number for number, _ in found), [reason for _, one in found for reason in one])
        self._batch_ids = {name: inputs[name] for name in ids}


def _only(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return batches[0]
