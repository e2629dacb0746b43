"""Tiles of rows by columns in Triton, and what is summed over the columns of one while it is in registers.

Quotients and roots are rounded as IEEE 754 says: a GPU's own are wrong in the last bits, and near convergence the
losses that these sums go into consist of the last bits.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def load_rows(pointer, sample_weight, row, column, batch, dim, HAS_WEIGHT: tl.constexpr):
    """(rows, columns) features as float32 and their (rows, 1) weights; 0 outside.

    Rows without a positive weight are not read, so whatever they hold stays out.
    """
    inside = row < batch
    if HAS_WEIGHT:
        share = tl.load(sample_weight + row, mask=inside, other=0.0)
        inside = inside & (share > 0)
        share = tl.where(inside, share, 0.0)
    else:
        share = tl.where(inside, 1.0, 0.0)
    mask = inside[:, None] & (column < dim)[None, :]
    offset = row.to(tl.int64)[:, None] * dim + column[None, :]
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32), share[:, None]


@triton.jit
def load_tile(pointer, row, column, batch, dim):
    """(rows, columns) entries in their dtype; 0 outside."""
    mask = (row < batch)[:, None] & (column < dim)[None, :]
    return tl.load(pointer + row.to(tl.int64)[:, None] * dim + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, value, row, column, batch, dim):
    """Write (rows, columns) entries in the dtype of the memory; nothing outside."""
    mask = (row < batch)[:, None] & (column < dim)[None, :]
    offset = row.to(tl.int64)[:, None] * dim + column[None, :]
    tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def tile_statistics(features, share, CENTER: tl.constexpr):
    """Mean and weighted sum of squares about it, of the columns of one tile."""
    total = tl.sum(share)
    mean = tl.div_rn(tl.sum(features * share, 0), tl.maximum(total, 1e-37)) * (1.0 if CENTER else 0.0)
    centred = features - mean[None, :]
    return total, mean, tl.sum(centred * centred * share, 0)
