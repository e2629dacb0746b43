"""The cross-correlation loss of the output of a masked linear map.

It is fused only where a Triton kernel makes the output anyway: that kernel also sums over the columns of output and
teacher while it has them in registers, so that no kernel reads the output for its means and norms alone. Everywhere
else it is the two operations one after the other: on a CPU, with a process group, where cuBLAS multiplies with a masked
copy, and with few rows in the Gram form, whose kernels hold whole columns.
"""

from typing import TYPE_CHECKING, Literal, Unpack, overload

import torch
from torch import Tensor

from sdp_kernels.checks import (
    check_dims,
    check_floating,
    check_same_device,
    check_sample_weight,
    check_shape,
    check_weight_values,
)
from sdp_kernels.cross_correlation import (
    LossOptions,
    Options,
    checked_options,
    cross_correlation_loss,
    decided_options,
    holds_columns,
)
from sdp_kernels.dispatch import OFFERS, choose_backend
from sdp_kernels.masked_linear import check_arguments, has_kernel, mask_arguments, masked_linear
from sdp_kernels.masked_linear_cross_correlation.fused import loss_and_output
from sdp_kernels.masks import BitMask

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
    sample_weight: Tensor | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    **options: Unpack[LossOptions],
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
    sample_weight: Tensor | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    **options: Unpack[LossOptions],
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
    sample_weight: Tensor | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Correlate the output of a masked linear map with the teacher's features and drive that to the target.

    That is `cross_correlation_loss(masked_linear(input, weight, mask, bias), teacher)`, with the arguments of both, for
    projections and the features of a layer; on a GPU in one operator where that saves a reading of the output.

    Args:
        input: (batch, in), any float dtype.
        weight: (out, in), as for `masked_linear`.
        mask: (out, in) bool, True where kept, or a `BitMask`.
        teacher: (batch, out), any float dtype. Gets a gradient if it asks.
        bias: (out,) or None.
        gradient: "masked" or "dense", as for `masked_linear`.
        return_output: also return the output of the linear map; a gradient may come through both results.
        sample_weight: (batch,), weights of the rows or a bool mask. Rows without a positive weight are left out of the
            loss, not out of the product: where they may hold NaN, so does the gradient of the weight.
        process_group: compute the loss over the rows of all ranks. None means local rows only.
        options: `off_diagonal_weight`, `center`, `target`, `eps` and `form`, as for `cross_correlation_loss`.

    Returns:
        The loss, a scalar in float32 (float64 if an input is), also under autocast; or (loss, output), with
        the output (batch, out) in the dtype that `F.linear` would return.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, fewer than 2 rows to centre, or a number out of its range.
        TypeError: a tensor is not floating-point, the mask is neither bool nor `BitMask`, or an unknown option.
        RuntimeError: on double backward.

    Example:
        >>> input = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> weight = torch.nn.Parameter(torch.tensor([[1.0, 9.0], [0.0, 1.0]]))
        >>> mask = torch.tensor([[True, False], [True, True]])  # without the 9 both features are the teacher's
        >>> loss, output = masked_linear_cross_correlation_loss(input, weight, mask, input, return_output=True)
        >>> round(loss.item(), 4), torch.equal(output, input)
        (0.0, True)
    """
    _check_tensors(input, weight, teacher)
    chosen = _options(input, weight, teacher, bias, options)
    if process_group is None and _fuses(input, weight, mask, teacher, chosen):
        check_sample_weight(sample_weight, teacher.shape[:1], teacher)
        check_weight_values(sample_weight, rows=1 + chosen.center)
        dtype = check_arguments(input, weight, mask, bias, None, gradient)
        loss, output, *_ = loss_and_output(
            input=input,
            weight=weight,
            bias=bias,
            teacher=teacher,
            sample_weight=sample_weight,
            **mask_arguments(mask, "triton", input),
            dense_gradient=gradient == "dense",
            dtype=dtype,
            off_diagonal_weight=chosen.weight,
            center=chosen.center,
            residual=chosen.residual,
            eps=chosen.eps,
            form=chosen.form,
            output_gradient=chosen.student_gradient,
            teacher_gradient=chosen.teacher_gradient,
        )
    else:
        output = masked_linear(input, weight, mask, bias, gradient=gradient)
        loss = cross_correlation_loss(
            output, teacher, sample_weight=sample_weight, process_group=process_group, **options
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


def _options(input: Tensor, weight: Tensor, teacher: Tensor, bias: Tensor | None, options: LossOptions) -> Options:
    """The options, and which gradients of the loss they ask for if it is made with the output."""
    grad = torch.is_grad_enabled()
    return decided_options(
        checked_options(**options),
        *teacher.shape,
        student_gradient=grad and any(each is not None and each.requires_grad for each in (input, weight, bias)),
        teacher_gradient=grad and teacher.requires_grad,
    )


def _fuses(input: Tensor, weight: Tensor, mask: Tensor | BitMask, teacher: Tensor, options: Options) -> bool:
    """Whether a Triton product makes the output, and the loss takes sums over its columns."""
    batch = len(teacher)
    if choose_backend("masked_linear_cross_correlation_loss", (input, weight, teacher), OFFERS) != "triton":
        return False
    if batch < 1 + options.center or 0 in weight.shape or holds_columns(batch, options.form):
        return False
    return has_kernel(mask_arguments(mask, "triton", input)["lists"], batch)
