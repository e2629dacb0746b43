"""Distillation losses between rows of a student and a teacher: KL divergence and cosine distance.

Public functions, checks, autograd, registration. Both losses read their input once forward and once backward, and keep
nothing of its size in between: forward leaves a few numbers a row, from which backward makes the softmax or the unit
vector again. The operator gives a loss a row; their weighted mean is plain torch. On a CPU rows come in chunks that
stay in the cache, and input that fits into one chunk is left to autograd, which is sooner done.
"""

from typing import Any

import torch
from torch import Tensor

from sdp_kernels.checks import (
    check_above,
    check_at_least,
    check_pair,
    check_sample_weight,
    check_weight_values,
    compute_dtype,
)
from sdp_kernels.dispatch import OFFERS, choose_backend, without_autocast
from sdp_kernels.distillation import cpu
from sdp_kernels.distillation.reference import (
    cosine_distance_loss_reference,
    kl_divergence_loss_reference,
    weighted_mean,
)
from sdp_kernels.distillation.rows import STATISTICS, RowLosses, room_for


def kl_divergence_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, sample_weight: Tensor | None = None
) -> Tensor:
    """Kullback-Leibler divergence of the student's class distribution from the teacher's.

    The mean over rows of sum_c p_c (log p_c - log q_c), times temperature squared, where p and q are the
    softmax of the teacher's and the student's logits divided by the temperature. The square keeps the
    gradient's size independent of the temperature (Hinton et al. 2015, https://arxiv.org/abs/1503.02531):
    do not multiply by it again.

    Args:
        student_logits: (..., classes), any float dtype.
        teacher_logits: the same shape, any float dtype; gets a gradient if it asks for one. Classes may
            be switched off with -inf in both.
        temperature: above 0.
        sample_weight: the shape without classes, weights >= 0 of the rows in the mean, or a bool mask. Rows without a
            positive weight are left out entirely: they may hold NaN. If no row counts, that is an error on a CPU;
            on a GPU, where looking would stall it, the loss is 0.

    Returns:
        A scalar, float32 (float64 if an input is), also under autocast.

    Raises:
        RuntimeError: on double backward, unless the input is small and on a CPU.
        ValueError: shapes or devices differ, there is nothing to average, temperature <= 0.
        TypeError: an input is not a floating-point tensor.

    Example:
        >>> teacher = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
        >>> round(kl_divergence_loss(torch.zeros(2, 2), teacher).item(), 4)
        0.0654
    """
    temperature = float(temperature)
    check_above("temperature", temperature, 0)
    _check_rows(student_logits, teacher_logits, sample_weight, "_logits")
    backend = choose_backend("kl_divergence_loss", (student_logits, teacher_logits), _offers(student_logits))
    with without_autocast(student_logits):
        if backend != "reference":
            losses, _ = _row_losses(student_logits, teacher_logits, sample_weight, "kl", temperature, backend)
            return weighted_mean(losses, sample_weight) * temperature**2
        return kl_divergence_loss_reference(
            student_logits, teacher_logits, temperature=temperature, sample_weight=sample_weight
        )


def cosine_distance_loss(
    student: Tensor, teacher: Tensor, *, sample_weight: Tensor | None = None, eps: float = 1e-8
) -> Tensor:
    """One minus the cosine between the student's and the teacher's rows, averaged over the rows.

    Args:
        student: (..., dim), any float dtype.
        teacher: the same shape, any float dtype; gets a gradient if it asks for one.
        sample_weight: the shape without dim, weights >= 0 of the rows in the mean, or a bool mask. Rows without a
            positive weight are left out entirely: they may hold NaN. If no row counts, that is an error on a CPU;
            on a GPU, where looking would stall it, the loss is 0.
        eps: the least value of each norm, >= 0. A row of zeros has cosine 0.

    Returns:
        A scalar, float32 (float64 if an input is), also under autocast.

    Raises:
        RuntimeError: on double backward, unless the input is small and on a CPU.
        ValueError: shapes or devices differ, there is nothing to average, eps < 0.
        TypeError: an input is not a floating-point tensor.

    Example:
        >>> student = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
        >>> cosine_distance_loss(student, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor(0.5000)
    """
    check_at_least("eps", eps, 0)
    _check_rows(student, teacher, sample_weight, "")
    backend = choose_backend("cosine_distance_loss", (student, teacher), _offers(student))
    with without_autocast(student):
        if backend != "reference":
            losses, _ = _row_losses(student, teacher, sample_weight, "cosine", float(eps), backend)
            return weighted_mean(losses, sample_weight)
        return cosine_distance_loss_reference(student, teacher, sample_weight=sample_weight, eps=eps)


