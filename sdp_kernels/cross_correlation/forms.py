"""Two ways to the same loss: through two batch x batch products, or through C = left.T @ right itself.

Both take normalised columns `left` and `right`, (batch, dim), and need of C = left.T @ right only the sum
of its squared off-diagonal entries and the two products that the gradient is made of. The Gram form rests on

    sum_ij C_ij^2 = <left left.T, right right.T>,        d(that)/d(left) = 2 (right right.T) left

and never makes a dim x dim matrix. It subtracts the diagonal, which is safe only while batch <= dim / 2:
above that the diagonal may be nearly the whole sum.
"""

from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from sdp_kernels.checks import check_at_least, check_choice

Form = Literal["gram", "matrix"]

MATRIX_CHUNK_ELEMENTS = 2**24  # of C at a time: 64 MiB in float32
CACHED_ELEMENTS = 2**17  # of a temporary that is made, read once and dropped
FEW_ROWS = 128  # up to which the Triton kernels of the Gram form hold whole columns


class Options(NamedTuple):
    """What to compute, besides the tensors."""

    weight: float  # of the entries off the diagonal
    center: bool
    residual: bool  # correlate (student - teacher) with the teacher: the diagonal should be 0 instead of 1
    eps: float
    form: str  # a `Form`, or "auto" until sizes are known: operators know text only
    student_gradient: bool = False  # make it
    teacher_gradient: bool = False


class LossOptions(TypedDict, total=False):
    """The plain options of `cross_correlation_loss`, for functions that pass them on."""

    off_diagonal_weight: float
    center: bool
    target: Literal["identity", "teacher"]
    eps: float
    form: Literal["auto", "gram", "matrix"]


class Products(NamedTuple):
    """What a form gives back. Both products are scaled by 2 * weight, so they are parts of gradients."""

    off_diagonal: Tensor  # scalar: weight * sum over i != j of C_ij^2
    left: Tensor  # (batch, dim): 2 * weight * right @ C.T; empty if not asked for
    right: Tensor  # (batch, dim): 2 * weight * left @ C; empty if not asked for
    with_diagonal: bool  # whether C has its diagonal in the products


def choose_form(batch: int, dim: int) -> Form:
    """The form that is both cheaper and safe for these sizes."""
    return "gram" if batch <= dim // 2 else "matrix"


def checked_options(
    *,
    off_diagonal_weight: float = 5e-3,
    center: bool = True,
    target: str = "identity",
    eps: float = 1e-12,
    form: str = "auto",
) -> Options:
    """The options of `cross_correlation_loss`; no gradients yet, and the form may still be "auto".

    Raises:
        ValueError: a number out of its range, or an unknown target or form.
    """
    check_at_least("off_diagonal_weight", off_diagonal_weight, 0)
    check_at_least("eps", eps, 0)
    check_choice("target", target, ("identity", "teacher"))
    check_choice("form", form, ("auto", "gram", "matrix"))
    return Options(float(off_diagonal_weight), center, target == "teacher", float(eps), form)


def decided_options(
    options: Options, batch: int, dim: int, *, student_gradient: bool, teacher_gradient: bool
) -> Options:
    """The options with a form for these sizes, and with the gradients that are to be made."""
    form = choose_form(batch, dim) if options.form == "auto" else options.form
    return Options(
        options.weight, options.center, options.residual, options.eps, form, student_gradient, teacher_gradient
    )


def holds_columns(batch: int, form: str) -> bool:
    """Whether the Triton kernels hold whole columns, and so sum over them themselves."""
    return form == "gram" and batch <= FEW_ROWS


def chunk_rows(dim: int) -> int:
    """Rows of C made at a time in the matrix form."""
    return max(1, min(dim, MATRIX_CHUNK_ELEMENTS // dim))


def column_products(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of each column of `left` with that of `right`.

    A few rows at a time: fresh memory as large as the input would cost more than the arithmetic.
    """
    rows = max(1, CACHED_ELEMENTS // left.shape[1])
    if left.shape[0] <= rows:
        return (left * right).sum(0)
    total = left.new_zeros(left.shape[1])
    for some_left, some_right in zip(torch.split(left, rows), torch.split(right, rows), strict=True):
        total += (some_left * some_right).sum(0)
    return total


def gram_products(left: Tensor, right: Tensor, diagonal: Tensor, weight: float, need_right: bool) -> Products:
    """Products of the Gram form: 4 * batch^2 * dim operations each.

    The product for `left` is always made, because its inner product with `left` is the sum of squares.
    """
    left_product = (right @ right.T).mul_(2 * weight) @ left
    squares = column_products(left, left_product).sum().div_(2)
    right_product = (left @ left.T).mul_(2 * weight) @ right if need_right else left.new_empty(0)
    return Products(squares.sub_(diagonal.dot(diagonal), alpha=weight), left_product, right_product, True)


def matrix_products(left: Tensor, right: Tensor, weight: float, need_left: bool, need_right: bool) -> Products:
    """Products of the matrix form, from a few rows of C at a time; the diagonal is zeroed, never subtracted."""
    dim = left.shape[1]
    off_diagonal = left.new_zeros(())
    left_product = torch.empty_like(left) if need_left else left.new_empty(0)
    right_product = torch.zeros_like(right) if need_right else left.new_empty(0)
    for start in range(0, dim, chunk_rows(dim)):
        rows = slice(start, min(start + chunk_rows(dim), dim))
        correlation = left[:, rows].T @ right
        correlation.diagonal(start).zero_()
        off_diagonal += column_products(correlation, correlation).sum()
        if need_left:
            part = left_product[:, rows]
            torch.addmm(part, right, correlation.T, beta=0, alpha=2 * weight, out=part)
        if need_right:
            right_product.addmm_(left[:, rows], correlation, alpha=2 * weight)
    return Products(weight * off_diagonal, left_product, right_product, False)
