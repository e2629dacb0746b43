"""What is special to the KL and cosine losses: torch's own functions, masked classes, left-out rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sdp_kernels import cosine_distance_loss, kl_divergence_loss

LOSSES = [kl_divergence_loss, cosine_distance_loss]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_that_of_torch(temperature: float) -> None:
    student, teacher = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    loss = kl_divergence_loss(student, teacher, temperature=temperature)
    expected = F.kl_div(
        torch.log_softmax(student / temperature, -1).flatten(0, 1),
        torch.softmax(teacher / temperature, -1).flatten(0, 1),
        reduction="batchmean",
    )
    torch.testing.assert_close(loss, expected * temperature**2)


def test_kl_gradient_is_the_difference_of_probabilities() -> None:
    student, teacher = torch.randn(2, 4, 7, dtype=torch.float64)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(kl_divergence_loss(student, teacher, temperature=3.0), student)
    expected = 3 * (torch.softmax(student / 3, -1) - torch.softmax(teacher / 3, -1)) / 4
    torch.testing.assert_close(gradient, expected)


def test_cosine_is_that_of_torch() -> None:
    student, teacher = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    expected = (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()
    torch.testing.assert_close(cosine_distance_loss(student, teacher), expected)
    torch.testing.assert_close(cosine_distance_loss(student, -student), torch.tensor(2.0, dtype=torch.float64))


def test_masked_classes_change_nothing() -> None:
    student, teacher = torch.randn(2, 4, 7)
    expected = kl_divergence_loss(student, teacher)
    closed = torch.full((4, 2), -torch.inf)
    student = torch.cat((student, closed), -1).requires_grad_()
    teacher = torch.cat((teacher, closed), -1).requires_grad_()
    loss = kl_divergence_loss(student, teacher)
    torch.testing.assert_close(loss, expected)
    for gradient in torch.autograd.grad(loss, (student, teacher)):
        assert gradient.isfinite().all()
        assert (gradient[:, 7:] == 0).all()


def test_extreme_logits_stay_finite() -> None:
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0]])
    loss = kl_divergence_loss(student, teacher)
    torch.testing.assert_close(loss, torch.tensor(2e4))
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("loss_function", LOSSES)
def test_weights_average_rows_and_leave_rows_out(loss_function: Callable[..., Tensor]) -> None:
    student, teacher = torch.randn(2, 2, 3, 5)
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
    repeats = weight.flatten().long()
    expected = loss_function(
        student.view(6, 5).repeat_interleave(repeats, 0), teacher.view(6, 5).repeat_interleave(repeats, 0)
    )
    student[0, 1], teacher[1, 0] = torch.nan, torch.inf
    student.requires_grad_()
    loss = loss_function(student, teacher, sample_weight=weight)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()
    assert (gradient[0, 1] == 0).all()


@pytest.mark.parametrize("loss_function", LOSSES)
def test_weights_may_be_a_bool_mask(loss_function: Callable[..., Tensor]) -> None:
    student, teacher = torch.randn(2, 4, 5)
    mask = torch.tensor([True, False, True, True])
    expected = loss_function(student[mask], teacher[mask])
    torch.testing.assert_close(loss_function(student, teacher, sample_weight=mask), expected)


@pytest.mark.parametrize("loss_function", LOSSES)
def test_no_rows_kept_give_zero(loss_function: Callable[..., Tensor]) -> None:
    student, teacher = torch.full((2, 3, 5), torch.nan)
    student.requires_grad_()
    loss = loss_function(student, teacher, sample_weight=torch.zeros(3))
    assert loss == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


def test_rows_of_zeros_have_cosine_zero() -> None:
    student = torch.zeros(2, 3, requires_grad=True)
    loss = cosine_distance_loss(student, torch.ones(2, 3))
    assert loss == 1
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("loss_function", LOSSES)
def test_compiles_without_graph_breaks(loss_function: Callable[..., Tensor]) -> None:
    student, teacher = torch.randn(2, 4, 7)
    compiled = torch.compile(loss_function, fullgraph=True, backend="aot_eager")
    weight = torch.rand(4)
    torch.testing.assert_close(
        compiled(student.requires_grad_(), teacher, sample_weight=weight),
        loss_function(student, teacher, sample_weight=weight),
    )


@pytest.mark.parametrize(
    ("loss_function", "student", "teacher", "options", "error", "message"),
    [
        (kl_divergence_loss, torch.ones(2, 3), torch.ones(3, 2), {}, ValueError, r"teacher_logits .* got \(3, 2\)"),
        (kl_divergence_loss, torch.ones(2, 3), torch.ones(2, 3), {"temperature": 0}, ValueError, "temperature .* 0"),
        (kl_divergence_loss, torch.ones(()), torch.ones(()), {}, ValueError, "student_logits .* at least one row"),
        (kl_divergence_loss, torch.ones(0, 3), torch.ones(0, 3), {}, ValueError, r"got shape \(0, 3\)"),
        (cosine_distance_loss, torch.ones(2, 3).int(), torch.ones(2, 3), {}, TypeError, "student .* torch.int32"),
        (cosine_distance_loss, torch.ones(2, 3), torch.ones(2, 3), {"eps": -1.0}, ValueError, "eps .* got -1.0"),
        (
            cosine_distance_loss,
            torch.ones(2, 3),
            torch.ones(2, 3),
            {"sample_weight": torch.ones(2, 3)},
            ValueError,
            r"sample_weight must have shape \(2,\), got \(2, 3\)",
        ),
    ],
)
def test_bad_arguments(
    loss_function: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        loss_function(student, teacher, **options)
