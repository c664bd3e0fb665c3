"""Feature losses against torch's own in float64, and rows without weight."""

# R rows, D features

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.errors import TrainingError
from kdcache.losses import attention_mse, hidden_cosine, hidden_mse, score_mse

R, D = 7, 5
SQUARED = {"hidden_mse": hidden_mse, "attention_mse": attention_mse, "score_mse": score_mse}
LOSSES = {**SQUARED, "hidden_cosine": hidden_cosine}


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    both = torch.randn(2, R, D, generator=generator, dtype=torch.float64).to(dtype)
    return both[0].clone().requires_grad_(), both[1].clone().requires_grad_()


def by_torch(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    """[R] losses by torch's own functions."""
    if name == "hidden_cosine":
        ones = torch.ones(len(student))
        return F.cosine_embedding_loss(student, teacher, ones, reduction="none")
    return F.mse_loss(student, teacher, reduction="none").mean(1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_is_torchs(name: str, weighted: bool):
    student, teacher = pair()
    weights = torch.full((R,), 1 / R, dtype=torch.float64)
    if weighted:
        weights = torch.arange(R, dtype=torch.float64)
    loss = LOSSES[name](student, teacher, weights if weighted else None)
    (loss * 2).backward()
    other = student.detach().clone().requires_grad_()
    expected = (by_torch(name, other, teacher.detach()) * weights).sum()
    (expected * 2).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.grad, other.grad)
    assert teacher.grad is None


def test_values_by_hand():
    student = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    teacher = torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    for loss in SQUARED.values():
        assert loss(student, teacher).item() == pytest.approx((5 / 2 + 1 / 2) / 2)
    assert hidden_cosine(student, teacher).item() == pytest.approx((1 + 0) / 2)
    assert hidden_cosine(-student, teacher, torch.tensor([0.0, 1.0])).item() == pytest.approx(2)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_and_no_loss_of_the_teacher_itself(name: str):
    student, teacher = pair()
    weights = torch.linspace(0, 1, R, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher, weights), (student,))
    assert abs(LOSSES[name](teacher, teacher).item()) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_half_types_are_computed_in_float32(name: str, dtype: torch.dtype):
    student, teacher = pair(dtype)
    # Outliers as hidden states have them: their square is infinite in float16.
    big = torch.ones(R, D, dtype=dtype)
    big[:, 2] = 500
    loss = LOSSES[name](student * big, teacher.float() * 1)
    loss.backward()
    other = student.detach().double().requires_grad_()
    expected = by_torch(name, other * big.double(), teacher.detach().double()).mean()
    expected.backward()
    assert loss.dtype == torch.float32
    # The product itself is rounded to the half type.
    rounding = max(1e-5, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(loss.double(), expected, rtol=rounding, atol=0)
    size = float(other.grad.abs().max())
    torch.testing.assert_close(
        student.grad.double(), other.grad, rtol=rounding, atol=rounding * size
    )


@pytest.mark.parametrize("held", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_without_weight_may_hold_anything(name: str, held: float):
    student, teacher = pair()
    weights = torch.arange(R, dtype=torch.float32)
    with torch.no_grad():
        student[0] = held
        teacher[0] = held
    loss = LOSSES[name](student, teacher, weights)
    loss.backward()
    rest = student.detach()[1:].clone().requires_grad_()
    expected = LOSSES[name](rest, teacher[1:], weights[1:])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.grad[1:], rest.grad)
    assert not student.grad[0].any()


def test_a_row_of_zeros_has_no_direction():
    student = torch.zeros(1, D, requires_grad=True)
    loss = hidden_cosine(student, torch.ones(1, D))
    loss.backward()
    assert loss.item() == 1
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("weights", [None, torch.zeros(0)])
@pytest.mark.parametrize("name", LOSSES)
def test_no_rows_cost_nothing(name: str, weights: Tensor | None):
    student = torch.zeros(0, D, requires_grad=True)
    loss = LOSSES[name](student, torch.zeros(0, D), weights)
    loss.backward()
    assert loss == 0
    assert student.grad.shape == (0, D)


@pytest.mark.parametrize("name", LOSSES)
def test_other_shapes_are_refused_in_one_line(name: str):
    student, teacher = pair()
    cases = [
        ((student, teacher[:, 1:]), rf"{name}: the student's \[7, 5\] and the teacher's \[7, 4\]"),
        ((student[1:], teacher), r"\[6, 5\] and the teacher's \[7, 5\] differ; expected"),
        ((student[0], teacher[0]), r"\[5\] and the teacher's \[5\]"),
        ((student, teacher, torch.ones(3)), rf"{name}: the row weights are \[3\]; expected \[7\]"),
        ((student, teacher, torch.ones(R, 1)), r"are \[7, 1\]; expected \[7\]"),
    ]
    for arguments, message in cases:
        with pytest.raises(TrainingError, match=message) as found:
            LOSSES[name](*arguments)
        assert "\n" not in str(found.value)
