"""The block-sparse product on a CPU."""

from torch import Tensor

from sdp_kernels.block_sparse_linear.gathered import rows_product
from sdp_kernels.block_sparse_linear.reference import ACTIVATIONS


def product(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    neighbours: Tensor,
    positions: Tensor | None,
    out_features: int,
    activation: str | None,
) -> Tensor:
    """(tokens, in) -> (tokens, out_features), see `gathered.rows_product`; then bias and activation."""
    output = rows_product(input, values, offsets, neighbours, positions, out_features)
    if bias is not None:
        output = output + bias
    return ACTIVATIONS[activation](output).contiguous()
