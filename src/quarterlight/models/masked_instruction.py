"""Backbones that leave the instruction out of a mean, for programs that know nothing of it.

Embeddings have norm 1, and a mean of norm 1 is a sum of norm 1: whoever pools the last hidden states, those of the
instruction being zero, gets the masked mean of U-MARVEL (arXiv:2507.14902), and so do the stock modules of
sentence-transformers.  The instruction is found between its markers, which no text can spell.

B rows, L tokens, D columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

MASKED_INSTRUCTION = "masked_instruction"
"""Where the configuration of a backbone has the ids of the markers, [start, end]; absent or ``None`` masks nothing."""


def instruction_span(input_ids_BL: Tensor, start: int, end: int) -> Tensor:
    """bool ``[B, L]``: the tokens from each marker ``start`` to the next ``end``, both included.

    >>> from torch import tensor
    >>> instruction_span(tensor([[7, 1, 7, 2, 7], [1, 2, 7, 7, 7]]), start=1, end=2).int().tolist()
    [[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    """
    closing = input_ids_BL == end
    opened, closed = (input_ids_BL == start).cumsum(dim=1), closing.cumsum(dim=1)
    return (opened > closed) | closing


def masking_instruction(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The ``forward`` of a backbone, with zeros in ``last_hidden_state [B, L, D]`` for the tokens of an instruction.

    It does so where the configuration has :data:`MASKED_INSTRUCTION`, and the input is token ids; embeddings of tokens
    do not say what they were, and who gives them pools by a mask of his own.
    """

    @wraps(forward)
    def masked(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        markers = getattr(self.config, MASKED_INSTRUCTION, None)
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if markers is None or input_ids is None:
            return output
        span_BL1 = instruction_span(input_ids, *markers).unsqueeze(-1)
        if isinstance(output, tuple):
            return (output[0].masked_fill(span_BL1.to(output[0].device), 0), *output[1:])
        output.last_hidden_state = output.last_hidden_state.masked_fill(span_BL1.to(output.last_hidden_state.device), 0)
        return output

    return masked
