"""Threads that read ahead: what several of them take apart, in a short queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Source = TypeVar("Source")
Part = TypeVar("Part")


class ReadAhead(Generic[Source, Part]):
    """The parts of some sources: in order for each source, sources mixed.  Call :meth:`stop` when done with it.

    parts: what a source is taken apart into; an error in it is raised in whoever iterates.
    num_threads: sources that are read at a time.  num_waiting: parts that may wait, beside one for each thread.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        parts: Callable[[Source], Iterator[Part]],
        *,
        num_threads: int,
        num_waiting: int,
    ) -> None:
        self._sources = iter(sources)
        self._parts = parts
        self._taking = threading.Lock()
        self._stopped = threading.Event()
        self._queue: queue.Queue[Part | BaseException | None] = queue.Queue(num_waiting)
        self._threads = [
            threading.Thread(target=self._work, name=f"quarterlight-read-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Part]:
        running = len(self._threads)
        while running:
            event = self._queue.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                running -= 1
            else:
                yield event

    def stop(self) -> None:
        """Ends the threads, whatever they are waiting for."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        try:
            while not self._stopped.is_set():
                with self._taking:
                    source = next(self._sources, None)
                if source is None:
                    break
                for part in self._parts(source):
                    self._put(part)
                    if self._stopped.is_set():
                        return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, event: Part | BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(event, timeout=0.1)
            except queue.Full:
                continue
