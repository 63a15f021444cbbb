"""KL to a teacher's ranking against answers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from quarterlight.losses.distill import distill, teacher_scores


def test_by_hand() -> None:
    # p = softmax(ln 3, 0) = (3/4, 1/4), r = (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)
    teacher, student = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distill(student, teacher, temperature=1.0).item() == pytest.approx(expected, abs=1e-6)
    assert distill(student, teacher / 2, temperature=0.5).item() == pytest.approx(expected, abs=1e-6)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn() -> None:
    torch.manual_seed(0)
    student = torch.randn(4, 7).requires_grad_()
    loss = distill(student, student.detach(), temperature=0.05)
    assert loss.item() == 0
    loss.backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-6


def test_the_mean_is_over_the_queries() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    alone = [distill(student[n : n + 1], teacher[n : n + 1], temperature=0.3).item() for n in range(3)]
    assert distill(student, teacher, temperature=0.3).item() == pytest.approx(sum(alone) / 3, abs=1e-6)


def test_the_gradient_is_that_of_finite_differences() -> None:
    """Float32 rounds a loss of about 1 to 1e-7, so a step of 1e-2 and a bound that its square allows."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4).requires_grad_(), torch.randn(2, 4)
    temperature = torch.tensor(0.7, requires_grad=True)
    distill(student, teacher, temperature=temperature).backward()
    step = 1e-2

    def at(change: torch.Tensor, warmer: float = 0.0) -> float:
        """The teacher keeps the temperature of before, which its distribution does not follow."""
        divisor = 0.7 + warmer
        wanted = torch.log_softmax(teacher.double() / 0.7, dim=1)
        found = torch.log_softmax((student.detach().double() + change) / divisor, dim=1)
        return float((wanted.exp() * (wanted - found)).sum(dim=1).mean())

    assert student.grad is not None and temperature.grad is not None
    for row in range(2):
        for column in range(4):
            change = torch.zeros(2, 4, dtype=torch.float64)
            change[row, column] = step
            slope = (at(change) - at(-change)) / (2 * step)
            assert student.grad[row, column].item() == pytest.approx(slope, abs=1e-4)
    nothing = torch.zeros(2, 4)
    slope = (at(nothing, step) - at(nothing, -step)) / (2 * step)
    assert temperature.grad.item() == pytest.approx(slope, abs=1e-3)


def test_the_teacher_gets_no_gradient() -> None:
    teacher = torch.randn(2, 3, requires_grad=True)
    distill(torch.randn(2, 3).requires_grad_(), teacher, temperature=1.0).backward()
    assert teacher.grad is None


def test_a_masked_candidate_is_in_neither_distribution() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4).requires_grad_(), torch.randn(2, 4)
    mask = torch.tensor([[True, True, False, True], [True, True, True, True]])
    loss = distill(student, teacher, temperature=0.5, mask_QK=mask)
    kept = [0, 1, 3]
    first = distill(student[:1, kept], teacher[:1, kept], temperature=0.5)
    second = distill(student[1:], teacher[1:], temperature=0.5)
    assert loss.item() == pytest.approx((first.item() + second.item()) / 2, abs=1e-6)
    with torch.autograd.set_detect_anomaly(True):
        loss.backward()
    assert student.grad is not None and student.grad[0, 2] == 0 and student.grad.isfinite().all()


def test_a_query_with_one_candidate_is_left_out() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3).requires_grad_(), torch.randn(2, 3)
    mask = torch.tensor([[False, True, False], [True, True, True]])
    loss = distill(student, teacher, temperature=0.5, mask_QK=mask)
    assert loss.item() == pytest.approx(distill(student[1:], teacher[1:], temperature=0.5).item(), abs=1e-6)
    nothing = distill(student, teacher, temperature=0.5, mask_QK=torch.zeros(2, 3, dtype=torch.bool))
    assert nothing.item() == 0
    nothing.backward()
    assert student.grad is not None and student.grad.abs().sum() == 0


def test_a_score_that_is_far_away_has_no_epsilon() -> None:
    """Where a probability rounds to 0, its logarithm is still the number that it is."""
    student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert distill(student, teacher, temperature=0.001).item() == pytest.approx(1000, rel=1e-4)


def test_teacher_scores_are_a_mean() -> None:
    recall, rerank = torch.tensor([[0.5, -0.5]]), torch.tensor([[1.0, 0.0]])
    assert teacher_scores(recall, rerank).tolist() == [[0.75, -0.25]]
    assert teacher_scores(recall, rerank, 0.25).tolist() == [[0.875, -0.125]]


def test_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="above 0, got 0"):
        distill(torch.zeros(1, 2), torch.zeros(1, 2), temperature=0.0)
    with pytest.raises(ValueError, match=r"\[1, 2\], \[1, 3\]"):
        distill(torch.zeros(1, 2), torch.zeros(1, 3), temperature=1.0)
    with pytest.raises(ValueError, match="from 0 to 1, got 2"):
        teacher_scores(torch.zeros(1, 2), torch.zeros(1, 2), 2)
