"""The loss and its gradients in few plain torch operations, of which the products are most of the work."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdp_kernels.checks import compute_dtype
from sdp_kernels.cross_correlation.forms import Options, chunk_rows, column_products, gram_products, matrix_products
from sdp_kernels.cross_correlation.reference import DEAD_EPSILONS


class Columns(NamedTuple):
    """Normalised features of both networks."""

    left: Tensor  # (batch, dim): the student's unit columns, less the teacher's if the teacher is the target
    right: Tensor  # (batch, dim): the teacher's unit columns
    inverse_norms: Tensor  # (2, dim): of the student's and the teacher's columns; 0 for dead features


def loss_and_gradients(
    student: Tensor, teacher: Tensor, sample_weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the gradients asked for (the others empty), in the compute dtype."""
    weight, residual = options.weight, options.residual
    left, right, inverse_norms = normalise(student, teacher, sample_weight, options.center, residual, options.eps)
    if options.form == "matrix" and not residual:
        return _through_matrix(left, right, inverse_norms, sample_weight, options)
    diagonal = column_products(left, right)
    if options.form == "gram":
        products = gram_products(left, right, diagonal, weight, options.teacher_gradient)
    else:
        need_left = options.student_gradient or (options.teacher_gradient and residual)
        products = matrix_products(left, right, weight, need_left, options.teacher_gradient)
    deviation = diagonal if residual else diagonal - 1
    loss = deviation.dot(deviation) + products.off_diagonal

    counted = weight if products.with_diagonal else 0.0  # what the products hold of the diagonal
    slope = deviation.sub(diagonal, alpha=counted).mul_(2)
    student_result, teacher_result = left.new_empty(0), left.new_empty(0)
    if options.teacher_gradient:
        product, other = products.right, left
        if residual:  # the teacher also enters `left`, with a minus
            product, other = product - products.left, left - right
        teacher_result = feature_gradient(product, other, slope, right, inverse_norms[1], sample_weight)
    if options.student_gradient:
        unit = left + right if residual else left
        student_result = feature_gradient(products.left, right, slope, unit, inverse_norms[0], sample_weight)
    return loss, student_result, teacher_result


def _through_matrix(
    left: Tensor, right: Tensor, inverse_norms: Tensor, sample_weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The identity target through C, with little but the products on (batch, dim) tensors.

    With G = dL/dC, the gradient by the student's unit columns is right @ G.T, and its part along column i is
    sum_j C_ij G_ij: going back through the norm needs C only. For the teacher it is the same with columns of C.
    """
    weight, dim = options.weight, left.shape[1]
    loss = left.new_zeros(())
    student_result = torch.empty_like(left) if options.student_gradient else left.new_empty(0)
    teacher_result = torch.zeros_like(right) if options.teacher_gradient else left.new_empty(0)
    teacher_along = left.new_zeros(dim)
    for start in range(0, dim, chunk_rows(dim)):
        rows = slice(start, min(start + chunk_rows(dim), dim))
        correlation = left[:, rows].T @ right
        diagonal = correlation.diagonal(start)
        slope = (diagonal - 1).mul_(2)
        loss += slope.dot(slope) / 4
        along = slope * diagonal
        teacher_along[rows] += along
        diagonal.zero_()
        squares = torch.linalg.vector_norm(correlation, dim=1).square_().mul_(weight)
        loss += squares.sum()
        along.add_(squares, alpha=2)
        if options.teacher_gradient:
            teacher_along.add_(column_products(correlation, correlation), alpha=2 * weight)
        correlation.mul_(2 * weight)  # becomes G
        diagonal.copy_(slope)
        if options.teacher_gradient:
            teacher_result.addmm_(left[:, rows], correlation)
        if options.student_gradient:
            inverse = inverse_norms[0, rows]
            torch.mm(right, correlation.mul_(inverse[:, None]).T, out=student_result[:, rows])
            student_result[:, rows].addcmul_(left[:, rows], along.mul_(inverse), value=-1)
    if options.teacher_gradient:
        teacher_result.addcmul_(right, teacher_along, value=-1).mul_(inverse_norms[1])
    if sample_weight is not None:
        root = sample_weight.to(left.dtype).clamp_min(0).sqrt()[:, None]
        for result in (student_result, teacher_result):
            if result.numel():
                result.mul_(root)
    return loss, student_result, teacher_result


def normalise(
    student: Tensor, teacher: Tensor, sample_weight: Tensor | None, center: bool, residual: bool, eps: float
) -> Columns:
    """Centre and scale the columns of both inputs to unit norm."""
    dtype = compute_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    found = _unit_columns_in_one_pass(student, teacher, eps) if center and sample_weight is None and eps > 0 else None
    left, right, inverse = found or _unit_columns(student, teacher, sample_weight, center, eps)
    if residual:
        left.sub_(right)
    return Columns(left, right, inverse)


def _unit_columns_in_one_pass(student: Tensor, teacher: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Through torch's batch normalisation; None if a feature is, or may be, dead."""
    batch = student.shape[0]
    scale = student.new_full((student.shape[1],), batch**-0.5)
    options: Any = (None, None, None, True, 0.0, eps)  # no bias, no running statistics, training, momentum
    left, left_mean, left_inverse = torch.native_batch_norm(student, scale, *options)
    right, right_mean, right_inverse = torch.native_batch_norm(teacher, scale, *options)
    inverse = torch.stack((left_inverse, right_inverse))
    variance = inverse.pow(-2).sub_(eps)
    limit = (DEAD_EPSILONS * torch.finfo(student.dtype).eps) ** 2
    # Below a thousandth of eps the difference above is mostly rounding: look at such a feature itself.
    if (variance <= torch.stack((left_mean, right_mean)).square_().mul_(limit).add_(1e-3 * eps)).any():
        return None
    return left, right, inverse.mul_(batch**-0.5)


def _unit_columns(
    student: Tensor, teacher: Tensor, sample_weight: Tensor | None, center: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit columns of both, as one tensor because on small input the calls are most of the time; inverse norms."""
    both = torch.stack((student, teacher))
    total: float | Tensor = float(student.shape[0])
    weight = None
    if sample_weight is not None:
        weight = sample_weight.to(both.dtype).clamp_min(0)[:, None]
        total = weight.sum()
        both.masked_fill_(weight == 0, 0)  # whatever a row left out holds
    tiny = torch.finfo(both.dtype).tiny
    if not center:
        means = both.new_zeros(2, both.shape[2])
    elif weight is None:
        means = both.mean(1)
    else:
        means = (both * weight).sum(1) / weight.sum().clamp_min(tiny)
    both.sub_(means[:, None])
    if weight is not None:
        both.mul_(weight.sqrt())
    left, right = both.unbind()
    squares = torch.stack((column_products(left, left), column_products(right, right)))
    limit = (DEAD_EPSILONS * torch.finfo(both.dtype).eps) ** 2 * total
    dead = squares <= means.square_().mul_(limit)  # total * mean^2 is what centring took from the raw squares
    inverse = squares.add_(total * eps).rsqrt_().masked_fill_(dead, 0)
    both.mul_(inverse[:, None])
    return left, right, inverse


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
    along = column_products(unit, gradient)
    gradient.addcmul_(unit, along, value=-1).mul_(inverse)
    if sample_weight is not None:
        gradient.mul_(sample_weight.to(gradient.dtype).clamp_min(0).sqrt()[:, None])
    return gradient
