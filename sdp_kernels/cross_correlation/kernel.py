"""The loss and its gradients on a GPU: what surrounds the large products, and all of it for small batches.

Two ways, the same result:

* `_large`: the products go to cuBLAS. Columns are cut into strips and rows into chunks, so that any shape fills
  the device; what belongs to a whole column (its norm, its inner products) is summed over the chunks by the kernel
  that needs it next, in a fixed order.
* `_small`: up to 128 rows in the Gram form, where launches cost more than arithmetic: three launches in all. A
  program holds all rows of a strip; the Gram matrices are summed from one part a program.

Inputs of one half-precision dtype are multiplied in it, with float32 accumulation; all else is float32.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdp_kernels.cross_correlation.cpu import DEAD_EPSILONS
from sdp_kernels.cross_correlation.forms import chunk_rows
from sdp_kernels.spec import KernelConfig

DEAD_LIMIT = (DEAD_EPSILONS * torch.finfo(torch.float32).eps) ** 2
SMALL_BATCH = 128
BLOCK_BATCH, BLOCK_DIM = 32, 64  # one tile of a strip
PROGRAMS = 512  # enough to fill a large device
ROW_CHUNKS = 32  # at most: each costs its readers one more partial sum
GRAM_PARTS = 64  # at most: each is a batch x batch matrix to write and read
SMALL_BLOCK_DIM = 32
LOSS_ROWS, LOSS_COLUMNS = 32, 128  # one tile of C


def loss_and_gradients(
    student: Tensor,
    teacher: Tensor,
    sample_weight: Tensor | None,
    weight: float,
    center: bool,
    residual: bool,
    eps: float,
    form: str,
    student_gradient: bool,
    teacher_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As cpu.loss_and_gradients, in float32."""
    student, teacher = student.contiguous(), teacher.contiguous()
    if sample_weight is not None:
        sample_weight = sample_weight.float().contiguous()
    small = form == "gram" and student.shape[0] <= SMALL_BATCH
    compute = _small if small else _large
    return compute(
        student, teacher, sample_weight, weight, center, residual, eps, form, student_gradient, teacher_gradient
    )


