"""Fused passes over the columns: normalise with the diagonal, and the gradient through the norm.

Each program owns a strip of columns and walks down all rows, so every sum has a fixed order.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdp_kernels.cross_correlation.columns import DEAD_EPSILONS, Columns

DEAD_LIMIT = (DEAD_EPSILONS * torch.finfo(torch.float32).eps) ** 2


def launch_sizes(batch: int, dim: int) -> tuple[int, int]:
    """Rows a step and columns a program: enough programs to fill a device, wide enough reads."""
    block_batch = min(64, triton.next_power_of_2(batch))
    return block_batch, 32 if dim >= 4096 else 16


def normalise(
    student: Tensor, teacher: Tensor, sample_weight: Tensor | None, center: bool, residual: bool, eps: float
) -> Columns:
    """As columns.normalise, in one launch."""
    student, teacher = student.contiguous(), teacher.contiguous()
    batch, dim = student.shape
    left = torch.empty_like(student, dtype=torch.float32)
    right = torch.empty_like(left)
    inverse_norms = left.new_empty(2, dim)
    diagonal = left.new_empty(dim)
    block_batch, block_dim = launch_sizes(batch, dim)
    _normalise_kernel[(triton.cdiv(dim, block_dim),)](
        student,
        teacher,
        student if sample_weight is None else sample_weight.float().contiguous(),
        left,
        right,
        inverse_norms,
        diagonal,
        batch,
        dim,
        eps,
        DEAD_LIMIT,
        HAS_WEIGHT=sample_weight is not None,
        CENTER=center,
        RESIDUAL=residual,
        BLOCK_BATCH=block_batch,
        BLOCK_DIM=block_dim,
    )
    return Columns(left, right, inverse_norms, diagonal)


def feature_gradient(
    product: Tensor, other: Tensor, slope: Tensor, unit: Tensor, inverse: Tensor, sample_weight: Tensor | None
) -> Tensor:
    """As columns.feature_gradient, in one launch; `product` is overwritten."""
    batch, dim = product.shape
    block_batch, block_dim = launch_sizes(batch, dim)
    _feature_gradient_kernel[(triton.cdiv(dim, block_dim),)](
        product,
        other,
        slope,
        unit,
        inverse,
        product if sample_weight is None else sample_weight.float().contiguous(),
        batch,
        dim,
        HAS_WEIGHT=sample_weight is not None,
        BLOCK_BATCH=block_batch,
        BLOCK_DIM=block_dim,
    )
    return product


@triton.jit
def _load_rows(pointer, weight, row, column, batch, dim, HAS_WEIGHT: tl.constexpr):
    """(BLOCK_BATCH, BLOCK_DIM) features as float32 and their (BLOCK_BATCH, 1) weights; 0 outside.

    Rows without a positive weight are not read, so whatever they hold stays out.
    """
    inside = row < batch
    if HAS_WEIGHT:
        share = tl.load(weight + row, mask=inside, other=0.0).to(tl.float32)
        inside = inside & (share > 0)
        share = tl.where(inside, share, 0.0)
    else:
        share = tl.where(inside, 1.0, 0.0)
    mask = inside[:, None] & (column < dim)[None, :]
    offset = row.to(tl.int64)[:, None] * dim + column[None, :]
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32), share[:, None]


@triton.jit
def _normalise_kernel(
    student,  # (batch, dim)
    teacher,  # (batch, dim)
    weight,  # (batch,), read if HAS_WEIGHT
    left,  # (batch, dim) float32: unit student columns, less the teacher's if RESIDUAL
    right,  # (batch, dim) float32: unit teacher columns
    inverse_norms,  # (2, dim) float32
    diagonal,  # (dim,) float32
    batch,
    dim,
    eps,
    dead_limit,
    HAS_WEIGHT: tl.constexpr,
    CENTER: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    rows = tl.arange(0, BLOCK_BATCH)
    total = 0.0
    student_mean = tl.zeros((BLOCK_DIM,), tl.float32)
    teacher_mean = tl.zeros((BLOCK_DIM,), tl.float32)
    for start in range(0, batch, BLOCK_BATCH):
        s, share = _load_rows(student, weight, start + rows, column, batch, dim, HAS_WEIGHT)
        t, share = _load_rows(teacher, weight, start + rows, column, batch, dim, HAS_WEIGHT)
        total += tl.sum(share)
        if CENTER:
            student_mean += tl.sum(s * share, 0)
            teacher_mean += tl.sum(t * share, 0)
    student_mean = student_mean / tl.maximum(total, 1e-37)
    teacher_mean = teacher_mean / tl.maximum(total, 1e-37)

    student_squares = tl.zeros((BLOCK_DIM,), tl.float32)
    teacher_squares = tl.zeros((BLOCK_DIM,), tl.float32)
    for start in range(0, batch, BLOCK_BATCH):
        s, share = _load_rows(student, weight, start + rows, column, batch, dim, HAS_WEIGHT)
        t, share = _load_rows(teacher, weight, start + rows, column, batch, dim, HAS_WEIGHT)
        s = s - student_mean[None, :]
        t = t - teacher_mean[None, :]
        student_squares += tl.sum(s * s * share, 0)
        teacher_squares += tl.sum(t * t * share, 0)
    student_dead = student_squares <= dead_limit * (student_squares + total * student_mean * student_mean)
    teacher_dead = teacher_squares <= dead_limit * (teacher_squares + total * teacher_mean * teacher_mean)
    student_inverse = tl.where(student_dead, 0.0, 1.0 / tl.sqrt(student_squares + total * eps))
    teacher_inverse = tl.where(teacher_dead, 0.0, 1.0 / tl.sqrt(teacher_squares + total * eps))
    tl.store(inverse_norms + column, student_inverse, mask=column < dim)
    tl.store(inverse_norms + dim + column, teacher_inverse, mask=column < dim)

    products = tl.zeros((BLOCK_DIM,), tl.float32)
    for start in range(0, batch, BLOCK_BATCH):
        row = start + rows
        s, share = _load_rows(student, weight, row, column, batch, dim, HAS_WEIGHT)
        t, share = _load_rows(teacher, weight, row, column, batch, dim, HAS_WEIGHT)
        root = tl.sqrt(share)
        s = (s - student_mean[None, :]) * root * student_inverse[None, :]
        t = (t - teacher_mean[None, :]) * root * teacher_inverse[None, :]
        if RESIDUAL:
            s = s - t
        products += tl.sum(s * t, 0)
        mask = (row < batch)[:, None] & (column < dim)[None, :]
        offset = row.to(tl.int64)[:, None] * dim + column[None, :]
        tl.store(left + offset, s, mask=mask)
        tl.store(right + offset, t, mask=mask)
    tl.store(diagonal + column, products, mask=column < dim)


@triton.jit
def _feature_gradient_kernel(
    product,  # (batch, dim) float32, overwritten with the result
    other,  # (batch, dim) float32
    slope,  # (dim,) float32
    unit,  # (batch, dim) float32
    inverse,  # (dim,) float32
    weight,  # (batch,), read if HAS_WEIGHT
    batch,
    dim,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = column < dim
    rows = tl.arange(0, BLOCK_BATCH)
    factor = tl.load(slope + column, mask=inside, other=0.0)
    scale = tl.load(inverse + column, mask=inside, other=0.0)
    along = tl.zeros((BLOCK_DIM,), tl.float32)
    for start in range(0, batch, BLOCK_BATCH):
        row = start + rows
        mask = (row < batch)[:, None] & inside[None, :]
        offset = row.to(tl.int64)[:, None] * dim + column[None, :]
        gradient = tl.load(product + offset, mask=mask, other=0.0)
        gradient += tl.load(other + offset, mask=mask, other=0.0) * factor[None, :]
        along += tl.sum(tl.load(unit + offset, mask=mask, other=0.0) * gradient, 0)
    for start in range(0, batch, BLOCK_BATCH):
        row = start + rows
        mask = (row < batch)[:, None] & inside[None, :]
        offset = row.to(tl.int64)[:, None] * dim + column[None, :]
        gradient = tl.load(product + offset, mask=mask, other=0.0)
        gradient += tl.load(other + offset, mask=mask, other=0.0) * factor[None, :]
        gradient = gradient - tl.load(unit + offset, mask=mask, other=0.0) * along[None, :]
        gradient = gradient * scale[None, :]
        if HAS_WEIGHT:
            share = tl.load(weight + row, mask=row < batch, other=0.0).to(tl.float32)
            gradient = gradient * tl.sqrt(tl.maximum(share, 0.0))[:, None]
        tl.store(product + offset, gradient, mask=mask)
