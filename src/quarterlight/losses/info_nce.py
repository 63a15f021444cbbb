"""InfoNCE: the contrastive loss of both papers.

Legend of shapes: Q queries, C >= Q candidates, D dimensions of an embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(
    query_QD: Tensor,
    candidate_CD: Tensor,
    *,
    temperature: float,
    known_positive_QC: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """Mean cross-entropy, in nats, of finding each query's target among all candidates (Magic-MM-Embedding, eq. 2).

    -1/Q sum_i log(exp(s[i, i] / t) / sum_j exp(s[i, j] / t)), s = dot product; candidate i is the target of query i.

    query, candidate: floats, rows of L2 norm 1.  temperature: t > 0, no unit.
    known_positive: bool, True where candidate j answers query i but is no target; left out of the sum.
    symmetric: average with the same loss from each target to its query among all queries.
    Raises ValueError for t <= 0, widths that differ, fewer candidates than queries, or a target among known positives.

    >>> round(info_nce(torch.eye(2), torch.eye(2), temperature=1.0).item(), 4)
    0.3133
    """
    num_queries, num_candidates = len(query_QD), len(candidate_CD)
    if temperature <= 0:
        raise ValueError(f"The temperature is a divisor above 0, got {temperature}.")
    if query_QD.shape[1:] != candidate_CD.shape[1:] or num_candidates < num_queries:
        raise ValueError(
            f"Expected queries [Q, D] and candidates [C, D] with C >= Q, got {list(query_QD.shape)} and "
            f"{list(candidate_CD.shape)}."
        )
    # float32 whatever autocast says: at t = 0.03 a bfloat16 score is off by up to 0.13 in the exponent
    with torch.autocast(query_QD.device.type, enabled=False):
        score_QC = query_QD.float() @ candidate_CD.float().T / temperature
    if known_positive_QC is not None:
        if known_positive_QC.shape != score_QC.shape or known_positive_QC.diagonal().any():
            raise ValueError(
                f"known_positive must be bool {list(score_QC.shape)} and False on its diagonal of targets, got "
                f"{list(known_positive_QC.shape)} with {int(known_positive_QC.diagonal().sum())} targets marked."
            )
        score_QC = score_QC.masked_fill(known_positive_QC, -torch.inf)
    target_Q = torch.arange(num_queries, device=score_QC.device)
    loss = F.cross_entropy(score_QC, target_Q)
    if symmetric:
        loss = (loss + F.cross_entropy(score_QC[:, :num_queries].T, target_Q)) / 2
    return loss