def product_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The dtype of the large products: that of the inputs, if they agree and its range holds sums over `dim`."""
    if student.dtype != teacher.dtype or (student.dtype == torch.float16 and student.shape[1] > 2**15):
        return torch.float32
    return student.dtype


def row_chunks(batch: int, dim: int) -> tuple[int, int]:
    """Number of chunks that the rows are cut into, and rows a chunk."""
    wanted = min(triton.cdiv(PROGRAMS, triton.cdiv(dim, BLOCK_DIM)), ROW_CHUNKS)
    rows = triton.cdiv(triton.cdiv(batch, wanted), BLOCK_BATCH) * BLOCK_BATCH
    return triton.cdiv(batch, rows), rows


def _result(features: Tensor, wanted: bool) -> Tensor:
    return features.new_empty(features.shape if wanted else (0,), dtype=torch.float32)


def _large(
    student: Tensor,
    teacher: Tensor,
    sample_weight: Tensor | None,
    weight: float,
    center: bool,
    residual: bool,
    eps: float,
    form: str,
    student_gradient: bool,
    teacher_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dim = student.shape
    gram = form == "gram"
    chunks, rows = row_chunks(batch, dim)
    strips = triton.cdiv(dim, BLOCK_DIM)
    grid = (strips, chunks)
    left = torch.empty_like(student, dtype=product_dtype(student, teacher))
    right = torch.empty_like(left)
    statistics = student.new_empty(chunks, 5, dim, dtype=torch.float32)
    sums = torch.empty_like(statistics[:, :4])  # diagonal, squares, along the student's and the teacher's columns
    columns = sums.new_empty(4, dim)  # mean and inverse norm of the student's columns, of the teacher's
    share = student if sample_weight is None else sample_weight
    weighted = {"HAS_WEIGHT": sample_weight is not None, "BLOCK_BATCH": BLOCK_BATCH, "BLOCK_DIM": BLOCK_DIM}

    _statistics_kernel[grid](student, teacher, share, statistics, batch, dim, rows, CENTER=center, **weighted)
    _normalise_kernel[grid](
        student,
        teacher,
        share,
        statistics,
        left,
        right,
        columns,
        sums,
        batch,
        dim,
        rows,
        chunks,
        eps,
        DEAD_LIMIT,
        CENTER=center,
        RESIDUAL=residual,
        **weighted,
    )

    student_product, teacher_product = sums, sums  # read only if they are made below
    need_student = student_gradient or (teacher_gradient and residual)
    if gram:
        loss_parts = sums.new_empty(strips)
        student_product = (right @ right.T) @ left  # also without a gradient: it holds the sum of squares
        if teacher_gradient:
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
                correlation, loss_parts[filled:], start, end - start, dim, weight, LOSS_ROWS, LOSS_COLUMNS
            )
            filled += down * across
            if need_student:
                torch.mm(right, correlation.T, out=student_product[:, start:end])
            if teacher_gradient and start == 0:
                teacher_product = left[:, :end] @ correlation
            elif teacher_gradient:
                teacher_product.addmm_(left[:, start:end], correlation)

    flags = {"RESIDUAL": residual, "GRAM": gram, "STUDENT": student_gradient, "TEACHER": teacher_gradient}
    if gram or student_gradient or teacher_gradient:
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
            weight,
            **flags,
            **weighted,
        )
    student_result = _result(student, student_gradient)
    teacher_result = _result(teacher, teacher_gradient)
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
        weight,
        **flags,
        **weighted,
    )
    return loss_parts.sum(), student_result, teacher_result


def _small(
    student: Tensor,
    teacher: Tensor,
    sample_weight: Tensor | None,
    weight: float,
    center: bool,
    residual: bool,
    eps: float,
    form: str,
    student_gradient: bool,
    teacher_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, dim = student.shape
    block_batch = max(16, triton.next_power_of_2(batch))
    strips = triton.cdiv(dim, SMALL_BLOCK_DIM)
    parts = min(strips, GRAM_PARTS)
    grams = 1 + teacher_gradient
    columns = student.new_empty(5, dim, dtype=torch.float32)  # as in `_large`, and the diagonal
    gram_parts = columns.new_empty(parts, grams, block_batch, block_batch)
    gram = columns.new_empty(grams, block_batch, block_batch, dtype=product_dtype(student, teacher))
    loss_parts = columns.new_empty(strips)
    done = torch.empty(1, dtype=torch.int32, device=student.device)
    loss = columns.new_empty(())
    student_result = _result(student, student_gradient)
    teacher_result = _result(teacher, teacher_gradient)
    share = student if sample_weight is None else sample_weight
    shared = {
        "HAS_WEIGHT": sample_weight is not None,
        "RESIDUAL": residual,
        "TEACHER": teacher_gradient,
        "PRECISION": dot_precision(),
        "BLOCK_BATCH": block_batch,
        "BLOCK_DIM": SMALL_BLOCK_DIM,
        "num_warps": small_warps(block_batch),
    }
    _small_normalise_kernel[(parts,)](
        student,
        teacher,
        share,
        columns,
        gram_parts,
        gram,
        batch,
        dim,
        triton.cdiv(strips, parts),
        eps,
        DEAD_LIMIT,
        CENTER=center,
        **shared,
    )
    entries = grams * block_batch * block_batch
    _small_gram_kernel[(entries // 256,)](gram_parts, gram, done, parts, entries, BLOCK=256)
    _small_gradient_kernel[(strips,)](
        student,
        teacher,
        share,
        columns,
        gram,
        student_result,
        teacher_result,
        loss_parts,
        done,
        loss,
        batch,
        dim,
        weight,
        STUDENT=student_gradient,
        **shared,
    )
    return loss, student_result, teacher_result


def dot_precision() -> str:
    """What torch's precision switch says about float32 products."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def small_warps(block_batch: int) -> int:
    return 8 if block_batch == 128 else 4


