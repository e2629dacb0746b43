"""The block-sparse product on a CPU: by the compiled engine if numba is installed, otherwise in plain torch."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sdp_kernels.cpu_engine.availability import is_compiled
from sdp_kernels.cpu_engine.gathered import rows_product
from sdp_kernels.masks import Walk

CHUNK_ELEMENTS = 2**19  # of the output, converted or activated at a time: it stays in the cache

ACTIVATE_: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": functools.partial(torch.ops.aten.gelu_, approximate="tanh"),
    "silu": torch.ops.aten.silu_,
}


def product(
    input: Tensor, values: Tensor, bias: Tensor | None, walk: Walk, out_features: int, activation: str | None
) -> Tensor:
    """The input times the transposed matrix of blocks, plus the bias, activated.

    Args:
        input: (tokens, in).
        values: (blocks, out side, in side); a transposed view for the transposed matrix.
        bias: (out_features,) or None.
        walk: where the blocks stand.
        out_features: columns of the result; fewer than the rows of blocks hold if these are padded.
        activation: key of `ACTIVATE_`, or None.

    Returns:
        (tokens, out_features), of the dtype of the input.
    """
    if is_compiled(input.dtype):
        return _compiled_product(input, values, bias, walk, out_features, activation)
    output = rows_product(input, values, walk, out_features).contiguous()
    if bias is not None:
        output += bias
    return output if activation is None else ACTIVATE_[activation](output)


def _compiled_product(
    input: Tensor, values: Tensor, bias: Tensor | None, walk: Walk, out_features: int, activation: str | None
) -> Tensor:
    from sdp_kernels.cpu_engine.engine import Engine

    transposed = not values.is_contiguous() and values.transpose(1, 2).is_contiguous()
    stored = values.transpose(1, 2) if transposed else values
    engine = Engine(
        stored.detach().float().contiguous().numpy(),
        walk.offsets.numpy(),
        walk.neighbours.numpy(),
        None if walk.positions is None else walk.positions.numpy(),
        transposed,
        torch.get_num_threads(),
    )
    bias = input.new_zeros(out_features) if bias is None else bias
    shift = bias.detach().float().contiguous().numpy()

    output = input.new_empty(input.shape[0], out_features)
    as_it_is = input.dtype == torch.float32 and activation is None
    tokens = max(1, input.shape[0]) if as_it_is else max(1, CHUNK_ELEMENTS // out_features)
    for rows, result in zip(torch.split(input.detach(), tokens), torch.split(output, tokens), strict=True):
        wide = result if result.dtype == torch.float32 else torch.empty_like(result, dtype=torch.float32)
        engine.multiply(rows.float().contiguous().numpy(), shift, wide.numpy())
        if activation is not None:
            ACTIVATE_[activation](wide)
        if wide is not result:
            result.copy_(wide)
    return output
