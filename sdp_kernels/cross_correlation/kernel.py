"""The loss and its gradients on a GPU: the products go to cuBLAS, the kernels do what surrounds them.

Columns are cut into strips and rows into chunks, so that few columns keep a device busy too. What belongs to a whole
column (its norm, its inner products) is summed over the chunks by the kernel that needs it next, in a fixed order. Few
rows in the Gram form go another way, kernel_small.py.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdp_kernels.cross_correlation import kernel_columns, kernel_small
from sdp_kernels.cross_correlation.forms import Options, chunk_rows, holds_columns
from sdp_kernels.cross_correlation.kernel_columns import BLOCK_BATCH, BLOCK_DIM, Columns, normalise, row_chunks
from sdp_kernels.cross_correlation.kernel_tiles import (
    COUNTS,
    load_units,
    result_like,
    slope_of,
    through_norm,
    types_of,
)
from sdp_kernels.dispatch import on_its_device
from sdp_kernels.spec import KernelConfig
from sdp_kernels.tiles.kernel_columns import load_tile, store_tile

LOSS_ROWS, LOSS_COLUMNS = 32, 128  # one tile of C

Products = tuple[Tensor | None, Tensor | None]  # what gradients by student and teacher are made of; None if not asked


@on_its_device
def loss_and_gradients(
    student: Tensor, teacher: Tensor, sample_weight: Tensor | None, options: Options, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As cpu.loss_and_gradients, in float32; inputs of one half-precision dtype are multiplied in it.

    Args:
        student: (batch, dim).
        teacher: (batch, dim).
        sample_weight: (batch,) or None.
        options: what to compute.
        statistics: what a product may have taken of the columns already, so that no kernel reads them for that alone:
            (parts, 5, dim) float32, of parts of the rows: their weight; mean of the student's columns and squares
            about it; the same of the teacher's.
    """
    student, teacher = student.contiguous(), teacher.contiguous()
    if sample_weight is not None:
        sample_weight = sample_weight.float().contiguous()
    if statistics is None and holds_columns(student.shape[0], options.form):
        return kernel_small.loss_and_gradients(student, teacher, sample_weight, options)
    batch, dim = student.shape
    chunks, rows = row_chunks(batch, dim)
    strips = triton.cdiv(dim, BLOCK_DIM)
    unit = normalise(student, teacher, sample_weight, options, statistics)
    if options.form == "gram":
        loss_parts = unit.sums.new_empty(strips)
        products = _gram_products(unit, options)
    else:
        loss_parts, products = _matrix_products(unit, options, strips)
    shared = (
        student,
        teacher,
        student if sample_weight is None else sample_weight,
        unit.columns,
        *(unit.sums if each is None else each for each in products),  # read only if they were made
        unit.sums,
    )
    sizes = batch, dim, rows, chunks, options.weight
    flags = {
        "RESIDUAL": options.residual,
        "GRAM": options.form == "gram",
        "STUDENT": options.student_gradient,
        "TEACHER": options.teacher_gradient,
        "HAS_WEIGHT": sample_weight is not None,
        "BLOCK_BATCH": BLOCK_BATCH,
        "BLOCK_DIM": BLOCK_DIM,
    }
    if options.form == "gram" or options.student_gradient or options.teacher_gradient:
        _along_kernel[(strips, chunks)](*shared, *sizes, **flags)
    results = result_like(student, options.student_gradient), result_like(teacher, options.teacher_gradient)
    _gradient_kernel[(strips, chunks)](*shared, *results, loss_parts, *sizes, **flags)
    return loss_parts.sum(), *results


def _gram_products(unit: Columns, options: Options) -> Products:
    """The products that gradients are made of; the first also without a gradient, as it holds the sum of squares."""
    left, right = unit.left, unit.right
    return (right @ right.T) @ left, (left @ left.T) @ right if options.teacher_gradient else None


def _matrix_products(unit: Columns, options: Options, strips: int) -> tuple[Tensor, Products]:
    """Parts of the loss after room for `strips`, and the same products, from a few rows of C at a time."""
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


