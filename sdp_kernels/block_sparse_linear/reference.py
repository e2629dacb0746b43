"""The block-sparse linear map as it is defined; its gradients are those of autograd.

With int8 values the input becomes integers too, token by token, and the sums are exact:

    output = (sum over inputs of (integer - zero) * value) * (scale of the token * scale of the output row) + bias
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sdp_kernels.block_sparse_linear.matrix import BlockSparseMatrix, join_blocks

SMALLEST_SPAN = 2.0**-100  # of a token: what is smaller counts as this, so that its inverse is finite

ACTIVATIONS: Mapping[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda output: output,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda output: F.gelu(output, approximate="tanh"),
    "silu": F.silu,
}


def block_sparse_linear_reference(
    input: Tensor, weight: BlockSparseMatrix, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """F.linear with the dense weight, zero where no block is kept; see `block_sparse_linear`."""
    if weight.scales is not None:
        return ACTIVATIONS[activation](_int8_linear(input, weight, bias))
    return ACTIVATIONS[activation](torch.nn.functional.linear(input, weight.to_dense(), bias))


def quantize_tokens(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each token in 8 bits, asymmetric: input = (integers - zeros) * scales, up to rounding, with 0 itself exact.

    scale = (largest - least) / 255, where both are at least as far out as 0; integers = round(input / scale) + zero,
    halves to even, within 0 and 255; zero = round(-least / scale). A token with a value that is not finite, or whose
    span is not, has the scale NaN.

    Args:
        input: (..., in), any float dtype; computed in float32.

    Returns:
        (..., in) integers, (..., 1) zeros, both as float32, and (..., 1) float32 scales.
    """
    input = input.detach().float()
    least, largest = input.amin(-1, keepdim=True).clamp_max(0), input.amax(-1, keepdim=True).clamp_min(0)
    span = (largest - least).clamp_min(SMALLEST_SPAN)
    inverse = 255 / span
    zeros = (-least * inverse).round()
    integers = ((input * inverse).round() + zeros).clamp(0, 255)
    finite = span.isfinite()
    return integers.where(finite, 0), zeros.where(finite, 0), (span / 255).where(finite, torch.nan)


def _int8_linear(input: Tensor, weight: BlockSparseMatrix, bias: Tensor | None) -> Tensor:
    """Exact sums, in float64; straight through for the gradient of the input, as if nothing were rounded."""
    assert weight.scales is not None
    integers, zeros, scales = quantize_tokens(input)
    sums = F.linear((integers - zeros).double(), join_blocks(weight, weight.values.double()))
    output = sums.float() * (scales * weight.scales)
    if bias is not None:
        output = output + bias.float()
    if torch.is_grad_enabled() and input.requires_grad:
        through = F.linear(input.float(), weight.to_dense())
        output = output + (through - through.detach())
    return output.to(input.dtype)
