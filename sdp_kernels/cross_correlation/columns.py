"""Work on columns around the products, in plain torch; kernel.py has the same two functions fused."""

from typing import NamedTuple

import torch
from torch import Tensor

from sdp_kernels.checks import compute_dtype

DEAD_EPSILONS = 16  # a feature is dead if its centred norm is below this many machine epsilons of its raw norm


class Columns(NamedTuple):
    """Normalised features of both networks."""

    left: Tensor  # (batch, dim): the student's unit columns, less the teacher's if the teacher is the target
    right: Tensor  # (batch, dim): the teacher's unit columns
    inverse_norms: Tensor  # (2, dim): of the student's and the teacher's columns; 0 for dead features
    diagonal: Tensor  # (dim,): column by column inner product of left and right


def normalise(
    student: Tensor, teacher: Tensor, sample_weight: Tensor | None, center: bool, residual: bool, eps: float
) -> Columns:
    """Centre and scale the columns of both inputs to unit norm and take their inner products."""
    dtype = compute_dtype(student, teacher)
    left, left_inverse = _unit_columns(student.to(dtype), sample_weight, center, eps)
    right, right_inverse = _unit_columns(teacher.to(dtype), sample_weight, center, eps)
    if residual:
        left -= right
    return Columns(left, right, torch.stack((left_inverse, right_inverse)), (left * right).sum(0))


def _unit_columns(features: Tensor, sample_weight: Tensor | None, center: bool, eps: float) -> tuple[Tensor, Tensor]:
    if sample_weight is None:
        total: Tensor | int = features.shape[0]
        mean = features.mean(0) if center else torch.zeros_like(features[0])
        columns = features - mean
    else:
        weight = sample_weight.to(features.dtype).clamp_min(0)[:, None]
        total = weight.sum()
        features = features.masked_fill(weight == 0, 0)
        mean = (features * weight).sum(0) / total.clamp_min(torch.finfo(features.dtype).tiny)
        if not center:
            mean = torch.zeros_like(mean)
        columns = (features - mean).mul_(weight.sqrt())
    squares = columns.square().sum(0)
    raw_squares = squares + mean.square() * total
    limit = (DEAD_EPSILONS * torch.finfo(features.dtype).eps) ** 2
    inverse = torch.rsqrt(squares + total * eps).masked_fill_(squares <= limit * raw_squares, 0)
    return columns.mul_(inverse), inverse


def feature_gradient(
    product: Tensor, other: Tensor, slope: Tensor, unit: Tensor, inverse: Tensor, sample_weight: Tensor | None
) -> Tensor:
    """Gradient of the features from `product + other * slope`, the gradient of their unit columns.

    Going back through the norm removes the part along the column and divides by the norm. Centring needs
    nothing more: the incoming gradient is a combination of centred columns, whose (weighted) sum is zero.

    Args:
        product: (batch, dim), overwritten.
        other: (batch, dim).
        slope: (dim,).
        unit: (batch, dim), the unit columns.
        inverse: (dim,), the inverse norms of the columns.
        sample_weight: (batch,) or None.
    """
    gradient = product.addcmul_(other, slope)
    along = (unit * gradient).sum(0)
    gradient.addcmul_(unit, along, value=-1).mul_(inverse)
    if sample_weight is not None:
        gradient.mul_(sample_weight.to(gradient.dtype).clamp_min(0).sqrt()[:, None])
    return gradient
