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


def test_both_directions_add_up() -> None:
    query, candidate = unit([1.0, 0.2], [0.3, 1.0]), unit([0.9, 0.1], [0.5, 0.5], [0.1, 0.9])
    forth = info_nce(query, candidate, temperature=0.2).item()
    back = info_nce(candidate[:2], query, temperature=0.2).item()
    for weight in (1.0, 0.25):
        both = info_nce(query, candidate, temperature=0.2, backward_weight=weight)
        assert both.item() == pytest.approx(forth + weight * back, abs=1e-6)
    half = info_nce(query, candidate, temperature=0.2, symmetric=True)
    whole = info_nce(query, candidate, temperature=0.2, backward_weight=1.0)
    assert whole.item() == pytest.approx(2 * half.item(), abs=1e-6)


def test_a_temperature_that_is_a_tensor_gets_its_gradient() -> None:
    # loss = log(1 + e^(-1/t)): its slope is e^(-1/t) / (1 + e^(-1/t)) / t^2
    temperature = torch.tensor(0.5, requires_grad=True)
    loss = info_nce(torch.eye(2), torch.eye(2), temperature=temperature)
    assert loss.item() == info_nce(torch.eye(2), torch.eye(2), temperature=0.5).item()
    loss.backward()
    assert temperature.grad is not None
    assert temperature.grad.item() == pytest.approx(math.exp(-2) / (1 + math.exp(-2)) / 0.25, abs=1e-6)


def test_symmetric_masks_known_positives_both_ways() -> None:
    query, candidate = unit([1.0, 0.2], [0.3, 1.0]), unit([0.9, 0.1], [0.5, 0.5], [0.1, 0.9])
    known = torch.tensor([[False, False, True], [True, False, False]])
    both = info_nce(query, candidate, temperature=0.2, known_positive_QC=known, symmetric=True)
    score = query @ candidate.T / 0.2
    forth = [score[0, [0, 1]].logsumexp(0) - score[0, 0], score[1, [1, 2]].logsumexp(0) - score[1, 1]]
    back = [score[0, 0] - score[0, 0], score[:, 1].logsumexp(0) - score[1, 1]]  # target 0 has no other query to fear
    assert both.item() == pytest.approx(float((sum(forth) + sum(back)) / 4), abs=1e-6)


def test_hardness_weighs_negatives_by_their_score() -> None:
    # the negative scores 0.6: exp(0.6 / t) counts exp(a * 0.6) times; the target keeps its weight of 1
    query, candidate = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    loss = info_nce(query, candidate, temperature=0.5, hardness_weight=2.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(2 * 0.6) * math.exp((0.6 - 1) / 0.5)), abs=1e-6)


def test_the_weight_itself_gets_no_gradient() -> None:
    """LLaVE, eq. 6: the gradient of a negative's score is its weighted share, over the temperature."""
    query = torch.tensor([[1.0, 0.0]])
    candidate = torch.tensor([[1.0, 0.0], [0.6, 0.8]], requires_grad=True)
    info_nce(query, candidate, temperature=0.5, hardness_weight=2.0).backward()
    odds = math.exp(2 * 0.6) * math.exp((0.6 - 1) / 0.5)
    assert candidate.grad is not None
    assert candidate.grad[1].tolist() == pytest.approx([odds / (1 + odds) / 0.5, 0.0], abs=1e-6)


def test_hardness_in_both_directions() -> None:
    query, candidate = unit([1.0, 0.2], [0.3, 1.0]), unit([0.9, 0.1], [0.5, 0.5], [0.1, 0.9])
    both = info_nce(query, candidate, temperature=0.2, hardness_weight=3.0, symmetric=True)
    forth = info_nce(query, candidate, temperature=0.2, hardness_weight=3.0)
    back = info_nce(candidate[:2], query, temperature=0.2, hardness_weight=3.0)
    assert both.item() == pytest.approx((forth.item() + back.item()) / 2, abs=1e-6)


