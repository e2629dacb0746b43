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
    """Centre and scale the columns of both inputs to unit norm and take their inner products.

    Both stand side by side in one matrix, because on small inputs the number of operations is the time.
    """
    dim = student.shape[1]
    columns = torch.cat((student, teacher), 1).to(compute_dtype(student, teacher))
    total: float | Tensor = float(student.shape[0])
    weight = None
    if sample_weight is not None:
        weight = sample_weight.to(columns.dtype).clamp_min(0)[:, None]
        total = weight.sum()
        columns.masked_fill_(weight == 0, 0)
    mean = columns.new_zeros(()) if not center else _mean(columns, weight)
    if center:
        columns.sub_(mean)
    if weight is not None:
        columns.mul_(weight.sqrt())
    squares = (columns * columns).sum(0)
    limit = (DEAD_EPSILONS * torch.finfo(columns.dtype).eps) ** 2 * total
    dead = squares <= mean.square().mul_(limit)  # total * mean^2 is what centring took from the raw squares
    inverse = squares.add_(total * eps).rsqrt_().masked_fill_(dead, 0)
    columns.mul_(inverse)
    left, right = columns[:, :dim], columns[:, dim:]
    if residual:
        left.sub_(right)
    return Columns(left, right, inverse.view(2, dim), (left * right).sum(0))


def _mean(columns: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return columns.mean(0)
    return (columns * weight).sum(0) / weight.sum().clamp_min(torch.finfo(columns.dtype).tiny)


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
