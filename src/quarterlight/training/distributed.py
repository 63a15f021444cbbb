"""What processes that train one model tell one another; a process that trains alone tells it to itself."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

_T = TypeVar("_T")

_PATIENCE = timedelta(days=7)


def processes() -> PartialState:
    """This process's place among all that a launcher (torchrun, accelerate launch) started; the first call meets them.

    Without a GPU they must be told so, or each believes that it is alone.  They wait for one another for as long as a
    stage may take that one of them does for all, such as judging; the usual ten minutes would end it.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)


def world_size() -> int:
    """How many processes train together."""
    return processes().num_processes


def rank() -> int:
    """Which of them this is, counted from 0."""
    return processes().process_index


def share(rows: Sequence[_T]) -> Sequence[_T]:
    """The rows that are this process's: contiguous, equally many on each process but for one."""
    return rows[_start(len(rows), rank()) : _start(len(rows), rank() + 1)]


def share_of(rows_BD: Tensor) -> Tensor:
    """The rows of a tensor ``[B, ...]`` that are this process's."""
    return rows_BD[_start(len(rows_BD), rank()) : _start(len(rows_BD), rank() + 1)]


def gather(rows_BD: Tensor, total: int) -> Tensor:
    """The rows of all processes, ``[total, D]``, in the order from which :func:`share` cut them; without gradient."""
    if world_size() == 1:
        return rows_BD.detach()
    sizes = [_start(total, one + 1) - _start(total, one) for one in range(world_size())]
    padded = rows_BD.new_zeros(max(sizes), *rows_BD.shape[1:])
    padded[: len(rows_BD)] = rows_BD.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def largest(number: int, device: torch.device) -> int:
    """The largest of the numbers of all processes."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def gather_objects(values: list[_T]) -> list[_T]:
    """The lists of all processes, joined in the order of the processes."""
    if world_size() == 1:
        return values
    parts: list[list[_T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def _start(total: int, process: int) -> int:
    return total * process // world_size()
