"""Both losses on a GPU: one pass over the rows in forward, one in backward, and nothing as large as them in between.

A tile is some rows by some classes; rows longer than a tile are walked along. Forward gives a loss a row and the few
numbers a row (`statistics`) from which backward makes its gradient again. All arithmetic is float32.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdp_kernels.dispatch import on_its_device
from sdp_kernels.distillation.rows import STATISTICS, RowLosses, room_for
from sdp_kernels.spec import KernelConfig

TILES = ((32, 16), (4, 128), (2, 1024), (1, 4096))  # (rows, columns), the narrowest first
# Arguments that say how many rows there are: a kernel compiled for each kind of number would be no faster.
COUNTS = ["rows", "student_inner", "teacher_inner"]


@on_its_device
def row_losses(
    student: Tensor, teacher: Tensor, sample_weight: Tensor | None, kind: str, option: float
) -> tuple[Tensor, Tensor]:
    """The loss of each row, 0 for rows left out, and its statistics, (rows, numbers); both float32."""
    leading, columns = student.shape[:-1], student.shape[-1]
    rows = leading.numel()
    losses = student.new_empty(leading, dtype=torch.float32)
    statistics = student.new_empty((rows, STATISTICS[kind]), dtype=torch.float32)
    sizes = tile(columns)
    FORWARD[kind][(triton.cdiv(rows, sizes["BLOCK_ROWS"]),)](
        *as_rows(student),
        *as_rows(teacher),
        losses if sample_weight is None else sample_weight.contiguous(),
        losses,
        statistics,
        rows,
        columns,
        option,
        HAS_WEIGHT=sample_weight is not None,
        **sizes,
    )
    return losses, statistics


@on_its_device
def row_gradients(
    scale: Tensor, found: RowLosses, kind: str, option: float, student_gradient: bool, teacher_gradient: bool
) -> tuple[Tensor, Tensor]:
    """As `cpu.row_gradients`."""
    student, teacher, sample_weight, losses, statistics = found
    rows, columns = losses.numel(), student.shape[-1]
    results = room_for(student, teacher, student_gradient, teacher_gradient)
    sizes = tile(columns)
    strips = triton.cdiv(columns, sizes["BLOCK_COLUMNS"])
    BACKWARD[kind][(triton.cdiv(rows, sizes["BLOCK_ROWS"]) * strips,)](
        *as_rows(student),
        *as_rows(teacher),
        losses if sample_weight is None else sample_weight.contiguous(),
        scale.contiguous(),
        losses,
        statistics,
        *results,
        rows,
        columns,
        option,
        HAS_WEIGHT=sample_weight is not None,
        STUDENT=student_gradient,
        TEACHER=teacher_gradient,
        **sizes,
    )
    return results


class Rows(NamedTuple):
    """A tensor (..., columns) where it is: row r begins at r // inner * outer_stride + r % inner * stride."""

    values: Tensor
    inner: int
    outer_stride: int
    stride: int