@triton.jit
def _load_rows(pointer, weight, row, column, batch, dim, HAS_WEIGHT: tl.constexpr):
    """(rows, columns) features as float32 and their (rows, 1) weights; 0 outside.

    Rows without a positive weight are not read, so whatever they hold stays out.
    """
    inside = row < batch
    if HAS_WEIGHT:
        share = tl.load(weight + row, mask=inside, other=0.0)
        inside = inside & (share > 0)
        share = tl.where(inside, share, 0.0)
    else:
        share = tl.where(inside, 1.0, 0.0)
    mask = inside[:, None] & (column < dim)[None, :]
    offset = row.to(tl.int64)[:, None] * dim + column[None, :]
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32), share[:, None]


@triton.jit
def _unit_columns(features, share, mean, inverse):
    """Centred and scaled to unit norm; 0 where the weight is."""
    return (features - mean[None, :]) * tl.sqrt(share) * inverse[None, :]


@triton.jit
def _load_units(
    student, teacher, weight, columns, row, column, batch, dim, RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr
):
    """Left and right unit columns made again from the inputs, in float32, and the weights.

    What the products read is rounded to their dtype. Here that would cost digits where student and teacher
    agree, because going back through the norm leaves only the part in which they differ.
    """
    inside = column < dim
    s, share = _load_rows(student, weight, row, column, batch, dim, HAS_WEIGHT)
    t, share = _load_rows(teacher, weight, row, column, batch, dim, HAS_WEIGHT)
    mean = tl.load(columns + column, mask=inside, other=0.0)
    inverse = tl.load(columns + dim + column, mask=inside, other=0.0)
    s = _unit_columns(s, share, mean, inverse)
    mean = tl.load(columns + 2 * dim + column, mask=inside, other=0.0)
    inverse = tl.load(columns + 3 * dim + column, mask=inside, other=0.0)
    t = _unit_columns(t, share, mean, inverse)
    if RESIDUAL:
        s = s - t
    return s, t, share


