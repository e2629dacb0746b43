"""The cross-correlation loss of the output of a masked linear map."""

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from sdp_kernels.checks import check_dims, check_floating, check_same_device, check_shape
from sdp_kernels.cross_correlation import cross_correlation_loss
from sdp_kernels.masked_linear import BitMask, masked_linear

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
    projections and the features of a layer. It is the two operations one after the other: the sums over the columns
    are taken from the output once it is complete, not while it is being computed.

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
    check_floating("input", input)
    check_dims("input", input, 2)
    check_floating("weight", weight)
    check_dims("weight", weight, 2)
    check_floating("teacher", teacher)
    check_shape("teacher", teacher, (input.shape[0], weight.shape[0]))
    check_same_device("teacher", teacher, "input", input)
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
