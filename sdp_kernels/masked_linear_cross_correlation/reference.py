"""The cross-correlation loss of a masked linear map as it is defined; its gradients are those of autograd."""

from typing import Any, Literal

from torch import Tensor

from sdp_kernels.cross_correlation import cross_correlation_loss_reference
from sdp_kernels.masked_linear import masked_linear_reference
from sdp_kernels.masks import BitMask


def masked_linear_cross_correlation_loss_reference(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | BitMask,
    teacher: Tensor,
    bias: Tensor | None = None,
    *,
    gradient: Literal["masked", "dense"] = "masked",
    **options: Any,
) -> Tensor:
    """The two definitions one after the other; see `masked_linear_cross_correlation_loss`."""
    output = masked_linear_reference(input, weight, mask, bias, gradient=gradient)
    return cross_correlation_loss_reference(output, teacher, **options)
