"""The loss on a GPU from statistics that the product took of its output: no kernel reads it only to sum its columns.

The kernels are those of the cross-correlation loss, but for the one that takes these statistics. The diagonal is summed
where the columns are scaled for the large products, which has to read them anyway: made of sums over raw columns it
would lose digits with the teacher as the target, where it is what is left of two numbers that nearly agree.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
from torch import Tensor

from sdp_kernels.cross_correlation.forms import Options, chunk_rows
from sdp_kernels.cross_correlation.kernel import (
    LOSS_COLUMNS,
    LOSS_ROWS,
    _along_kernel,
    _correlation_loss_kernel,
    _gradient_kernel,
)
from sdp_kernels.cross_correlation.kernel_columns import BLOCK_BATCH, BLOCK_DIM, Columns, _normalise_kernel, row_chunks
from sdp_kernels.cross_correlation.kernel_tiles import DEAD_LIMIT, product_dtype, result_like
from sdp_kernels.dispatch import on_its_device

Products = tuple[Tensor | None, Tensor | None]  # what gradients by student and teacher are made of; None if not asked
BLOCKS = {"BLOCK_BATCH": BLOCK_BATCH, "BLOCK_DIM": BLOCK_DIM}


@on_its_device
def loss_and_gradients(
    student: Tensor, teacher: Tensor, sample_weight: Tensor | None, statistics: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the gradients asked for in float32 (the others empty).

    Args:
        student: (batch, dim) contiguous.
        teacher: (batch, dim) contiguous.
        sample_weight: (batch,) float32 or None.
        statistics: (parts, 5, dim) float32, of parts of the rows: their weight; mean of the student's columns and
            squares about it; the same of the teacher's.
        options: what to compute.
    """
    batch, dim = student.shape
    chunks, rows = row_chunks(batch, dim)
    strips = triton.cdiv(dim, BLOCK_DIM)
    unit = _normalise(student, teacher, sample_weight, statistics, options)
    if options.form == "gram":
        loss_parts = statistics.new_empty(strips)
        products = _gram_products(unit, options)
    else:
        loss_parts, products = _matrix_products(unit, options, strips)
    shared = (
        student,
        teacher,
        student if sample_weight is None else sample_weight,
        unit.columns,
        *(unit.sums if each is None else each for each in products),
        unit.sums,
    )
    sizes = batch, dim, rows, chunks, options.weight
    flags = {
        "RESIDUAL": options.residual,
        "GRAM": options.form == "gram",
        "STUDENT": options.student_gradient,
        "TEACHER": options.teacher_gradient,
        "HAS_WEIGHT": sample_weight is not None,
        **BLOCKS,
    }
    if options.form == "gram" or options.student_gradient or options.teacher_gradient:
        _along_kernel[(strips, chunks)](*shared, *sizes, **flags)
    results = result_like(student, options.student_gradient), result_like(teacher, options.teacher_gradient)
    _gradient_kernel[(strips, chunks)](*shared, *results, loss_parts, *sizes, **flags)
    return loss_parts.sum(), *results


def _normalise(
    student: Tensor, teacher: Tensor, sample_weight: Tensor | None, statistics: Tensor, options: Options
) -> Columns:
    batch, dim = student.shape
    chunks, rows = row_chunks(batch, dim)
    left = torch.empty_like(student, dtype=product_dtype(student, teacher, options.residual))
    sums = statistics.new_empty(chunks, 4, dim)
    unit = Columns(left, torch.empty_like(left), sums.new_empty(4, dim), sums)
    _normalise_kernel[(triton.cdiv(dim, BLOCK_DIM), chunks)](
        student,
        teacher,
        student if sample_weight is None else sample_weight,
        statistics,
        *unit,
        batch,
        dim,
        rows,
        len(statistics),
        options.eps,
        DEAD_LIMIT,
        CENTER=options.center,
        RESIDUAL=options.residual,
        HAS_WEIGHT=sample_weight is not None,
        **BLOCKS,
    )
    return unit


def _gram_products(unit: Columns, options: Options) -> Products:
    """The products that the gradients by the unit columns are made of; the first also holds the sum of squares."""
    left, right = unit.left, unit.right
    return (right @ right.T) @ left, (left @ left.T) @ right if options.teacher_gradient else None


def _matrix_products(unit: Columns, options: Options, strips: int) -> tuple[Tensor, Products]:
    """Parts of the loss after room for `strips`, and the same products from a few rows of C at a time."""
    left, right = unit.left, unit.right
    dim, height = left.shape[1], chunk_rows(left.shape[1])
    across = triton.cdiv(dim, LOSS_COLUMNS)
    starts = range(0, dim, height)
    downs = [triton.cdiv(min(height, dim - start), LOSS_ROWS) for start in starts]
    loss_parts = unit.sums.new_empty(strips + sum(downs) * across)
    parts = torch.split(loss_parts[strips:], [down * across for down in downs])
    need_student = options.student_gradient or (options.teacher_gradient and options.residual)
    student_product = torch.empty_like(left) if need_student else None
    teacher_product: Tensor | None = None
    for start, down, part in zip(starts, downs, parts, strict=True):
        end = min(start + height, dim)
        correlation = left[:, start:end].T @ right
        _correlation_loss_kernel[(down, across)](
            correlation, part, start, end - start, dim, options.weight, LOSS_ROWS, LOSS_COLUMNS
        )
        if student_product is not None:
            torch.mm(right, correlation.T, out=student_product[:, start:end])
        if options.teacher_gradient:
            product = left[:, start:end] @ correlation
            teacher_product = product if teacher_product is None else teacher_product.float().add_(product)
    return loss_parts, (student_product, teacher_product)
