"""The block-sparse linear map as it is defined; its gradients are those of autograd."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sdp_kernels.block_sparse_linear.matrix import BlockSparseMatrix

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
    return ACTIVATIONS[activation](torch.nn.functional.linear(input, weight.to_dense(), bias))