@triton.jit
def _load_tile(pointer, row, column, batch, dim):
    """(rows, columns) entries in their dtype; 0 outside."""
    mask = (row < batch)[:, None] & (column < dim)[None, :]
    return tl.load(pointer + row.to(tl.int64)[:, None] * dim + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store_tile(pointer, value, row, column, batch, dim):
    mask = (row < batch)[:, None] & (column < dim)[None, :]
    offset = row.to(tl.int64)[:, None] * dim + column[None, :]
    tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _inverse_norm(squares, mean, total, eps, dead_limit):
    """1 / norm of a centred column, 0 for a dead one; total * mean^2 is what centring took from the raw squares."""
    dead = squares <= dead_limit * (squares + total * mean * mean)
    return tl.where(dead, 0.0, 1.0 / tl.sqrt(tl.where(dead, 1.0, squares + total * eps)))


@triton.jit
def _slope(diagonal, weight, RESIDUAL: tl.constexpr, GRAM: tl.constexpr):
    """Deviation of the diagonal, and the derivative by it of what the products do not cover already."""
    deviation = diagonal if RESIDUAL else diagonal - 1.0
    slope = 2.0 * deviation
    if GRAM:  # the products hold the diagonal too
        slope = slope - 2.0 * weight * diagonal
    return deviation, slope


@triton.jit
def _merge(count, mean, squares, other_count, other_mean, other_squares):
    """Mean and sum of squares about it of two sets together, without cancellation (Chan et al. 1979)."""
    total = count + other_count
    part = other_count / tl.maximum(total, 1e-37)
    difference = other_mean - mean
    return total, mean + difference * part, squares + other_squares + difference * difference * count * part


@triton.jit
def _tile_statistics(features, share, CENTER: tl.constexpr):
    """Mean and weighted sum of squares about it, of the columns of one tile."""
    total = tl.sum(share)
    mean = tl.sum(features * share, 0) / tl.maximum(total, 1e-37) * (1.0 if CENTER else 0.0)
    centred = features - mean[None, :]
    return total, mean, tl.sum(centred * centred * share, 0)


@triton.jit
def _statistics_kernel(
    student,  # (batch, dim)
    teacher,  # (batch, dim)
    weight,  # (batch,), read if HAS_WEIGHT
    statistics,  # (chunks, 5, dim) float32: weight; mean and squares about it of the student, of the teacher
    batch,
    dim,
    chunk_rows,
    CENTER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    chunk = tl.program_id(1)
    count = tl.zeros((BLOCK_DIM,), tl.float32)
    student_mean = tl.zeros((BLOCK_DIM,), tl.float32)
    student_squares = tl.zeros((BLOCK_DIM,), tl.float32)
    teacher_mean = tl.zeros((BLOCK_DIM,), tl.float32)
    teacher_squares = tl.zeros((BLOCK_DIM,), tl.float32)
    for start in range(chunk * chunk_rows, tl.minimum((chunk + 1) * chunk_rows, batch), BLOCK_BATCH):
        row = start + tl.arange(0, BLOCK_BATCH)
        s, share = _load_rows(student, weight, row, column, batch, dim, HAS_WEIGHT)
        t, share = _load_rows(teacher, weight, row, column, batch, dim, HAS_WEIGHT)
        total, mean, squares = _tile_statistics(s, share, CENTER)
        _, student_mean, student_squares = _merge(count, student_mean, student_squares, total, mean, squares)
        total, mean, squares = _tile_statistics(t, share, CENTER)
        count, teacher_mean, teacher_squares = _merge(count, teacher_mean, teacher_squares, total, mean, squares)
    out = statistics + chunk * 5 * dim + column
    inside = column < dim
    tl.store(out, count, mask=inside)
    tl.store(out + dim, student_mean, mask=inside)
    tl.store(out + 2 * dim, student_squares, mask=inside)
    tl.store(out + 3 * dim, teacher_mean, mask=inside)
    tl.store(out + 4 * dim, teacher_squares, mask=inside)


@triton.jit
def _normalise_kernel(
    student,  # (batch, dim)
    teacher,  # (batch, dim)
    weight,  # (batch,), read if HAS_WEIGHT
    statistics,  # (chunks, 5, dim) float32
    left,  # (batch, dim): unit student columns, less the teacher's if RESIDUAL
    right,  # (batch, dim): unit teacher columns
    columns,  # (4, dim) float32: mean and inverse norm of the student's columns, of the teacher's
    sums,  # (chunks, 4, dim) float32: [:, 0] becomes the diagonal
    batch,
    dim,
    chunk_rows,
    chunks,
    eps,
    dead_limit,
    CENTER: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    chunk = tl.program_id(1)
    inside = column < dim
    count = tl.zeros((BLOCK_DIM,), tl.float32)
    student_mean = tl.zeros((BLOCK_DIM,), tl.float32)
    student_squares = tl.zeros((BLOCK_DIM,), tl.float32)
    teacher_mean = tl.zeros((BLOCK_DIM,), tl.float32)
    teacher_squares = tl.zeros((BLOCK_DIM,), tl.float32)
    for other in range(0, chunks):
        part = statistics + other * 5 * dim + column
        total = tl.load(part, mask=inside, other=0.0)
        mean = tl.load(part + dim, mask=inside, other=0.0)
        squares = tl.load(part + 2 * dim, mask=inside, other=0.0)
        _, student_mean, student_squares = _merge(count, student_mean, student_squares, total, mean, squares)
        mean = tl.load(part + 3 * dim, mask=inside, other=0.0)
        squares = tl.load(part + 4 * dim, mask=inside, other=0.0)
        count, teacher_mean, teacher_squares = _merge(count, teacher_mean, teacher_squares, total, mean, squares)
    student_inverse = _inverse_norm(student_squares, student_mean, count, eps, dead_limit)
    teacher_inverse = _inverse_norm(teacher_squares, teacher_mean, count, eps, dead_limit)
    if chunk == 0:
        tl.store(columns + column, student_mean, mask=inside)
        tl.store(columns + dim + column, student_inverse, mask=inside)
        tl.store(columns + 2 * dim + column, teacher_mean, mask=inside)
        tl.store(columns + 3 * dim + column, teacher_inverse, mask=inside)

    diagonal = tl.zeros((BLOCK_DIM,), tl.float32)
    for start in range(chunk * chunk_rows, tl.minimum((chunk + 1) * chunk_rows, batch), BLOCK_BATCH):
        row = start + tl.arange(0, BLOCK_BATCH)
        s, share = _load_rows(student, weight, row, column, batch, dim, HAS_WEIGHT)
        t, share = _load_rows(teacher, weight, row, column, batch, dim, HAS_WEIGHT)
        s = _unit_columns(s, share, student_mean, student_inverse)
        t = _unit_columns(t, share, teacher_mean, teacher_inverse)
        if RESIDUAL:
            s = s - t
        diagonal += tl.sum(s * t, 0)
        _store_tile(left, s, row, column, batch, dim)
        _store_tile(right, t, row, column, batch, dim)
    tl.store(sums + chunk * 4 * dim + column, diagonal, mask=inside)


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
    c = _load_tile(correlation, row, column, rows, dim).to(tl.float32)
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
        product = _load_tile(student_product, row, column, batch, dim).to(tl.float32)
        student = 2.0 * weight * product + right * slope[None, :]
    if TEACHER:
        product = _load_tile(teacher_product, row, column, batch, dim).to(tl.float32)
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
    _, slope = _slope(diagonal, weight, RESIDUAL, GRAM)
    squares = tl.zeros((BLOCK_DIM,), tl.float32)
    student_along = tl.zeros((BLOCK_DIM,), tl.float32)
    teacher_along = tl.zeros((BLOCK_DIM,), tl.float32)
    for start in range(chunk * chunk_rows, tl.minimum((chunk + 1) * chunk_rows, batch), BLOCK_BATCH):
        row = start + tl.arange(0, BLOCK_BATCH)
        left, right, _ = _load_units(
            student, teacher, sample_weight, columns, row, column, batch, dim, RESIDUAL, HAS_WEIGHT
        )
        if GRAM:
            squares += tl.sum(left * _load_tile(student_product, row, column, batch, dim).to(tl.float32), 0)
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
    deviation, slope = _slope(diagonal, weight, RESIDUAL, GRAM)
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
            left, right, share = _load_units(
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
                result = _through_norm(student_unit, unit, student_along, student_inverse, share)
                _store_tile(student_gradient, result, row, column, batch, dim)
            if TEACHER:
                result = _through_norm(teacher_unit, right, teacher_along, teacher_inverse, share)
                _store_tile(teacher_gradient, result, row, column, batch, dim)


@triton.jit
def _through_norm(gradient, unit, along, inverse, share):
    """Gradient by the features from that by their unit columns.

    Centring needs nothing more: the gradient is a combination of centred columns, whose weighted sum is zero.
    """
    return (gradient - unit * along[None, :]) * inverse[None, :] * tl.sqrt(share)


@triton.jit
def _small_normalise_kernel(
    student,  # (batch, dim)
    teacher,  # (batch, dim)
    weight,  # (batch,), read if HAS_WEIGHT
    columns,  # (5, dim) float32: mean and inverse norm of student, of teacher; diagonal
    gram_parts,  # (parts, 1 or 2, BLOCK_BATCH, BLOCK_BATCH) float32: right @ right.T and, if TEACHER, left @ left.T
    gram,  # its dtype is that of the products
    batch,
    dim,
    strips,  # a program
    eps,
    dead_limit,
    CENTER: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TEACHER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    part = tl.program_id(0)
    row = tl.arange(0, BLOCK_BATCH)
    right_gram = tl.zeros((BLOCK_BATCH, BLOCK_BATCH), tl.float32)
    left_gram = tl.zeros((BLOCK_BATCH, BLOCK_BATCH), tl.float32)
    for strip in range(part * strips, (part + 1) * strips):
        column = strip * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
        inside = column < dim
        s, share = _load_rows(student, weight, row, column, batch, dim, HAS_WEIGHT)
        t, share = _load_rows(teacher, weight, row, column, batch, dim, HAS_WEIGHT)
        total, student_mean, student_squares = _tile_statistics(s, share, CENTER)
        total, teacher_mean, teacher_squares = _tile_statistics(t, share, CENTER)
        student_inverse = _inverse_norm(student_squares, student_mean, total, eps, dead_limit)
        teacher_inverse = _inverse_norm(teacher_squares, teacher_mean, total, eps, dead_limit)
        s = _unit_columns(s, share, student_mean, student_inverse)
        t = _unit_columns(t, share, teacher_mean, teacher_inverse)
        if RESIDUAL:
            s = s - t
        tl.store(columns + column, student_mean, mask=inside)
        tl.store(columns + dim + column, student_inverse, mask=inside)
        tl.store(columns + 2 * dim + column, teacher_mean, mask=inside)
        tl.store(columns + 3 * dim + column, teacher_inverse, mask=inside)
        tl.store(columns + 4 * dim + column, tl.sum(s * t, 0), mask=inside)
        t = t.to(gram.dtype.element_ty)
        right_gram = tl.dot(t, tl.trans(t), right_gram, input_precision=PRECISION)
        if TEACHER:
            s = s.to(gram.dtype.element_ty)
            left_gram = tl.dot(s, tl.trans(s), left_gram, input_precision=PRECISION)
    entry = row[:, None] * BLOCK_BATCH + row[None, :]
    if TEACHER:
        out = gram_parts + part * 2 * BLOCK_BATCH * BLOCK_BATCH
        tl.store(out + BLOCK_BATCH * BLOCK_BATCH + entry, left_gram)
    else:
        out = gram_parts + part * BLOCK_BATCH * BLOCK_BATCH
    tl.store(out + entry, right_gram)


@triton.jit
def _small_gram_kernel(
    gram_parts,  # (parts, entries) float32
    gram,  # (entries,)
    done,  # one int32, set to 0 for the next kernel
    parts,
    entries,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, parts):
        total += tl.load(gram_parts + part * entries + entry)
    tl.store(gram + entry, total.to(gram.dtype.element_ty))
    if tl.program_id(0) == 0:
        tl.store(done, 0)


@triton.jit
def _small_gradient_kernel(
    student,  # (batch, dim)
    teacher,  # (batch, dim)
    sample_weight,  # (batch,), read if HAS_WEIGHT
    columns,  # (5, dim) float32
    gram,  # (1 or 2, BLOCK_BATCH, BLOCK_BATCH)
    student_gradient,  # (batch, dim) float32, written if STUDENT
    teacher_gradient,  # (batch, dim) float32, written if TEACHER
    loss_parts,  # one float32 a program
    done,  # one int32: programs that have written their part
    loss,  # one float32, written by the program that finds all others done
    batch,
    dim,
    weight,
    RESIDUAL: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.arange(0, BLOCK_BATCH)
    column = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = column < dim
    diagonal = tl.load(columns + 4 * dim + column, mask=inside, other=0.0)
    deviation, slope = _slope(diagonal, weight, RESIDUAL, True)
    left, right, share = _load_units(
        student, teacher, sample_weight, columns, row, column, batch, dim, RESIDUAL, HAS_WEIGHT
    )
    entry = row[:, None] * BLOCK_BATCH + row[None, :]
    factor = tl.load(gram + entry)
    product = tl.dot(factor, left.to(factor.dtype), input_precision=PRECISION)
    part = deviation * deviation + weight * (tl.sum(left * product, 0) - diagonal * diagonal)
    part = tl.sum(tl.where(inside, part, 0.0))

    student_unit = 2.0 * weight * product + right * slope[None, :]
    if TEACHER:
        factor = tl.load(gram + BLOCK_BATCH * BLOCK_BATCH + entry)
        product = tl.dot(factor, right.to(factor.dtype), input_precision=PRECISION)
        teacher_unit = 2.0 * weight * product + left * slope[None, :]
        if RESIDUAL:  # the teacher also enters `left`, with a minus
            teacher_unit = teacher_unit - student_unit
        inverse = tl.load(columns + 3 * dim + column, mask=inside, other=0.0)
        result = _through_norm(teacher_unit, right, tl.sum(right * teacher_unit, 0), inverse, share)
        _store_tile(teacher_gradient, result, row, column, batch, dim)
    if STUDENT:
        unit = left + right if RESIDUAL else left
        inverse = tl.load(columns + dim + column, mask=inside, other=0.0)
        result = _through_norm(student_unit, unit, tl.sum(unit * student_unit, 0), inverse, share)
        _store_tile(student_gradient, result, row, column, batch, dim)

    tl.store(loss_parts + tl.program_id(0), part)
    tl.debug_barrier()  # all threads have stored before one of them says so
    programs = tl.num_programs(0)
    if tl.atomic_add(done, 1, sem="acq_rel") == programs - 1:
        index = tl.arange(0, 256)
        total = tl.zeros((256,), tl.float32)
        for start in range(0, programs, 256):  # in the same order whichever program is the last
            total += tl.load(loss_parts + start + index, mask=start + index < programs, other=0.0, volatile=True)
        tl.store(loss, tl.sum(total))


def configurations() -> Iterator[KernelConfig]:
    """Every kernel as it is launched, in the widest of its variants and in one narrow one."""
    integers = ("batch", "dim", "rows", "chunk_rows", "chunks", "first_row", "strips", "parts", "entries")
    for features, product in (("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16")):
        types = dict.fromkeys(integers, "i32") | dict.fromkeys(("eps", "dead_limit"), "fp32")
        types |= dict.fromkeys(("student", "teacher"), f"*{features}")
        halves = ("left", "right", "student_product", "teacher_product", "correlation", "gram")
        types |= dict.fromkeys(halves, f"*{product}")
        floats = ("statistics", "sums", "columns", "gram_parts", "loss_parts", "loss")
        types |= dict.fromkeys((*floats, "student_gradient", "teacher_gradient", "sample_weight"), "*fp32")
        types["done"] = "*i32"
        for wide in (True, False):
            blocks = {"BLOCK_BATCH": BLOCK_BATCH, "BLOCK_DIM": BLOCK_DIM}
            columns = {"HAS_WEIGHT": wide, "CENTER": True, **blocks}
            pointer, scalar = types | {"weight": "*fp32"}, types | {"weight": "fp32"}
            flags = {"RESIDUAL": wide, "STUDENT": True, "TEACHER": wide}
            yield KernelConfig(_statistics_kernel, pointer, columns)
            yield KernelConfig(_normalise_kernel, pointer, {"RESIDUAL": wide, **columns})
            yield KernelConfig(_along_kernel, scalar, {"GRAM": wide, "HAS_WEIGHT": wide, **flags, **blocks})
            yield KernelConfig(_gradient_kernel, scalar, {"GRAM": wide, "HAS_WEIGHT": wide, **flags, **blocks})
            for block_batch in (16, 32, 64, 128):
                for precision in ("ieee", "tf32") if features == "fp32" else ("ieee",):
                    small = {"RESIDUAL": wide, "TEACHER": wide, "HAS_WEIGHT": wide, "PRECISION": precision}
                    small |= {"BLOCK_BATCH": block_batch, "BLOCK_DIM": SMALL_BLOCK_DIM}
                    matrix = {"num_warps": small_warps(block_batch)}
                    matrix["tensor_cores"] = features != "fp32" or precision == "tf32"
                    yield KernelConfig(_small_normalise_kernel, pointer, {"CENTER": True, **small}, **matrix)
                    yield KernelConfig(_small_gradient_kernel, scalar, {"STUDENT": True, **small}, **matrix)
        constants = {"BLOCK_ROWS": LOSS_ROWS, "BLOCK_COLUMNS": LOSS_COLUMNS}
        yield KernelConfig(_correlation_loss_kernel, types | {"weight": "fp32"}, constants)
        yield KernelConfig(_small_gram_kernel, types, {"BLOCK": 256})
