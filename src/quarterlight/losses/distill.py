"""Distillation: a student ranks a query's candidates as a teacher does (U-MARVEL, stage 3).

Legend of shapes: Q queries, K candidates of a query.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def teacher_scores(recall_QK: Tensor, rerank_QK: Tensor, recall_weight: float = 0.5) -> Tensor:
    """What the teacher thinks of each candidate, ``[Q, K]``: a * recall + (1 - a) * rerank (U-MARVEL, stage 3).

    recall: cosines of the embedder that is distilled, in [-1, 1].  rerank: P(Yes) of a reranker, in [0, 1].
    recall_weight: a in [0, 1] (U-MARVEL: 0.5).  Raises ValueError for another.
    """
    if not 0 <= recall_weight <= 1:
        raise ValueError(f"recall_weight must be from 0 to 1, got {recall_weight}.")
    return recall_weight * recall_QK + (1 - recall_weight) * rerank_QK


def distill(
    student_QK: Tensor, teacher_QK: Tensor, *, temperature: float | Tensor, mask_QK: Tensor | None = None
) -> Tensor:
    """Mean over the queries of KL(teacher || student), in nats (U-MARVEL, stage 3).

    1/Q sum_q sum_k p[q, k] (log p[q, k] - log r[q, k]), p = softmax(S / sg(t)), r = softmax(s / t), both over the K
    candidates of a query; sg = no gradient, so that the temperature follows the student alone.

    student: s, cosines, which get gradients.  teacher: S, without.
    temperature: t > 0, no unit; a tensor of one number gets its gradient.
    mask: bool, False where a candidate cannot be used: it is in neither distribution.  A query with fewer than two is
        left out of the mean.  Without any query left the loss is 0, and so are its gradients.
    Raises ValueError for t <= 0 or shapes that differ.

    >>> distill(torch.tensor([[0.3, 0.1]]), torch.tensor([[0.3, 0.1]]), temperature=0.05).item()
    0.0
    """
    divisor = temperature.detach() if isinstance(temperature, Tensor) else temperature
    if divisor <= 0:
        raise ValueError(f"The temperature is a divisor above 0, got {float(divisor)}.")
    if mask_QK is None:
        mask_QK = torch.ones_like(student_QK, dtype=torch.bool)
    if student_QK.ndim != 2 or student_QK.shape != teacher_QK.shape or student_QK.shape != mask_QK.shape:
        raise ValueError(
            "Expected scores of student and teacher and their mask, all [Q, K], got "
            f"{list(student_QK.shape)}, {list(teacher_QK.shape)} and {list(mask_QK.shape)}."
        )
    row_mask_Q = mask_QK.sum(dim=1) > 1
    # a masked row keeps its scores, or its softmax would have nothing to divide by
    left_out_QK = ~(mask_QK | ~row_mask_Q[:, None])
    with torch.autocast(student_QK.device.type, enabled=False):  # bfloat16 is off by up to 0.08 in the exponent
        wanted_QK = (teacher_QK.detach().float() / divisor).masked_fill(left_out_QK, -torch.inf)
        found_QK = (student_QK.float() / temperature).masked_fill(left_out_QK, -torch.inf)
        log_p_QK, log_r_QK = F.log_softmax(wanted_QK, dim=1), F.log_softmax(found_QK, dim=1)
        # 0 log 0 = 0, and no gradient from there: inf - inf would be NaN on the way back too
        apart_QK = log_p_QK.masked_fill(left_out_QK, 0.0) - log_r_QK.masked_fill(left_out_QK, 0.0)
        loss_Q = (log_p_QK.exp() * apart_QK).sum(dim=1)
        return torch.where(row_mask_Q, loss_Q, 0.0).sum() / row_mask_Q.sum().clamp(min=1)