def _offers(student: Tensor) -> tuple[str, ...]:
    """What fits into one chunk of the CPU's implementation is sooner done by autograd."""
    return OFFERS if student.numel() > cpu.CHUNK_ELEMENTS else ("triton", "reference")


def _check_rows(student: Tensor, teacher: Tensor, sample_weight: Tensor | None, suffix: str) -> None:
    check_pair(student, teacher, f"student{suffix}", f"teacher{suffix}")
    if student.dim() < 1 or student.numel() == 0:
        raise ValueError(f"student{suffix} must have at least one row, got shape {tuple(student.shape)}")
    check_sample_weight(sample_weight, student.shape[:-1], student)
    check_weight_values(sample_weight)


@torch.library.custom_op("sdp_kernels::row_losses", mutates_args=())
def _row_losses(
    student: Tensor, teacher: Tensor, sample_weight: Tensor | None, kind: str, option: float, backend: str
) -> tuple[Tensor, Tensor]:
    """The loss of each row, 0 for rows left out, and what its gradient is made from.

    `kind` is "kl", whose `option` is the temperature (by the square of which the losses are not multiplied yet), or
    "cosine", whose `option` is eps.
    """
    if backend == "triton":
        from sdp_kernels.distillation.kernel import row_losses
    else:
        from sdp_kernels.distillation.cpu import row_losses
    return row_losses(student, teacher, sample_weight, kind, option)


@_row_losses.register_fake
def _(
    student: Tensor, teacher: Tensor, sample_weight: Tensor | None, kind: str, option: float, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student, teacher)
    losses = student.new_empty(student.shape[:-1], dtype=dtype)
    return losses, student.new_empty((losses.numel(), STATISTICS[kind]), dtype=dtype)


@torch.library.custom_op("sdp_kernels::row_losses_backward", mutates_args=())
def _row_losses_backward(
    scale: Tensor,
    student: Tensor,
    teacher: Tensor,
    sample_weight: Tensor | None,
    losses: Tensor,
    statistics: Tensor,
    kind: str,
    option: float,
    backend: str,
    student_gradient: bool,
    teacher_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients asked for (the others empty) in the dtypes of their inputs; `scale` is that of each row's loss."""
    found = RowLosses(student, teacher, sample_weight, losses, statistics)
    if backend == "triton":
        from sdp_kernels.distillation.kernel import row_gradients
    else:
        from sdp_kernels.distillation.cpu import row_gradients
    return row_gradients(scale, found, kind, option, student_gradient, teacher_gradient)


@_row_losses_backward.register_fake
def _(scale: Tensor, student: Tensor, teacher: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return room_for(student, teacher, *others[-2:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, sample_weight, *ctx.options = inputs
    saved = (student, teacher, sample_weight, *output)  # a teacher may come from inference mode
    ctx.save_for_backward(*(each.clone() if each is not None and each.is_inference() else each for each in saved))
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, scale: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if scale is None:  # the losses reach nothing that is differentiated
        return (None,) * 6
    wanted = ctx.needs_input_grad[:2]
    student, teacher, sample_weight, losses, statistics = ctx.saved_tensors
    kind, option, backend = ctx.options
    gradients = _row_losses_backward(
        scale=scale,
        student=student,
        teacher=teacher,
        sample_weight=sample_weight,
        losses=losses,
        statistics=statistics,
        kind=kind,
        option=option,
        backend=backend,
        student_gradient=wanted[0],
        teacher_gradient=wanted[1],
    )
    return (*(each if needed else None for each, needed in zip(gradients, wanted, strict=True)), *[None] * 4)


_row_losses.register_autograd(_gradients, setup_context=_save)