def as_rows(tensor: Tensor) -> Rows:
    """Where the rows of a tensor are; copies it only if three strides or more lead to them, or entries lie apart."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    dims: list[tuple[int, int]] = []  # (size, stride), two in one where they step evenly
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        elif size > 1:
            dims.append((size, stride))
    if len(dims) > 2:
        return as_rows(tensor.contiguous())
    (_, outer_stride), (inner, stride) = [(1, 0)] * (2 - len(dims)) + dims
    return Rows(tensor, inner, outer_stride, stride)


def tile(columns: int) -> dict[str, int]:
    """The launch sizes for rows of this length."""
    block_rows, block_columns = next((each for each in TILES if each[1] >= columns), TILES[-1])
    return {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns, "num_warps": warps(block_columns)}


def warps(block_columns: int) -> int:
    """Warps of a program, by the length of its tile."""
    return 8 if block_columns == TILES[-1][1] else 4


@triton.jit
def _row_pointers(pointer, row, inner, outer_stride, stride):
    return (pointer + row // inner * outer_stride + row % inner * stride)[:, None]


@triton.jit
def _kept(sample_weight, row, rows, HAS_WEIGHT: tl.constexpr):
    """Whether each row counts: rows without a positive weight are not read, so whatever they hold stays out."""
    kept = row < rows
    if HAS_WEIGHT:
        weight = tl.load(sample_weight + row, mask=kept, other=0).to(tl.float32)
        kept = tl.where(weight <= 0, False, kept)
    return kept


@triton.jit
def _load(pointers, column, columns, kept, OTHER: tl.constexpr):
    mask = kept[:, None] & (column < columns)[None, :]
    return tl.load(pointers + column[None, :], mask=mask, other=OTHER).to(tl.float32)


@triton.jit
def _store(pointer, row, rows, column, columns, value):
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(pointer + row[:, None] * columns + column[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _measure(logits, top, total, inverse_temperature):
    """Take one more tile into the running maximum of each row.

    Returns the new maximum, by how much it is now lower to stand on the old one (0 if nothing has been summed yet),
    and the logits measured from the new one, both over the temperature. A row that is -inf so far is measured from 0.
    """
    new_top = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    moved = tl.where(total == 0, 0.0, (top - base) * inverse_temperature)
    return new_top, moved, (logits - base[:, None]) * inverse_temperature


@triton.jit
def _ratio(p, s, t):
    """Logarithm of p over q, but 0 for a class of no probability: it adds nothing, though its ratio may be anything."""
    return tl.where(p == 0, 0.0, t) - tl.where(p == 0, 0.0, s)


@triton.jit(do_not_specialize=COUNTS)
def _kl_forward_kernel(
    student,  # rows of logits
    student_inner,
    student_outer_stride,
    student_stride,
    teacher,  # rows of logits
    teacher_inner,
    teacher_outer_stride,
    teacher_stride,
    sample_weight,  # (rows,), read if HAS_WEIGHT
    divergence,  # (rows,) float32
    statistics,  # (rows, 4) float32: maximum and sum of exponentials of the student, then of the teacher
    rows,
    columns,
    temperature,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    kept = _kept(sample_weight, row, rows, HAS_WEIGHT)
    student = _row_pointers(student, row, student_inner, student_outer_stride, student_stride)
    teacher = _row_pointers(teacher, row, teacher_inner, teacher_outer_stride, teacher_stride)
    s_top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    t_top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    s_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    t_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    inverse_temperature = 1.0 / temperature
    excess = tl.zeros((BLOCK_ROWS,), tl.float32)  # of the teacher's logits over the student's, both from their maxima
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        s = _load(student, column, columns, kept, float("-inf"))
        t = _load(teacher, column, columns, kept, float("-inf"))
        s_top, s_moved, s = _measure(s, s_top, s_sum, inverse_temperature)
        t_top, t_moved, t = _measure(t, t_top, t_sum, inverse_temperature)
        shrink = tl.exp(t_moved)
        excess = shrink * tl.where(shrink == 0, 0.0, excess + t_sum * (t_moved - s_moved))
        p = tl.exp(t)
        excess += tl.sum(p * _ratio(p, s, t), 1)
        t_sum = t_sum * shrink + tl.sum(p, 1)
        s_sum = s_sum * tl.exp(s_moved) + tl.sum(tl.exp(s), 1)
    s_sum = tl.where(kept, s_sum, 1.0)
    t_sum = tl.where(kept, t_sum, 1.0)
    result = excess / t_sum + tl.log(s_sum / t_sum)
    tl.store(divergence + row, result, mask=row < rows)  # 0 where left out
    tl.store(statistics + 4 * row, s_top, mask=kept)
    tl.store(statistics + 4 * row + 1, s_sum, mask=kept)
    tl.store(statistics + 4 * row + 2, t_top, mask=kept)
    tl.store(statistics + 4 * row + 3, t_sum, mask=kept)


@triton.jit(do_not_specialize=COUNTS)
def _kl_backward_kernel(
    student,  # rows of logits
    student_inner,
    student_outer_stride,
    student_stride,
    teacher,  # rows of logits
    teacher_inner,
    teacher_outer_stride,
    teacher_stride,
    sample_weight,  # (rows,), read if HAS_WEIGHT
    scale,  # (rows,) float32: gradient of each row's divergence
    divergence,  # (rows,) float32
    statistics,  # (rows, 4) float32
    student_gradient,  # (rows, columns), written if STUDENT
    teacher_gradient,  # (rows, columns), written if TEACHER
    rows,
    columns,
    temperature,
    HAS_WEIGHT: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    strips = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % strips * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    kept = _kept(sample_weight, row, rows, HAS_WEIGHT)
    student = _row_pointers(student, row, student_inner, student_outer_stride, student_stride)
    teacher = _row_pointers(teacher, row, teacher_inner, teacher_outer_stride, teacher_stride)
    s = _load(student, column, columns, kept, float("-inf"))
    t = _load(teacher, column, columns, kept, float("-inf"))
    # A row left out has only classes of no probability, and so no gradient.
    s_top = tl.load(statistics + 4 * row, mask=kept, other=1.0)
    s_sum = tl.load(statistics + 4 * row + 1, mask=kept, other=1.0)
    t_top = tl.load(statistics + 4 * row + 2, mask=kept, other=1.0)
    t_sum = tl.load(statistics + 4 * row + 3, mask=kept, other=1.0)
    inverse_temperature = 1.0 / temperature
    factor = tl.load(scale + row, mask=kept, other=0.0) * inverse_temperature
    s = (s - s_top[:, None]) * inverse_temperature
    t = (t - t_top[:, None]) * inverse_temperature
    p = tl.exp(t) / t_sum[:, None]
    if STUDENT:
        q = tl.exp(s) / s_sum[:, None]
        _store(student_gradient, row, rows, column, columns, factor[:, None] * (q - p))
    if TEACHER:
        mean = tl.load(divergence + row, mask=kept, other=0.0) - tl.log(s_sum / t_sum)
        slope = p * (_ratio(p, s, t) - mean[:, None])
        _store(teacher_gradient, row, rows, column, columns, factor[:, None] * slope)


@triton.jit(do_not_specialize=COUNTS)
def _cosine_forward_kernel(
    student,  # rows of features
    student_inner,
    student_outer_stride,
    student_stride,
    teacher,  # rows of features
    teacher_inner,
    teacher_outer_stride,
    teacher_stride,
    sample_weight,  # (rows,), read if HAS_WEIGHT
    distance,  # (rows,) float32
    statistics,  # (rows, 2) float32: norm of the student, of the teacher
    rows,
    columns,
    eps,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    kept = _kept(sample_weight, row, rows, HAS_WEIGHT)
    student = _row_pointers(student, row, student_inner, student_outer_stride, student_stride)
    teacher = _row_pointers(teacher, row, teacher_inner, teacher_outer_stride, teacher_stride)
    product = tl.zeros((BLOCK_ROWS,), tl.float32)
    s_square = tl.zeros((BLOCK_ROWS,), tl.float32)
    t_square = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        s = _load(student, column, columns, kept, 0.0)
        t = _load(teacher, column, columns, kept, 0.0)
        product += tl.sum(s * t, 1)
        s_square += tl.sum(s * s, 1)
        t_square += tl.sum(t * t, 1)
    s_norm = tl.sqrt_rn(s_square)
    t_norm = tl.sqrt_rn(t_square)
    # One division: a single column has cosine 1 or -1 to the last bit. The bound is for rows of zeros.
    bound = tl.maximum(_at_least(s_norm, eps) * _at_least(t_norm, eps), 1e-37)
    distance_of_row = 1.0 - tl.div_rn(product, bound)
    tl.store(distance + row, tl.where(kept, distance_of_row, 0.0), mask=row < rows)
    tl.store(statistics + 2 * row, s_norm, mask=kept)
    tl.store(statistics + 2 * row + 1, t_norm, mask=kept)


@triton.jit(do_not_specialize=COUNTS)
def _cosine_backward_kernel(
    student,  # rows of features
    student_inner,
    student_outer_stride,
    student_stride,
    teacher,  # rows of features
    teacher_inner,
    teacher_outer_stride,
    teacher_stride,
    sample_weight,  # (rows,), read if HAS_WEIGHT
    scale,  # (rows,) float32: gradient of each row's distance
    distance,  # (rows,) float32
    statistics,  # (rows, 2) float32
    student_gradient,  # (rows, columns), written if STUDENT
    teacher_gradient,  # (rows, columns), written if TEACHER
    rows,
    columns,
    eps,
    HAS_WEIGHT: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    strips = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (tl.program_id(0) // strips).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % strips * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    kept = _kept(sample_weight, row, rows, HAS_WEIGHT)
    student = _row_pointers(student, row, student_inner, student_outer_stride, student_stride)
    teacher = _row_pointers(teacher, row, teacher_inner, teacher_outer_stride, teacher_stride)
    s = _load(student, column, columns, kept, 0.0)
    t = _load(teacher, column, columns, kept, 0.0)
    s_norm = tl.load(statistics + 2 * row, mask=kept, other=1.0)
    t_norm = tl.load(statistics + 2 * row + 1, mask=kept, other=1.0)
    cosine = 1.0 - tl.load(distance + row, mask=kept, other=0.0)
    factor = tl.load(scale + row, mask=kept, other=0.0)
    s_bound = _at_least(s_norm, eps)
    t_bound = _at_least(t_norm, eps)
    s_unit = _unit(s, s_norm)
    t_unit = _unit(t, t_norm)
    # torch bounds the norms without a gradient of the bound: that of the norm itself, x / |x|, passes through.
    if STUDENT:
        slope = cosine[:, None] * s_unit - t_unit * tl.div_rn(t_norm, t_bound)[:, None]
        _store(student_gradient, row, rows, column, columns, (factor / s_bound)[:, None] * slope)
    if TEACHER:
        slope = cosine[:, None] * t_unit - s_unit * tl.div_rn(s_norm, s_bound)[:, None]
        _store(teacher_gradient, row, rows, column, columns, (factor / t_bound)[:, None] * slope)


@triton.jit
def _unit(rows, norm):
    norm = tl.where(norm == 0, 1.0, norm)[:, None]
    return tl.div_rn(rows, tl.broadcast_to(norm, rows.shape))


@triton.jit
def _at_least(norm, eps):
    return tl.where(norm < eps, eps, norm)  # keeps a NaN


FORWARD = {"kl": _kl_forward_kernel, "cosine": _cosine_forward_kernel}
BACKWARD = {"kl": _kl_backward_kernel, "cosine": _cosine_backward_kernel}


def configurations() -> Iterator[KernelConfig]:
    """Every tile of each kernel, for rows of one dtype and of two."""
    layout = [f"{name}_{part}" for name in ("student", "teacher") for part in ("inner", "outer_stride", "stride")]
    shared = dict.fromkeys((*layout, "rows", "columns"), "i32")
    shared |= dict.fromkeys(("temperature", "eps"), "fp32")
    numbers = ("sample_weight", "divergence", "distance", "statistics", "scale")
    shared |= dict.fromkeys(numbers, "*fp32")
    for student, teacher in (("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("fp32", "bf16")):
        types = shared | dict.fromkeys(("student", "student_gradient"), f"*{student}")
        types |= dict.fromkeys(("teacher", "teacher_gradient"), f"*{teacher}")
        for block_rows, block_columns in TILES:
            blocks = {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns}
            num_warps = warps(block_columns)
            for wide in (True, False):
                forward = {"HAS_WEIGHT": wide, **blocks}
                backward = {"STUDENT": True, "TEACHER": wide, **forward}
                for kernel in (_kl_forward_kernel, _cosine_forward_kernel):
                    yield KernelConfig(kernel, types, forward, num_warps=num_warps)
                for kernel in (_kl_backward_kernel, _cosine_backward_kernel):
                    yield KernelConfig(kernel, types, backward, num_warps=num_warps)
