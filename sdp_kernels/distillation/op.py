"""Distillation losses between rows of a student and a teacher: KL divergence and cosine distance."""

import torch
from torch import Tensor

from sdp_kernels.checks import check_above, check_at_least, check_pair, check_sample_weight
from sdp_kernels.dispatch import choose_backend
from sdp_kernels.distillation.reference import cosine_distance_loss_reference, kl_divergence_loss_reference

OFFERS = ("reference",)


def kl_divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    sample_weight: Tensor | None = None,
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
            positive weight are left out entirely: they may hold NaN.

    Returns:
        A scalar, float32 (float64 if an input is), also under autocast.

    Raises:
        ValueError: shapes or devices differ, there is nothing to average, temperature <= 0.
        TypeError: an input is not a floating-point tensor.
    """
    check_above("temperature", temperature, 0)
    _check_rows(student_logits, teacher_logits, sample_weight, "_logits")
    choose_backend("kl_divergence_loss", (student_logits, teacher_logits), OFFERS)
    with torch.autocast(student_logits.device.type, enabled=False):
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
            positive weight are left out entirely: they may hold NaN.
        eps: the least value of each norm, >= 0. A row of zeros has cosine 0.

    Returns:
        A scalar, float32 (float64 if an input is), also under autocast.

    Raises:
        ValueError: shapes or devices differ, there is nothing to average, eps < 0.
        TypeError: an input is not a floating-point tensor.
    """
    check_at_least("eps", eps, 0)
    _check_rows(student, teacher, sample_weight, "")
    choose_backend("cosine_distance_loss", (student, teacher), OFFERS)
    with torch.autocast(student.device.type, enabled=False):
        return cosine_distance_loss_reference(student, teacher, sample_weight=sample_weight, eps=eps)


def _check_rows(student: Tensor, teacher: Tensor, sample_weight: Tensor | None, suffix: str) -> None:
    check_pair(student, teacher, f"student{suffix}", f"teacher{suffix}")
    if student.dim() < 1 or student.numel() == 0:
        raise ValueError(f"student{suffix} must have at least one row, got shape {tuple(student.shape)}")
    check_sample_weight(sample_weight, student.shape[:-1], student)
