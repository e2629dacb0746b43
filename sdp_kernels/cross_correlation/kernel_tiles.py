"""What the kernels of this loss share: unit columns made again from the inputs, and the little formulas on them.

Quotients and roots are rounded as IEEE 754 says: a GPU's own are wrong in the last bits, and near convergence these
losses consist of the last bits.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdp_kernels.cross_correlation.reference import DEAD_EPSILONS
from sdp_kernels.spec import TRITON_NAMES
from sdp_kernels.tiles.kernel_columns import load_rows

# Arguments that say how many rows or parts there are: a kernel compiled for each kind of number would be no faster.
COUNTS = ["batch", "chunk_rows", "chunks", "parts", "strips"]
DEAD_LIMIT = (DEAD_EPSILONS * torch.finfo(torch.float32).eps) ** 2


def product_dtype(student: Tensor, teacher: Tensor, residual: bool) -> torch.dtype:
    """The dtype of the large products: that of the inputs, if they agree and its range holds sums over `dim`.

    The columns have norm 1 at most, those of a residual 2, and a Gram matrix may gather all of them in one entry.
    """
    most = (4 if residual else 1) * student.shape[1]
    if student.dtype != teacher.dtype or most > torch.finfo(student.dtype).max:
        return torch.float32
    return student.dtype


def result_like(features: Tensor, wanted: bool) -> Tensor:
    """Memory for a gradient, or an empty tensor."""
    return features.new_empty(features.shape if wanted else (0,), dtype=torch.float32)


def types_of(dtype: torch.dtype) -> dict[str, str]:
    """Triton's type of every argument of these kernels by its name, for features of `dtype`."""
    features = f"*{TRITON_NAMES[dtype]}"
    integers = ("batch", "dim", "rows", "chunk_rows", "chunks", "first_row", "strips", "parts", "entries")
    floats = ("statistics", "sums", "columns", "gram_parts", "loss_parts", "loss", "sample_weight")
    products = ("left", "right", "student_product", "teacher_product", "correlation", "gram")
    return (
        dict.fromkeys(("student", "teacher", *products), features)
        | dict.fromkeys((*floats, "student_gradient", "teacher_gradient"), "*fp32")
        | dict.fromkeys(("weight", "eps", "dead_limit"), "fp32")
        | dict.fromkeys(integers, "i32")
        | {"done": "*i32"}
    )


@triton.jit
def unit_columns(features, share, mean, inverse):
    """Centred and scaled to unit norm; 0 where the weight is."""
    return (features - mean[None, :]) * tl.sqrt_rn(share) * inverse[None, :]


@triton.jit
def load_units(
    student, teacher, sample_weight, columns, row, column, batch, dim, RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr
):
    """Left and right unit columns made again from the inputs, in float32, and the weights.

    What the products read is rounded to their dtype. Here that would cost digits where student and teacher
    agree, because going back through the norm leaves only the part in which they differ.
    """
    inside = column < dim
    s, share = load_rows(student, sample_weight, row, column, batch, dim, HAS_WEIGHT)
    t, share = load_rows(teacher, sample_weight, row, column, batch, dim, HAS_WEIGHT)
    mean = tl.load(columns + column, mask=inside, other=0.0)
    inverse = tl.load(columns + dim + column, mask=inside, other=0.0)
    s = unit_columns(s, share, mean, inverse)
    mean = tl.load(columns + 2 * dim + column, mask=inside, other=0.0)
    inverse = tl.load(columns + 3 * dim + column, mask=inside, other=0.0)
    t = unit_columns(t, share, mean, inverse)
    if RESIDUAL:
        s = s - t
    return s, t, share


@triton.jit
def inverse_norm(squares, mean, total, eps, dead_limit):
    """1 / norm of a centred column, 0 for a dead one; total * mean^2 is what centring took from the raw squares."""
    dead = squares <= dead_limit * (squares + total * mean * mean)
    norm = tl.sqrt_rn(tl.where(dead, 1.0, squares + total * eps))
    return tl.where(dead, 0.0, tl.div_rn(1.0, norm))


@triton.jit
def slope_of(diagonal, weight, RESIDUAL: tl.constexpr, GRAM: tl.constexpr):
    """Deviation of the diagonal, and the derivative by it of what the products do not cover already."""
    deviation = diagonal if RESIDUAL else diagonal - 1.0
    slope = 2.0 * deviation
    if GRAM:  # the products hold the diagonal too
        slope = slope - 2.0 * weight * diagonal
    return deviation, slope


@triton.jit
def through_norm(gradient, unit, along, inverse, share):
    """Gradient by the features from that by their unit columns.

    Centring needs nothing more: the gradient is a combination of centred columns, whose weighted sum is zero.
    """
    return (gradient - unit * along[None, :]) * inverse[None, :] * tl.sqrt_rn(share)