def test_prefixes_are_brought_back_to_norm_1() -> None:
    # in full: 1 against 0.48 + 0.48 = 0.96; the first two columns: (1, 0) against (0.6, 0.8) after normalising
    query = torch.tensor([[0.6, 0.0, 0.8]])
    candidate = torch.tensor([[0.6, 0.0, 0.8], [0.48, 0.64, 0.6]])
    full = math.log(1 + math.exp(0.6 * 0.48 + 0.8 * 0.6 - 1))
    two = math.log(1 + math.exp(0.6 - 1))
    one = math.log(2)  # in one dimension both are the number 1
    for dimensions, expected in {(3,): full, (2,): two, (1, 2, 3): (one + two + full) / 3}.items():
        loss = info_nce(query, candidate, temperature=1.0, dimensions=dimensions)
        assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_a_masked_row_is_left_out_of_the_mean() -> None:
    query = unit([1.0, 0.0], [0.6, 0.8]).requires_grad_()
    candidate = unit([1.0, 0.0], [0.0, 1.0])
    loss = info_nce(query, candidate, temperature=1.0, row_mask_Q=torch.tensor([True, False]))
    # its target stays a negative of the other row
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
    loss.backward()
    assert query.grad is not None
    assert query.grad[0].abs().sum() > 0 and query.grad[1].abs().sum() == 0


def test_a_masked_query_is_no_negative_of_other_targets() -> None:
    query = unit([1.0, 0.0], [0.6, 0.8], [0.0, 1.0]).requires_grad_()
    candidate = unit([1.0, 0.0], [0.0, 1.0], [0.0, 1.0])
    mask = torch.tensor([True, False, True])
    loss = info_nce(query, candidate, temperature=1.0, row_mask_Q=mask, symmetric=True)
    # forth: rows 0 and 2 over three candidates; back: targets 0 and 2 over the queries 0 and 2
    forth = (math.log(1 + 2 * math.exp(-1)) + math.log(2 + math.exp(-1))) / 2
    back = math.log(1 + math.exp(-1))
    assert loss.item() == pytest.approx((forth + back) / 2, abs=1e-6)
    loss.backward()
    assert query.grad is not None and query.grad[1].abs().sum() == 0


def test_a_masked_candidate_is_never_a_negative() -> None:
    query = unit([1.0, 0.0], [0.0, 1.0])
    candidate = unit([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]).requires_grad_()
    loss = info_nce(query, candidate, temperature=1.0, candidate_mask_C=torch.tensor([True, True, False]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
    loss.backward()
    assert candidate.grad is not None and candidate.grad[2].abs().sum() == 0


def test_a_row_with_a_masked_target_is_left_out() -> None:
    query = unit([1.0, 0.0], [0.0, 1.0])
    candidate = unit([1.0, 0.0], [1.0, 0.2], [0.0, 1.0]).requires_grad_()
    loss = info_nce(query, candidate, temperature=1.0, candidate_mask_C=torch.tensor([True, False, True]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
    loss.backward()
    assert candidate.grad is not None and candidate.grad[1].abs().sum() == 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("masks", [{"row_mask_Q": False}, {"candidate_mask_C": False}])
def test_nothing_left_is_no_loss(symmetric: bool, masks: dict[str, bool]) -> None:
    query, candidate = unit([1.0, 0.0], [0.6, 0.8]).requires_grad_(), torch.eye(2).requires_grad_()
    loss = info_nce(
        query,
        candidate,
        temperature=0.03,
        symmetric=symmetric,
        hardness_weight=9.0,
        dimensions=[1, 2],
        **{name: torch.full((2,), keep) for name, keep in masks.items()},
    )
    assert loss.item() == 0
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way back either
        loss.backward()
    assert query.grad is not None and query.grad.abs().sum() == 0
    assert candidate.grad is not None and candidate.grad.abs().sum() == 0


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
        (torch.eye(2), torch.eye(2), {"temperature": torch.tensor(-1.0)}, "above 0"),
        (torch.eye(2), torch.eye(2), {"temperature": 1.0, "backward_weight": -1.0}, "backward_weight must not be"),
        (torch.eye(2), torch.eye(2), {"temperature": 1.0, "backward_weight": 1.0, "symmetric": True}, "symmetric; got"),
        (torch.eye(2), torch.eye(2), {"temperature": 1.0, "hardness_weight": -1.0}, "hardness weight is not negative"),
        (torch.eye(2), torch.eye(2), {"temperature": 1.0, "dimensions": []}, r"from 1 to 2 as dimensions, got \[\]"),
        (torch.eye(2), torch.eye(2), {"temperature": 1.0, "dimensions": [2, 3]}, r"from 1 to 2 .* got \[2, 3\]"),
        (torch.eye(2), torch.eye(2), {"temperature": 1.0, "row_mask_Q": torch.ones(3).bool()}, r"row_mask .* \[2\]"),
        (torch.eye(2), torch.eye(2), {"temperature": 1.0, "candidate_mask_C": torch.ones(2)}, "candidate_mask .* bool"),
    ],
)
def test_impossible_arguments(query, candidate, options, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        info_nce(query, candidate, **options)
