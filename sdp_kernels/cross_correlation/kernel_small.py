"""Few rows in the Gram form, where launches cost more than arithmetic: three of them in all.

A program holds all rows of a strip of columns, and serves one side: 0 the student's gradient, which needs the Gram
matrix right @ right.T, and the loss; 1 the teacher's gradient, which needs left @ left.T. The Gram matrices are
summed from one part a program.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdp_kernels.cross_correlation.forms import Options
from sdp_kernels.cross_correlation.kernel_tiles import (
    COUNTS,
    DEAD_LIMIT,
    inverse_norm,
    load_units,
    product_dtype,
    result_like,
    slope_of,
    through_norm,
    types_of,
    unit_columns,
)
from sdp_kernels.dispatch import float32_precision
from sdp_kernels.spec import KernelConfig
from sdp_kernels.tiles.kernel_columns import load_rows, store_tile, tile_statistics

BLOCK_DIM = 32
BLOCK_INNER = 16  # rows of a product taken at a time
GRAM_PARTS = 64  # at most: each is a batch x batch matrix to write and read
GRAM_BLOCK = 256


def loss_and_gradients(
    student: Tensor, teacher: Tensor, sample_weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """As kernel.loss_and_gradients, for contiguous input of at most `FEW_ROWS` rows."""
    batch, dim = student.shape
    block_batch = max(16, triton.next_power_of_2(batch))
    strips = triton.cdiv(dim, BLOCK_DIM)
    parts = min(strips, GRAM_PARTS)
    sides = 1 + options.teacher_gradient
    columns = student.new_empty(5, dim, dtype=torch.float32)  # means, inverse norms, diagonal
    gram_parts = columns.new_empty(parts, sides, block_batch, block_batch)
    gram = columns.new_empty(sides, block_batch, block_batch, dtype=product_dtype(student, teacher, options.residual))
    loss_parts = columns.new_empty(strips)
    done = torch.empty(1, dtype=torch.int32, device=student.device)
    loss = columns.new_empty(())
    student_result = result_like(student, options.student_gradient)
    teacher_result = result_like(teacher, options.teacher_gradient)
    share = student if sample_weight is None else sample_weight
    shared = {
        "HAS_WEIGHT": sample_weight is not None,
        "RESIDUAL": options.residual,
        "PRECISION": float32_precision(),
        "BLOCK_BATCH": block_batch,
        "BLOCK_DIM": BLOCK_DIM,
        "num_warps": warps(block_batch),
    }
    _normalise_kernel[(parts, sides)](
        student,
        teacher,
        share,
        columns,
        gram_parts,
        gram,
        loss_parts,
        done,
        batch,
        dim,
        triton.cdiv(strips, parts),
        options.eps,
        DEAD_LIMIT,
        CENTER=options.center,
        **shared,
    )
    entries = sides * block_batch * block_batch
    _gram_kernel[(entries // GRAM_BLOCK,)](gram_parts, gram, parts, entries, BLOCK=GRAM_BLOCK)
    _gradient_kernel[(strips, sides)](
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
        options.weight,
        STUDENT=options.student_gradient,
        TEACHER=options.teacher_gradient,
        BLOCK_INNER=BLOCK_INNER,
        **shared,
    )
    return loss, student_result, teacher_result


def warps(block_batch: int) -> int:
    """Enough threads that a Gram matrix fits their registers."""
    return 8 if block_batch == 128 else 4


@triton.jit(do_not_specialize=COUNTS)
def _normalise_kernel(
    student,  # (batch, dim)
    teacher,  # (batch, dim)
    sample_weight,  # (batch,), read if HAS_WEIGHT
    columns,  # (5, dim) float32: mean and inverse norm of student, of teacher; diagonal
    gram_parts,  # (parts, sides, BLOCK_BATCH, BLOCK_BATCH) float32
    gram,  # its dtype is that of the products
    loss_parts,  # zeroed for `_gradient_kernel`
    done,  # zeroed too
    batch,
    dim,
    strips,  # a program
    eps,
    dead_limit,
    CENTER: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    part, side = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, BLOCK_BATCH)
    product = tl.zeros((BLOCK_BATCH, BLOCK_BATCH), tl.float32)
    for strip in range(part * strips, (part + 1) * strips):
        column = strip * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
        inside = (column < dim) & (side == 0)
        s, share = load_rows(student, sample_weight, row, column, batch, dim, HAS_WEIGHT)
        t, share = load_rows(teacher, sample_weight, row, column, batch, dim, HAS_WEIGHT)
        total, student_mean, student_squares = tile_statistics(s, share, CENTER)
        total, teacher_mean, teacher_squares = tile_statistics(t, share, CENTER)
        student_inverse = inverse_norm(student_squares, student_mean, total, eps, dead_limit)
        teacher_inverse = inverse_norm(teacher_squares, teacher_mean, total, eps, dead_limit)
        s = unit_columns(s, share, student_mean, student_inverse)
        t = unit_columns(t, share, teacher_mean, teacher_inverse)
        if RESIDUAL:
            s = s - t
        tl.store(columns + column, student_mean, mask=inside)
        tl.store(columns + dim + column, student_inverse, mask=inside)
        tl.store(columns + 2 * dim + column, teacher_mean, mask=inside)
        tl.store(columns + 3 * dim + column, teacher_inverse, mask=inside)
        tl.store(columns + 4 * dim + column, tl.sum(s * t, 0), mask=inside)
        tl.store(loss_parts + strip, 0.0, mask=(strip * BLOCK_DIM < dim) & (side == 0))
        unit = tl.where(side == 0, t, s).to(gram.dtype.element_ty)
        product = tl.dot(unit, tl.trans(unit), product, input_precision=PRECISION)
    tl.store(done, 0, mask=(part == 0) & (side == 0))
    out = gram_parts + (part * tl.num_programs(1) + side) * BLOCK_BATCH * BLOCK_BATCH
    tl.store(out + row[:, None] * BLOCK_BATCH + row[None, :], product)


@triton.jit(do_not_specialize=COUNTS)
def _gram_kernel(
    gram_parts,  # (parts, entries) float32
    gram,  # (entries,)
    parts,
    entries,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, parts):
        total += tl.load(gram_parts + part * entries + entry)
    tl.store(gram + entry, total.to(gram.dtype.element_ty))


@triton.jit(do_not_specialize=COUNTS)
def _gradient_kernel(
    student,  # (batch, dim)
    teacher,  # (batch, dim)
    sample_weight,  # (batch,), read if HAS_WEIGHT
    columns,  # (5, dim) float32
    gram,  # (sides, BLOCK_BATCH, BLOCK_BATCH)
    student_gradient,  # (batch, dim) float32, written if STUDENT
    teacher_gradient,  # (batch, dim) float32, written if TEACHER
    loss_parts,  # one float32 a strip
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
    BLOCK_INNER: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    side = tl.program_id(1)
    row = tl.arange(0, BLOCK_BATCH)
    column = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = column < dim
    diagonal = tl.load(columns + 4 * dim + column, mask=inside, other=0.0)
    deviation, slope = slope_of(diagonal, weight, RESIDUAL, True)
    product = tl.zeros((BLOCK_BATCH, BLOCK_DIM), tl.float32)
    for start in range(0, BLOCK_BATCH, BLOCK_INNER):
        inner = start + tl.arange(0, BLOCK_INNER)
        entry = row[:, None] * BLOCK_BATCH + inner[None, :]
        left, right, share = load_units(
            student, teacher, sample_weight, columns, inner, column, batch, dim, RESIDUAL, HAS_WEIGHT
        )
        factor = tl.load(gram + side * BLOCK_BATCH * BLOCK_BATCH + entry)
        product = tl.dot(factor, tl.where(side == 0, left, right).to(factor.dtype), product, input_precision=PRECISION)
        if RESIDUAL and TEACHER:  # noqa: SIM102 -- known when compiled, unlike the side
            if side == 1:  # the teacher also enters `left`, with a minus
                factor = tl.load(gram + entry)
                product = tl.dot(factor, (-left).to(factor.dtype), product, input_precision=PRECISION)
    left, right, share = load_units(
        student, teacher, sample_weight, columns, row, column, batch, dim, RESIDUAL, HAS_WEIGHT
    )
    unit = tl.where(side == 0, left + right if RESIDUAL else left, right)
    other = tl.where(side == 0, right, left - right if RESIDUAL else left)
    inverse = tl.load(columns + (1 + 2 * side) * dim + column, mask=inside, other=0.0)
    gradient = 2.0 * weight * product + other * slope[None, :]
    result = through_norm(gradient, unit, tl.sum(unit * gradient, 0), inverse, share)
    if side == 1:
        store_tile(teacher_gradient, result, row, column, batch, dim)
    else:
        if STUDENT:
            store_tile(student_gradient, result, row, column, batch, dim)
        part = deviation * deviation + weight * (tl.sum(left * product, 0) - diagonal * diagonal)
        # The last program to come here sums all parts, in their order. Programs of one launch see each other's
        # writes only through atomic operations.
        tl.atomic_add(loss_parts + tl.program_id(0), tl.sum(tl.where(inside, part, 0.0)))
        tl.debug_barrier()
        programs = tl.num_programs(0)
        if tl.atomic_add(done, 1, sem="acq_rel") == programs - 1:
            index = tl.arange(0, 256)
            total = tl.zeros((256,), tl.float32)
            for start in range(0, programs, 256):
                exists = start + index < programs
                total += tl.where(exists, tl.atomic_add(loss_parts + start + index, 0.0, mask=exists), 0.0)
            tl.store(loss, tl.sum(total))


def configurations() -> Iterator[KernelConfig]:
    """Every kernel as it is launched, in the widest of its variants and in a narrow one."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        types = types_of(dtype)
        for block_batch in (16, 32, 64, 128):
            for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
                for wide in (True, False):
                    flags: dict[str, Any] = {"RESIDUAL": wide, "HAS_WEIGHT": wide, "PRECISION": precision}
                    flags |= {"BLOCK_BATCH": block_batch, "BLOCK_DIM": BLOCK_DIM}
                    demands = {"tensor_cores": dtype != torch.float32 or precision == "tf32", "exact": True}
                    normalise = {"CENTER": True, **flags}
                    gradient = {"STUDENT": True, "TEACHER": wide, "BLOCK_INNER": BLOCK_INNER, **flags}
                    yield KernelConfig(_normalise_kernel, types, normalise, warps(block_batch), **demands)
                    yield KernelConfig(_gradient_kernel, types, gradient, warps(block_batch), **demands)
        yield KernelConfig(_gram_kernel, types, {"BLOCK": GRAM_BLOCK}, exact=True)
