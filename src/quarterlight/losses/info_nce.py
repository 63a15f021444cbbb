"""InfoNCE: the contrastive loss of both papers, with the hardness weights of LLaVE and Matryoshka prefixes.

Legend of shapes: Q queries, C >= Q candidates, D dimensions of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def info_nce(
    query_QD: Tensor,
    candidate_CD: Tensor,
    *,
    temperature: float | Tensor,
    known_positive_QC: Tensor | None = None,
    symmetric: bool = False,
    backward_weight: float = 0.0,
    hardness_weight: float = 0.0,
    dimensions: Sequence[int] | None = None,
    row_mask_Q: Tensor | None = None,
    candidate_mask_C: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy, in nats, of finding each query's target among all candidates (Magic-MM-Embedding, eq. 2).

    -1/Q sum_i log(exp(s[i, i] / t) / sum_j w[i, j] exp(s[i, j] / t)), s = dot product; candidate i is the target of
    query i.  w = 1, or with hardness weighting exp(a sg(s[i, j])) for j != i, sg = no gradient (LLaVE,
    arXiv:2503.04812, eq. 5): negatives that score high weigh more.

    query, candidate: floats, rows of L2 norm 1.
    temperature: t > 0, no unit; a tensor of one number gets its gradient (U-MARVEL learns it).
    known_positive: bool, True where candidate j answers query i but is no target; left out of the sum.
    symmetric: average with the same loss from each target to its query among all queries.
    backward_weight: b >= 0; adds b times that loss instead, so that 1 is the sum of both directions (U-MARVEL, CC3M).
    hardness_weight: a >= 0; 0 weighs all alike, LLaVE uses 9 (at t = 0.02).
    dimensions: widths in [1, D]; the loss is the mean over these prefixes of the embeddings, each brought back to
        norm 1 (Matryoshka, arXiv:2205.13147); D counts only where it is named.
    row_mask: bool, False where a row cannot be used: left out of the mean, and its query no negative of other targets.
    candidate_mask: bool, False where a candidate cannot be used: never a negative, and a row whose target it is counts
        as masked.  Without any row left the loss is 0, and so are its gradients.
    Raises ValueError for t <= 0, a < 0, b < 0 or b beside ``symmetric``, widths or masks that do not fit, fewer
    candidates than queries, or a target among the known positives.

    >>> round(info_nce(torch.eye(2), torch.eye(2), temperature=1.0).item(), 4)
    0.3133
    """
    num_queries, num_candidates = len(query_QD), len(candidate_CD)
    divisor = float(temperature.detach() if isinstance(temperature, Tensor) else temperature)
    if divisor <= 0 or hardness_weight < 0:
        raise ValueError(
            "The temperature is a divisor above 0 and the hardness weight is not negative, got "
            f"{divisor} and {hardness_weight}."
        )
    if backward_weight < 0 or (backward_weight and symmetric):
        raise ValueError(
            f"backward_weight must not be below 0, and takes the place of symmetric; got {backward_weight} and "
            f"{symmetric}."
        )
    if query_QD.shape[1:] != candidate_CD.shape[1:] or num_candidates < num_queries:
        raise ValueError(
            f"Expected queries [Q, D] and candidates [C, D] with C >= Q, got {list(query_QD.shape)} and "
            f"{list(candidate_CD.shape)}."
        )
    width = query_QD.shape[1]
    if dimensions is not None and not (dimensions and all(1 <= wide <= width for wide in dimensions)):
        raise ValueError(f"Expected at least one width from 1 to {width} as dimensions, got {list(dimensions)}.")
    row_mask_Q = _mask("row_mask", row_mask_Q, query_QD)
    candidate_mask_C = _mask("candidate_mask", candidate_mask_C, candidate_CD)
    row_mask_Q = row_mask_Q & candidate_mask_C[:num_queries]
    no_negative_QC = (~candidate_mask_C).expand(num_queries, num_candidates).clone()
    if known_positive_QC is not None:
        if known_positive_QC.shape != no_negative_QC.shape or known_positive_QC.diagonal().any():
            raise ValueError(
                f"known_positive must be bool {list(no_negative_QC.shape)} and False on its diagonal of targets, got "
                f"{list(known_positive_QC.shape)} with {int(known_positive_QC.diagonal().sum())} targets marked."
            )
        no_negative_QC |= known_positive_QC
    no_negative_QC.fill_diagonal_(False)

    forward: list[Tensor] = []
    backward: list[Tensor] = []
    # float32 whatever autocast says: at t = 0.03 a bfloat16 score is off by up to 0.13 in the exponent
    with torch.autocast(query_QD.device.type, enabled=False):
        query_QD, candidate_CD = query_QD.float(), candidate_CD.float()
        for wide in [None] if dimensions is None else dimensions:
            if wide is None:
                score_QC = query_QD @ candidate_CD.T
            else:
                score_QC = F.normalize(query_QD[:, :wide], dim=1) @ F.normalize(candidate_CD[:, :wide], dim=1).T
            logit_QC = score_QC / temperature
            if hardness_weight:
                logit_QC = logit_QC + (hardness_weight * score_QC.detach()).fill_diagonal_(0.0)
            logit_QC = logit_QC.masked_fill(no_negative_QC, -torch.inf)
            forward.append(_mean_cross_entropy(logit_QC, row_mask_Q))
            if symmetric or backward_weight:
                # a masked query keeps its place on the diagonal, or its own row would have nothing finite to divide by
                other_QQ = (~row_mask_Q).expand(num_queries, num_queries).clone().fill_diagonal_(False)
                back_QQ = logit_QC[:, :num_queries].T.masked_fill(other_QQ, -torch.inf)
                backward.append(_mean_cross_entropy(back_QQ, row_mask_Q))
    if symmetric:
        return torch.stack([*forward, *backward]).mean()
    loss = torch.stack(forward).mean()
    return loss + backward_weight * torch.stack(backward).mean() if backward else loss


def _mask(name: str, mask: Tensor | None, rows: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    if mask.shape != rows.shape[:1] or mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool [{len(rows)}], got {mask.dtype} {list(mask.shape)}.")
    return mask


def _mean_cross_entropy(logit_QC: Tensor, row_mask_Q: Tensor) -> Tensor:
    """Of the class i in row i, over the rows of the mask; 0 if there are none."""
    target_Q = torch.arange(len(logit_QC), device=logit_QC.device)
    loss_Q = F.cross_entropy(logit_QC, target_Q, reduction="none")
    return torch.where(row_mask_Q, loss_Q, 0.0).sum() / row_mask_Q.sum().clamp(min=1)
