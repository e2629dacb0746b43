"""The cross-correlation loss of the output of a masked linear map."""

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from sdp_kernels.checks import (
    check_at_least,
    check_choice,
    check_dims,
    check_floating,
    check_same_device,
    check_sample_weight,
    check_shape,
    check_weight_values,
)
from sdp_kernels.cross_correlation import choose_form, cross_correlation_loss
from sdp_kernels.cross_correlation.forms import FEW_ROWS, Options
from sdp_kernels.dispatch import choose_backend
from sdp_kernels.masked_linear import BitMask, masked_linear
from sdp_kernels.masked_linear.op import FEW_TOKENS, OFFERS, check_arguments, lists_of, words_of
from sdp_kernels.masked_linear_cross_correlation.fused import loss_and_output

if TYPE_CHECKING:
    import torch.distributed as dist


@overload
def masked_linear_cross_correlation_loss(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | BitMask,
    teacher: Tensor,
    bias: Tensor | None = None,
    *,
    gradient: Literal["masked", "dense"] = "masked",
    return_output: Literal[False] = False,
    off_diagonal_weight: float = 5e-3,
    center: bool = True,
    target: Literal["identity", "teacher"] = "identity",
    eps: float = 1e-12,
    sample_weight: Tensor | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    form: Literal["auto", "gram", "matrix"] = "auto",
) -> Tensor: ...


@overload
def masked_linear_cross_correlation_loss(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | BitMask,
    teacher: Tensor,
    bias: Tensor | None = None,
    *,
    gradient: Literal["masked", "dense"] = "masked",
    return_output: Literal[True],
    off_diagonal_weight: float = 5e-3,
    center: bool = True,
    target: Literal["identity", "teacher"] = "identity",
    eps: float = 1e-12,
    sample_weight: Tensor | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    form: Literal["auto", "gram", "matrix"] = "auto",
) -> tuple[Tensor, Tensor]: ...


def masked_linear_cross_correlation_loss(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | BitMask,
    teacher: Tensor,
    bias: Tensor | None = None,
    *,
    gradient: Literal["masked", "dense"] = "masked",
    return_output: bool = False,
    off_diagonal_weight: float = 5e-3,
    center: bool = True,
    target: Literal["identity", "teacher"] = "identity",
    eps: float = 1e-12,
    sample_weight: Tensor | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    form: Literal["auto", "gram", "matrix"] = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Correlate the output of a masked linear map with the teacher's features and drive that to the target.

    That is `cross_correlation_loss(masked_linear(input, weight, mask, bias), teacher)`, with the arguments of both, for
    projections and the features of a layer. On a GPU, where a Triton kernel makes the output (see `masked_linear`), it
    also sums over the columns of output and teacher while it has them in registers, so that no kernel reads the output
    for its means and norms alone. Everywhere else it is the two operations one after the other: on a CPU, with a
    process group, with a masked copy for many tokens, and with up to 128 rows in the Gram form, whose kernels hold
    whole columns.

    Args:
        input: (batch, in), any float dtype.
        weight: (out, in), as for `masked_linear`.
        mask: (out, in) bool, True where kept, or a `BitMask`.
        teacher: (batch, out), any float dtype. Gets a gradient if it asks.
        bias: (out,) or None.
        gradient: "masked" or "dense", as for `masked_linear`.
        return_output: also return the output of the linear map; a gradient may come through both results.
        off_diagonal_weight: as for `cross_correlation_loss`, like all that follow.
        center: subtract each feature's mean over the batch first.
        target: "identity" or "teacher".
        eps: added to each feature's mean square.
        sample_weight: (batch,), weights of the rows or a bool mask. Rows without a positive weight are left out of the
            loss, not out of the product: where they may hold NaN, so does the gradient of the weight.
        process_group: compute the loss over the rows of all ranks. None means local rows only.
        form: "gram", "matrix" or "auto".

    Returns:
        The loss, a scalar in float32 (float64 if an input is), also under autocast; or (loss, output), with
        the output (batch, out) in the dtype that `F.linear` would return.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, fewer than 2 rows to centre, or a number out of its range.
        TypeError: a tensor is not floating-point, or the mask is neither bool nor `BitMask`.
        RuntimeError: on double backward.
    """
    _check_tensors(input, weight, teacher)
    if process_group is None and _fuses(input, weight, mask, teacher, center, form):
        check_at_least("off_diagonal_weight", off_diagonal_weight, 0)
        check_at_least("eps", eps, 0)
        check_choice("target", target, ("identity", "teacher"))
        check_choice("form", form, ("auto", "gram", "matrix"))
        check_sample_weight(sample_weight, teacher.shape[:1], teacher)
        check_weight_values(sample_weight, rows=1 + center)
        grad = torch.is_grad_enabled()
        options = Options(
            float(off_diagonal_weight),
            center,
            target == "teacher",
            float(eps),
            choose_form(*teacher.shape) if form == "auto" else form,
            grad and any(each is not None and each.requires_grad for each in (input, weight, bias)),
            grad and teacher.requires_grad,
        )
        loss, output = _fused(input, weight, mask, bias, teacher, sample_weight, gradient, options)
    else:
        output = masked_linear(input, weight, mask, bias, gradient=gradient)
        loss = cross_correlation_loss(
            output,
            teacher,
            off_diagonal_weight=off_diagonal_weight,
            center=center,
            target=target,
            eps=eps,
            sample_weight=sample_weight,
            process_group=process_group,
            form=form,
        )
    return (loss, output) if return_output else loss


def _check_tensors(input: Tensor, weight: Tensor, teacher: Tensor) -> None:
    check_floating("input", input)
    check_dims("input", input, 2)
    check_floating("weight", weight)
    check_dims("weight", weight, 2)
    check_floating("teacher", teacher)
    check_shape("teacher", teacher, (input.shape[0], weight.shape[0]))
    check_same_device("teacher", teacher, "input", input)


def _fuses(input: Tensor, weight: Tensor, mask: Tensor | BitMask, teacher: Tensor, center: bool, form: str) -> bool:
    """Whether a Triton product makes the output, and the loss takes sums over its columns."""
    batch, dim = teacher.shape
    if choose_backend("masked_linear_cross_correlation_loss", (input, weight, teacher), OFFERS) != "triton":
        return False
    if batch < 1 + center or 0 in weight.shape:
        return False
    gram = choose_form(batch, dim) == "gram" if form == "auto" else form == "gram"
    if gram and batch <= FEW_ROWS:  # its kernels hold whole columns and sum them themselves
        return False
    return batch <= FEW_TOKENS or bool(lists_of(mask, "triton", input)[0])


def _fused(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | BitMask,
    bias: Tensor | None,
    teacher: Tensor,
    sample_weight: Tensor | None,
    gradient: str,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Loss and output, by the operator that takes tensors and plain values only."""
    dtype = check_arguments(input, weight, mask, bias, None, gradient)
    lists, *sides = lists_of(mask, "triton", input)
    words, dense = words_of(mask), gradient == "dense"
    loss, output, *_ = loss_and_output(
        input, weight, words, bias, teacher, sample_weight, lists, *sides, dense, dtype, *options
    )
    return loss, output
