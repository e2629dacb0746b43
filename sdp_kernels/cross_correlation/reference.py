"""The cross-correlation loss as it is defined: one dim x dim matrix, gradients by autograd."""

from typing import Literal

import torch
from torch import Tensor

from sdp_kernels.checks import compute_dtype

DEAD_EPSILONS = 16  # a feature is dead if its centred norm is at most this many machine epsilons of its raw norm


def cross_correlation_loss_reference(
    student: Tensor,
    teacher: Tensor,
    *,
    off_diagonal_weight: float = 5e-3,
    center: bool = True,
    target: Literal["identity", "teacher"] = "identity",
    eps: float = 1e-12,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Sum of (C - target)^2, off-diagonal entries times `off_diagonal_weight`; see `cross_correlation_loss`.

    Zbontar et al. 2021, equations 1 and 2, https://arxiv.org/abs/2103.03230, with the teacher's features in
    the place of the second view, as in self-distilled pruning, https://arxiv.org/abs/2109.15014.
    """
    dtype = compute_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    weight = student.new_ones(student.shape[0], 1)
    if sample_weight is not None:
        weight = sample_weight.to(dtype).clamp_min(0)[:, None]
        student, teacher = student.masked_fill(weight == 0, 0), teacher.masked_fill(weight == 0, 0)
    student = unit_columns(student, weight, center, eps)
    teacher = unit_columns(teacher, weight, center, eps)
    identity = torch.eye(student.shape[1], dtype=dtype, device=student.device)
    goal = identity if target == "identity" else teacher.T @ teacher
    difference = student.T @ teacher - goal
    scale = identity + off_diagonal_weight * (1 - identity)
    return (difference.square() * scale).sum()


def unit_columns(features: Tensor, weight: Tensor, center: bool, eps: float) -> Tensor:
    """Columns divided by the root of their (weighted) sum of squares; zeros where there is no signal."""
    raw_norm = (weight * features.square()).sum(0).sqrt()
    if center:
        features = features - (weight * features).sum(0) / weight.sum().clamp_min(torch.finfo(features.dtype).tiny)
    columns = weight.sqrt() * features
    squares = columns.square().sum(0)
    dead = squares.sqrt() <= DEAD_EPSILONS * torch.finfo(features.dtype).eps * raw_norm
    norm = torch.where(dead, 1, squares + weight.sum() * eps).sqrt()
    return torch.where(dead, 0, columns / norm)
