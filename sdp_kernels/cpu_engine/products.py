"""The block-sparse product on a CPU: by the compiled engine if numba is installed, otherwise in plain torch."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sdp_kernels.cpu_engine.availability import is_compiled
from sdp_kernels.cpu_engine.gathered import rows_product
from sdp_kernels.masks import Walk

CHUNK_ELEMENTS = 2**19  # of the output, converted at a time: it stays in the cache

ACTIVATE_: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": functools.partial(torch.ops.aten.gelu_, approximate="tanh"),
    "silu": torch.ops.aten.silu_,
}


def product(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    walk: Walk,
    out_features: int,
    activation: str | None,
    lists: object = None,
) -> Tensor:
    """The input times the transposed matrix of blocks, plus the bias, activated.

    Args:
        input: (tokens, in).
        values: (blocks, out side, in side); a transposed view for the transposed matrix.
        bias: (out_features,) or None.
        walk: where the blocks stand.
        out_features: columns of the result; fewer than the rows of blocks hold if these are padded.
        activation: key of `ACTIVATE_`, or None.
        lists: see `packing.pack_once`; None: the blocks are packed for this product alone.

    Returns:
        (tokens, out_features), of the dtype of the input.
    """
    if is_compiled(input.dtype):
        return compiled_product(input, values, bias, walk, out_features, activation, lists=lists)
    output = rows_product(input, values, walk, out_features).contiguous()
    if bias is not None:
        output += bias
    return output if activation is None else ACTIVATE_[activation](output)


def compiled_product(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    walk: Walk,
    out_features: int,
    activation: str | None,
    scales: Tensor | None = None,
    lists: object = None,
) -> Tensor:
    """`product` by the compiled engine; with `scales`, (out_features,) float32, of int8 values.

    These are multiplied as the reference of the op defines it, integer by integer.
    """
    engine, packing, register_tile = _compiled_modules()
    pairs = input.dtype == values.dtype == torch.bfloat16 and register_tile.HAS_BFLOAT16
    if scales is None and not pairs:
        values = values.float()
    threads = torch.get_num_threads()
    matrix = values.detach(), walk, input.shape[1], threads
    packed = packing.pack(*matrix) if lists is None else packing.pack_once(*matrix, lists)
    rows = [engine.NOTHING if row is None else row.detach().float().contiguous().numpy() for row in (bias, scales)]

    input = input.detach()
    output = input.new_empty(input.shape[0], out_features)
    for part, result in _in_parts(input, output, together=input.dtype == torch.float32):
        wide = result if result.dtype == torch.float32 else torch.empty_like(result, dtype=torch.float32)
        words = pairs_of(part) if pairs else part.float().contiguous()
        engine.multiply(packed, words.numpy(), *rows, wide.numpy(), threads, activation)
        if wide is not result:
            result.copy_(wide)
    return output


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Scaled dot-product attention by the compiled engine, see blocked_attention.py."""
    return _compiled_attention()(query, key, value, mask, scale)


@functools.cache
def _compiled_attention() -> Callable[..., Tensor]:
    from sdp_kernels.cpu_engine.blocked_attention import attention

    return attention


@functools.cache
def _compiled_modules() -> tuple[Any, Any, Any]:
    """They need numba, and importing them takes a while."""
    from sdp_kernels.cpu_engine import engine, packing, register_tile

    return engine, packing, register_tile


def _in_parts(input: Tensor, output: Tensor, *, together: bool) -> Iterable[tuple[Tensor, Tensor]]:
    """Tokens of both, in parts whose output stays in the cache until it is converted."""
    if together or output.numel() <= CHUNK_ELEMENTS:
        return ((input, output),)
    tokens = max(1, CHUNK_ELEMENTS // output.shape[1])
    return zip(torch.split(input, tokens), torch.split(output, tokens), strict=True)


def pairs_of(input: Tensor) -> Tensor:
    """(tokens, in) bfloat16 as (tokens, ceil(in / 2)) words that hold two, carried as float32."""
    padded = torch.nn.functional.pad(input, (0, 1)) if input.shape[1] % 2 else input.contiguous()
    return padded.view(torch.float32)
