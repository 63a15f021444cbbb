"""Batches of any size in the memory of one chunk: GradCache (Gao et al., arXiv:2101.06983).

A contrastive loss compares all rows of a batch, but needs only their embeddings.  So each chunk is embedded without a
graph; the loss of all embeddings gives the gradient of each; then each chunk is embedded again, with a graph, and its
gradient goes on into the weights.

B rows of a chunk, D columns of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

Chunk = TypeVar("Chunk")


class GradCache(Generic[Chunk]):
    """One batch in chunks: :meth:`embed` each, work out the loss, then :meth:`backward` each in the same order.

    forward: the embeddings of a chunk, ``[B, D]``.
    backward: takes a scalar backwards through the graph.
    num_chunks: a single chunk keeps its graph from the first time and is not embedded again.
    """

    def __init__(
        self,
        forward: Callable[[Chunk], Tensor],
        backward: Callable[[Tensor], None],
        *,
        num_chunks: int,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._backward = backward
        self._device = device
        self._keeps_graph = num_chunks == 1
        self._kept: Tensor | None = None
        self._states: list[tuple[Tensor, Tensor | None]] = []
        self._next = 0

    def embed(self, chunk: Chunk) -> Tensor:
        """The embeddings of the next chunk, ``[B, D]``, without a graph."""
        if self._keeps_graph:
            self._kept = self._forward(chunk)
            return self._kept.detach()
        self._states.append(_random_state(self._device))
        with torch.no_grad():
            return self._forward(chunk)

    def backward(self, chunk: Chunk, gradient_BD: Tensor) -> None:
        """Adds what the next chunk's embeddings contribute to the gradients of the weights.

        gradient_BD: of the loss, with respect to the embeddings that :meth:`embed` gave.  Dropout falls as it did then.
        """
        if self._kept is not None:
            self._backward((self._kept * gradient_BD).sum())
            self._kept = None
            return
        with _random_state_as(self._states[self._next], self._device):
            embedding_BD = self._forward(chunk)
        self._next += 1
        self._backward((embedding_BD * gradient_BD).sum())


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _random_state_as(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
