"""Centre and normalise columns, whatever their length: strips of columns, cut into chunks of rows."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdp_kernels.cross_correlation.forms import Options
from sdp_kernels.cross_correlation.kernel_tiles import (
    COUNTS,
    DEAD_LIMIT,
    inverse_norm,
    product_dtype,
    types_of,
    unit_columns,
)
from sdp_kernels.spec import KernelConfig
from sdp_kernels.tiles.kernel_columns import load_rows, store_tile, tile_statistics

BLOCK_BATCH, BLOCK_DIM = 32, 64  # one tile of a strip
PROGRAMS = 512  # enough to fill a large device
ROW_CHUNKS = 32  # at most: each costs its readers one more partial sum


class Columns(NamedTuple):
    """Unit columns, and what later kernels need to make them again."""

    left: Tensor  # (batch, dim): the student's, less the teacher's if the teacher is the target
    right: Tensor  # (batch, dim): the teacher's
    columns: Tensor  # (4, dim) float32: mean and inverse norm of the student's columns, of the teacher's
    sums: Tensor  # (chunks, 4, dim) float32: the diagonal's parts; room for three more sums over the rows


def row_chunks(batch: int, dim: int) -> tuple[int, int]:
    """Number of chunks that the rows are cut into, and rows a chunk."""
    wanted = min(triton.cdiv(PROGRAMS, triton.cdiv(dim, BLOCK_DIM)), ROW_CHUNKS)
    rows = triton.cdiv(triton.cdiv(batch, wanted), BLOCK_BATCH) * BLOCK_BATCH
    return triton.cdiv(batch, rows), rows


def normalise(
    student: Tensor, teacher: Tensor, sample_weight: Tensor | None, options: Options, statistics: Tensor | None = None
) -> Columns:
    """Centre and scale the columns of both inputs to unit norm, and take their inner products.

    `statistics` is that of `kernel.loss_and_gradients`; if it is None, one more kernel reads the columns for it.
    """
    batch, dim = student.shape
    chunks, rows = row_chunks(batch, dim)
    grid = (triton.cdiv(dim, BLOCK_DIM), chunks)
    left = torch.empty_like(student, dtype=product_dtype(student, teacher, options.residual))
    right = torch.empty_like(left)
    sums = student.new_empty(chunks, 4, dim, dtype=torch.float32)
    columns = sums.new_empty(4, dim)
    share = student if sample_weight is None else sample_weight
    flags = {"CENTER": options.center, "HAS_WEIGHT": sample_weight is not None}
    blocks = {"BLOCK_BATCH": BLOCK_BATCH, "BLOCK_DIM": BLOCK_DIM}
    if statistics is None:
        statistics = sums.new_empty(chunks, 5, dim)
        _statistics_kernel[grid](student, teacher, share, statistics, batch, dim, rows, **flags, **blocks)
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
        len(statistics),
        options.eps,
        DEAD_LIMIT,
        RESIDUAL=options.residual,
        **flags,
        **blocks,
    )
    return Columns(left, right, columns, sums)


@triton.jit
def _merge(count, mean, squares, other_count, other_mean, other_squares):
    """Mean and sum of squares about it of two sets together, without cancellation (Chan et al. 1979)."""
    total = count + other_count
    part = tl.div_rn(other_count, tl.maximum(total, 1e-37))
    difference = other_mean - mean
    return total, mean + difference * part, squares + other_squares + difference * difference * count * part


@triton.jit(do_not_specialize=COUNTS)
def _statistics_kernel(
    student,  # (batch, dim)
    teacher,  # (batch, dim)
    sample_weight,  # (batch,), read if HAS_WEIGHT
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
        s, share = load_rows(student, sample_weight, row, column, batch, dim, HAS_WEIGHT)
        t, share = load_rows(teacher, sample_weight, row, column, batch, dim, HAS_WEIGHT)
        total, mean, squares = tile_statistics(s, share, CENTER)
        _, student_mean, student_squares = _merge(count, student_mean, student_squares, total, mean, squares)
        total, mean, squares = tile_statistics(t, share, CENTER)
        count, teacher_mean, teacher_squares = _merge(count, teacher_mean, teacher_squares, total, mean, squares)
    out = statistics + chunk * 5 * dim + column
    inside = column < dim
    tl.store(out, count, mask=inside)
    tl.store(out + dim, student_mean, mask=inside)
    tl.store(out + 2 * dim, student_squares, mask=inside)
    tl.store(out + 3 * dim, teacher_mean, mask=inside)
    tl.store(out + 4 * dim, teacher_squares, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _normalise_kernel(
    student,  # (batch, dim)
    teacher,  # (batch, dim)
    sample_weight,  # (batch,), read if HAS_WEIGHT
    statistics,  # (parts, 5, dim) float32
    left,  # (batch, dim): unit student columns, less the teacher's if RESIDUAL
    right,  # (batch, dim): unit teacher columns
    columns,  # (4, dim) float32: mean and inverse norm of the student's columns, of the teacher's
    sums,  # (chunks, 4, dim) float32: [:, 0] becomes the diagonal
    batch,
    dim,
    chunk_rows,
    parts,
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
    for index in range(0, parts):
        part = statistics + index * 5 * dim + column
        total = tl.load(part, mask=inside, other=0.0)
        mean = tl.load(part + dim, mask=inside, other=0.0)
        squares = tl.load(part + 2 * dim, mask=inside, other=0.0)
        _, student_mean, student_squares = _merge(count, student_mean, student_squares, total, mean, squares)
        mean = tl.load(part + 3 * dim, mask=inside, other=0.0)
        squares = tl.load(part + 4 * dim, mask=inside, other=0.0)
        count, teacher_mean, teacher_squares = _merge(count, teacher_mean, teacher_squares, total, mean, squares)
    student_inverse = inverse_norm(student_squares, student_mean, count, eps, dead_limit)
    teacher_inverse = inverse_norm(teacher_squares, teacher_mean, count, eps, dead_limit)
    if chunk == 0:
        tl.store(columns + column, student_mean, mask=inside)
        tl.store(columns + dim + column, student_inverse, mask=inside)
        tl.store(columns + 2 * dim + column, teacher_mean, mask=inside)
        tl.store(columns + 3 * dim + column, teacher_inverse, mask=inside)

    diagonal = tl.zeros((BLOCK_DIM,), tl.float32)
    for start in range(chunk * chunk_rows, tl.minimum((chunk + 1) * chunk_rows, batch), BLOCK_BATCH):
        row = start + tl.arange(0, BLOCK_BATCH)
        s, share = load_rows(student, sample_weight, row, column, batch, dim, HAS_WEIGHT)
        t, share = load_rows(teacher, sample_weight, row, column, batch, dim, HAS_WEIGHT)
        s = unit_columns(s, share, student_mean, student_inverse)
        t = unit_columns(t, share, teacher_mean, teacher_inverse)
        if RESIDUAL:
            s = s - t
        diagonal += tl.sum(s * t, 0)
        store_tile(left, s, row, column, batch, dim)
        store_tile(right, t, row, column, batch, dim)
    tl.store(sums + chunk * 4 * dim + column, diagonal, mask=inside)


def configurations() -> Iterator[KernelConfig]:
    """Every kernel as it is launched, in the widest of its variants and in a narrow one."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for wide in (True, False):
            columns = {"HAS_WEIGHT": wide, "CENTER": True, "BLOCK_BATCH": BLOCK_BATCH, "BLOCK_DIM": BLOCK_DIM}
            yield KernelConfig(_statistics_kernel, types_of(dtype), columns, exact=True)
            yield KernelConfig(_normalise_kernel, types_of(dtype), {"RESIDUAL": wide, **columns}, exact=True)