@triton.jit(do_not_specialize=["first_row", "rows"])
def _correlation_loss_kernel(
    correlation,  # (rows, dim): rows `first_row` ... of C; its diagonal is zeroed in place
    loss_parts,  # one float32 a program: weight * sum of squares
    first_row,
    rows,
    dim,
    weight,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    c = load_tile(correlation, row, column, rows, dim).to(tl.float32)
    on_diagonal = (first_row + row)[:, None] == column[None, :]
    c = tl.where(on_diagonal, 0.0, c)
    offset = row.to(tl.int64)[:, None] * dim + column[None, :]
    zero = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), correlation.dtype.element_ty)
    tl.store(correlation + offset, zero, mask=on_diagonal & (row < rows)[:, None] & (column < dim)[None, :])
    tl.store(loss_parts + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), weight * tl.sum(c * c))


@triton.jit
def _sum_chunks(sums, index: tl.constexpr, column, dim, chunks, BLOCK_DIM: tl.constexpr):
    """Sum over the chunks of sums[:, index]."""
    total = tl.zeros((BLOCK_DIM,), tl.float32)
    for chunk in range(0, chunks):
        part = sums + (chunk * 4 + index) * dim + column
        total += tl.load(part, mask=column < dim, other=0.0)
    return total


@triton.jit
def _unit_gradients(
    left,
    right,
    student_product,
    teacher_product,
    slope,
    weight,
    row,
    column,
    batch,
    dim,
    RESIDUAL: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
):
    """Gradients by the unit columns of the student and of the teacher; 0 if not asked for."""
    student = tl.zeros_like(left)
    teacher = tl.zeros_like(left)
    if STUDENT or (TEACHER and RESIDUAL):
        product = load_tile(student_product, row, column, batch, dim).to(tl.float32)
        student = 2.0 * weight * product + right * slope[None, :]
    if TEACHER:
        product = load_tile(teacher_product, row, column, batch, dim).to(tl.float32)
        teacher = 2.0 * weight * product + left * slope[None, :]
        if RESIDUAL:  # the teacher also enters `left`, with a minus
            teacher = teacher - student
    return student, teacher


