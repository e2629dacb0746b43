"""Distillation losses over rows, in plain torch."""

import torch
from torch import Tensor

from sdp_kernels.checks import compute_dtype


def kl_divergence_loss_reference(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0, sample_weight: Tensor | None = None
) -> Tensor:
    """Mean over rows of sum_c p_c (log p_c - log q_c), times temperature squared.

    p = softmax(teacher / temperature), q = softmax(student / temperature): Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531. A class that the teacher gives no probability adds 0.
    """
    dtype = compute_dtype(student_logits, teacher_logits)
    student = leave_out(student_logits.to(dtype), sample_weight)
    teacher = leave_out(teacher_logits.to(dtype), sample_weight)
    log_student = torch.log_softmax(student / temperature, -1)
    log_teacher = torch.log_softmax(teacher / temperature, -1)
    probability = log_teacher.exp()
    ratio = torch.where(probability > 0, log_teacher - log_student, 0)
    return weighted_mean((probability * ratio).sum(-1), sample_weight) * temperature**2


def cosine_distance_loss_reference(
    student: Tensor, teacher: Tensor, *, sample_weight: Tensor | None = None, eps: float = 1e-8
) -> Tensor:
    """Mean over rows of 1 - <s, t> / (|s| |t|), each norm at least `eps`."""
    dtype = compute_dtype(student, teacher)
    student = leave_out(student.to(dtype), sample_weight)
    teacher = leave_out(teacher.to(dtype), sample_weight)
    cosine = torch.nn.functional.cosine_similarity(student, teacher, dim=-1, eps=eps)
    return weighted_mean(1 - cosine, sample_weight)


def leave_out(rows: Tensor, sample_weight: Tensor | None) -> Tensor:
    """Rows without a positive weight become zeros, whatever they held: multiplying would keep a NaN."""
    if sample_weight is None:
        return rows
    return rows.masked_fill((sample_weight <= 0)[..., None], 0)


def weighted_mean(values: Tensor, sample_weight: Tensor | None) -> Tensor:
    """Mean of one value a row; 0 if no row has a positive weight."""
    if sample_weight is None:
        return values.mean()
    weight = sample_weight.to(values.dtype).clamp_min(0)
    return (values * weight).sum() / weight.sum().clamp_min(torch.finfo(values.dtype).tiny)
