"""InfoNCE against answers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from quarterlight.losses.info_nce import info_nce


def unit(*rows: list[float]) -> torch.Tensor:
    return F.normalize(torch.tensor(rows), dim=1)


def test_two_orthogonal_pairs() -> None:
    # each row scores 1 for its target and 0 for the other: -log(e / (e + 1))
    loss = info_nce(torch.eye(2), torch.eye(2), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)


def test_temperature_divides() -> None:
    loss = info_nce(torch.eye(2), torch.eye(2), temperature=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)


def test_hard_negatives_are_extra_columns() -> None:
    query, hard = unit([1.0, 0.0]), unit([1.0, 1.0])
    loss = info_nce(query, torch.cat([query, hard]), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(math.sqrt(0.5) - 1)), abs=1e-6)


def test_a_known_positive_is_no_negative() -> None:
    query = unit([1.0, 0.0], [0.0, 1.0])
    candidate = unit([1.0, 0.0], [0.0, 1.0], [1.0, 0.1])
    masked = torch.tensor([[False, False, True], [False, False, False]])
    loss = info_nce(query, candidate, temperature=1.0, known_positive_QC=masked)
    other = 0.1 / math.sqrt(1.01)
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-1) + math.exp(other - 1))) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_a_masked_pair_gets_no_gradient() -> None:
    query, candidate = torch.eye(3)[:2], torch.eye(3).requires_grad_()
    masked = torch.zeros(2, 3, dtype=torch.bool)
    masked[:, 2] = True
    info_nce(query, candidate, temperature=0.1, known_positive_QC=masked).backward()
    assert candidate.grad is not None
    assert candidate.grad[2].abs().sum() == 0


def test_symmetric_averages_both_directions() -> None:
    query, candidate = unit([1.0, 0.2], [0.3, 1.0]), unit([0.9, 0.1], [0.5, 0.5], [0.1, 0.9])
    both = info_nce(query, candidate, temperature=0.2, symmetric=True)
    forth = info_nce(query, candidate, temperature=0.2)
    back = info_nce(candidate[:2], query, temperature=0.2)
    assert both.item() == pytest.approx((forth.item() + back.item()) / 2, abs=1e-6)


def test_symmetric_masks_known_positives_both_ways() -> None:
    query, candidate = unit([1.0, 0.2], [0.3, 1.0]), unit([0.9, 0.1], [0.5, 0.5], [0.1, 0.9])
    known = torch.tensor([[False, False, True], [True, False, False]])
    both = info_nce(query, candidate, temperature=0.2, known_positive_QC=known, symmetric=True)
    score = query @ candidate.T / 0.2
    forth = [score[0, [0, 1]].logsumexp(0) - score[0, 0], score[1, [1, 2]].logsumexp(0) - score[1, 1]]
    back = [score[0, 0] - score[0, 0], score[:, 1].logsumexp(0) - score[1, 1]]  # target 0 has no other query to fear
    assert both.item() == pytest.approx(float((sum(forth) + sum(back)) / 4), abs=1e-6)


def test_the_score_is_float32_under_autocast() -> None:
    torch.manual_seed(0)
    query, candidate = F.normalize(torch.randn(8, 64), dim=1), F.normalize(torch.randn(8, 64), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(query, candidate, temperature=0.03)
    assert loss.item() == pytest.approx(info_nce(query, candidate, temperature=0.03).item(), abs=1e-6)


@pytest.mark.parametrize(
    ("query", "candidate", "options", "message"),
    [
        (torch.eye(2), torch.eye(2), {"temperature": 0.0}, "above 0"),
        (torch.eye(2), torch.eye(3), {"temperature": 1.0}, r"\[2, 2\] and \[3, 3\]"),
        (torch.eye(2), torch.eye(2)[:1], {"temperature": 1.0}, "C >= Q"),
        (
            torch.eye(2),
            torch.eye(2),
            {"temperature": 1.0, "known_positive_QC": torch.eye(2).bool()},
            "2 targets marked",
        ),
    ],
)
def test_impossible_arguments(query, candidate, options, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        info_nce(query, candidate, **options)