@triton.jit(do_not_specialize=COUNTS)
def _along_kernel(
    student,  # (batch, dim)
    teacher,  # (batch, dim)
    sample_weight,  # (batch,), read if HAS_WEIGHT
    columns,  # (4, dim) float32
    student_product,  # (batch, dim): right @ C.T
    teacher_product,  # (batch, dim): left @ C
    sums,  # (chunks, 4, dim) float32: [:, 1] squares of C in the Gram form, [:, 2:] gradients along the columns
    batch,
    dim,
    chunk_rows,
    chunks,
    weight,
    RESIDUAL: tl.constexpr,
    GRAM: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    chunk = tl.program_id(1)
    diagonal = _sum_chunks(sums, 0, column, dim, chunks, BLOCK_DIM)
    _deviation, slope = slope_of(diagonal, weight, RESIDUAL, GRAM)
    squares = tl.zeros((BLOCK_DIM,), tl.float32)
    student_along = tl.zeros((BLOCK_DIM,), tl.float32)
    teacher_along = tl.zeros((BLOCK_DIM,), tl.float32)
    for start in range(chunk * chunk_rows, tl.minimum((chunk + 1) * chunk_rows, batch), BLOCK_BATCH):
        row = start + tl.arange(0, BLOCK_BATCH)
        left, right, _share = load_units(
            student, teacher, sample_weight, columns, row, column, batch, dim, RESIDUAL, HAS_WEIGHT
        )
        if GRAM:
            squares += tl.sum(left * load_tile(student_product, row, column, batch, dim).to(tl.float32), 0)
        student_unit, teacher_unit = _unit_gradients(
            left,
            right,
            student_product,
            teacher_product,
            slope,
            weight,
            row,
            column,
            batch,
            dim,
            RESIDUAL,
            STUDENT,
            TEACHER,
        )
        unit = left + right if RESIDUAL else left
        student_along += tl.sum(unit * student_unit, 0)
        teacher_along += tl.sum(right * teacher_unit, 0)
    out = sums + chunk * 4 * dim + column
    tl.store(out + dim, squares, mask=column < dim)
    tl.store(out + 2 * dim, student_along, mask=column < dim)
    tl.store(out + 3 * dim, teacher_along, mask=column < dim)


@triton.jit(do_not_specialize=COUNTS)
def _gradient_kernel(
    student,  # (batch, dim)
    teacher,  # (batch, dim)
    sample_weight,  # (batch,), read if HAS_WEIGHT
    columns,  # (4, dim) float32
    student_product,  # (batch, dim)
    teacher_product,  # (batch, dim)
    sums,  # (chunks, 4, dim) float32
    student_gradient,  # (batch, dim) float32, written if STUDENT
    teacher_gradient,  # (batch, dim) float32, written if TEACHER
    loss_parts,  # one float32 a strip is written: the diagonal's part, and all the rest in the Gram form
    batch,
    dim,
    chunk_rows,
    chunks,
    weight,
    RESIDUAL: tl.constexpr,
    GRAM: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    chunk = tl.program_id(1)
    inside = column < dim
    diagonal = _sum_chunks(sums, 0, column, dim, chunks, BLOCK_DIM)
    deviation, slope = slope_of(diagonal, weight, RESIDUAL, GRAM)
    if chunk == 0:
        part = deviation * deviation
        if GRAM:
            part += weight * (_sum_chunks(sums, 1, column, dim, chunks, BLOCK_DIM) - diagonal * diagonal)
        tl.store(loss_parts + tl.program_id(0), tl.sum(tl.where(inside, part, 0.0)))
    if STUDENT or TEACHER:
        student_along = _sum_chunks(sums, 2, column, dim, chunks, BLOCK_DIM)
        teacher_along = _sum_chunks(sums, 3, column, dim, chunks, BLOCK_DIM)
        student_inverse = tl.load(columns + dim + column, mask=inside, other=0.0)
        teacher_inverse = tl.load(columns + 3 * dim + column, mask=inside, other=0.0)
        for start in range(chunk * chunk_rows, tl.minimum((chunk + 1) * chunk_rows, batch), BLOCK_BATCH):
            row = start + tl.arange(0, BLOCK_BATCH)
            left, right, share = load_units(
                student, teacher, sample_weight, columns, row, column, batch, dim, RESIDUAL, HAS_WEIGHT
            )
            student_unit, teacher_unit = _unit_gradients(
                left,
                right,
                student_product,
                teacher_product,
                slope,
                weight,
                row,
                column,
                batch,
                dim,
                RESIDUAL,
                STUDENT,
                TEACHER,
            )
            if STUDENT:
                unit = left + right if RESIDUAL else left
                result = through_norm(student_unit, unit, student_along, student_inverse, share)
                store_tile(student_gradient, result, row, column, batch, dim)
            if TEACHER:
                result = through_norm(teacher_unit, right, teacher_along, teacher_inverse, share)
                store_tile(teacher_gradient, result, row, column, batch, dim)


def configurations() -> Iterator[KernelConfig]:
    """Every kernel as it is launched, in the widest of its variants and in a narrow one."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        types = types_of(dtype)
        blocks = {"BLOCK_BATCH": BLOCK_BATCH, "BLOCK_DIM": BLOCK_DIM}
        for wide in (True, False):
            flags = {"RESIDUAL": wide, "STUDENT": True, "TEACHER": wide, "GRAM": wide, "HAS_WEIGHT": wide, **blocks}
            yield KernelConfig(_along_kernel, types, flags, exact=True)
            yield KernelConfig(_gradient_kernel, types, flags, exact=True)
        constants = {"BLOCK_ROWS": LOSS_ROWS, "BLOCK_COLUMNS": LOSS_COLUMNS}
        yield KernelConfig(_correlation_loss_kernel, types, constants, exact=True)
    yield from kernel_columns.configurations()
    yield from kernel_small.configurations()
