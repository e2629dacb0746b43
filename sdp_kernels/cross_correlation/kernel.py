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
from sdp_kernels.cross_correlation.forms import Options, chunk_rows
from sdp_kernels.cross_correlation.kernel_columns import BLOCK_BATCH, BLOCK_DIM, normalise, row_chunks
from sdp_kernels.cross_correlation.kernel_tiles import (
    load_tile,
    load_units,
    result_like,
    slope_of,
    store_tile,
    through_norm,
    types_of,
)
from sdp_kernels.dispatch import on_its_device
from sdp_kernels.spec import KernelConfig

LOSS_ROWS, LOSS_COLUMNS = 32, 128  # one tile of C


@on_its_device
def loss_and_gradients(
    student: Tensor, teacher: Tensor, sample_weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """As cpu.loss_and_gradients, in float32; inputs of one half-precision dtype are multiplied in it."""
    student, teacher = student.contiguous(), teacher.contiguous()
    if sample_weight is not None:
        sample_weight = sample_weight.float().contiguous()
    few_rows = options.form == "gram" and student.shape[0] <= kernel_small.ROWS
    compute = kernel_small.loss_and_gradients if few_rows else _loss_and_gradients
    return compute(student, teacher, sample_weight, options)


def _loss_and_gradients(
    student: Tensor, teacher: Tensor, sample_weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dim = student.shape
    gram = options.form == "gram"
    chunks, rows = row_chunks(batch, dim)
    strips = triton.cdiv(dim, BLOCK_DIM)
    grid = (strips, chunks)
    left, right, columns, sums = normalise(student, teacher, sample_weight, options)
    share = student if sample_weight is None else sample_weight

    student_product, teacher_product = sums, sums  # read only if they are made below
    need_student = options.student_gradient or (options.teacher_gradient and options.residual)
    if gram:
        loss_parts = sums.new_empty(strips)
        student_product = (right @ right.T) @ left  # also without a gradient: it holds the sum of squares
        if options.teacher_gradient:
            teacher_product = (left @ left.T) @ right
    else:
        height = chunk_rows(dim)
        tiles = [triton.cdiv(min(height, dim - start), LOSS_ROWS) for start in range(0, dim, height)]
        across = triton.cdiv(dim, LOSS_COLUMNS)
        loss_parts = sums.new_empty(strips + sum(tiles) * across)
        filled = strips
        if need_student:
            student_product = torch.empty_like(left)
        for start, down in zip(range(0, dim, height), tiles, strict=True):
            end = min(start + height, dim)
            correlation = left[:, start:end].T @ right
            _correlation_loss_kernel[(down, across)](
                correlation, loss_parts[filled:], start, end - start, dim, options.weight, LOSS_ROWS, LOSS_COLUMNS
            )
            filled += down * across
            if need_student:
                torch.mm(right, correlation.T, out=student_product[:, start:end])
            if options.teacher_gradient:
                part = left[:, start:end] @ correlation
                teacher_product = part if start == 0 else teacher_product.float().add_(part)

    flags = {
        "RESIDUAL": options.residual,
        "GRAM": gram,
        "STUDENT": options.student_gradient,
        "TEACHER": options.teacher_gradient,
        "HAS_WEIGHT": sample_weight is not None,
        "BLOCK_BATCH": BLOCK_BATCH,
        "BLOCK_DIM": BLOCK_DIM,
    }
    if gram or options.student_gradient or options.teacher_gradient:
        _along_kernel[grid](
            student,
            teacher,
            share,
            columns,
            student_product,
            teacher_product,
            sums,
            batch,
            dim,
            rows,
            chunks,
            options.weight,
            **flags,
        )
    student_result = result_like(student, options.student_gradient)
    teacher_result = result_like(teacher, options.teacher_gradient)
    _gradient_kernel[grid](
        student,
        teacher,
        share,
        columns,
        student_product,
        teacher_product,
        sums,
        student_result,
        teacher_result,
        loss_parts,
        batch,
        dim,
        rows,
        chunks,
        options.weight,
        **flags,
    )
    return loss_parts.sum(), student_result, teacher_result


@triton.jit
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


@triton.jit
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


@triton.jit
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
            yield KernelConfig(_along_kernel, types, flags)
            yield KernelConfig(_gradient_kernel, types, flags)
        constants = {"BLOCK_ROWS": LOSS_ROWS, "BLOCK_COLUMNS": LOSS_COLUMNS}
        yield KernelConfig(_correlation_loss_kernel, types, constants)
    yield from kernel_columns.configurations()
    yield from kernel_small.configurations()
