"""The product with int8 blocks as an operator; it is defined in reference.py."""

from typing import Any

import torch
from torch import Tensor

from sdp_kernels import cpu_engine
from sdp_kernels.block_sparse_linear.matrix import BlockLists, BlockSparseMatrix
from sdp_kernels.block_sparse_linear.reference import ACTIVATIONS, quantize_tokens
from sdp_kernels.cpu_engine import availability
from sdp_kernels.cpu_engine.gathered import rows_product
from sdp_kernels.dispatch import is_watched, needs_gradient
from sdp_kernels.masks import Walk


def int8_linear(input: Tensor, weight: BlockSparseMatrix, bias: Tensor | None, activation: str | None) -> Tensor:
    """As `block_sparse_linear`, with checked arguments on a CPU and an int8 weight."""
    assert weight.scales is not None
    trains, rows = needs_gradient(input, bias), input.reshape(-1, weight.shape[1])
    tensors, indices = (rows, weight.values, weight.scales, bias), (weight.crow_indices, weight.col_indices)
    if trains or is_watched(input, weight.values):
        output: Tensor = _int8_linear(*tensors, *indices, None if trains else activation)
    else:
        output = _product(*tensors, Walk(*indices), activation, weight.lists)
    output = output.view(*input.shape[:-1], weight.shape[0])
    return ACTIVATIONS[activation](output) if trains else output


def _compute(
    input: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    activation: str | None,
) -> Tensor:
    """(tokens, in) -> (tokens, out), of the dtype of the input."""
    return _product(input, values, scales, bias, Walk(crow_indices, col_indices), activation)


def _product(
    input: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    walk: Walk,
    activation: str | None,
    lists: object = None,
) -> Tensor:
    if cpu_engine.is_compiled(torch.float32):
        if not cpu_engine.is_compiled(input.dtype):  # the engine multiplies it in float32; the rest is torch's
            output = _product(input.float(), values, scales, bias, walk, None, lists)
            return ACTIVATIONS[activation](output).to(input.dtype)
        return cpu_engine.compiled_product(input, values, bias, walk, scales.shape[0], activation, scales, lists)
    availability.tell_int8_is_plain()
    integers, zeros, factors = quantize_tokens(input)
    sums = rows_product((integers - zeros).double(), values.double(), walk, scales.shape[0])
    output = sums.float() * (factors * scales)
    if bias is not None:
        output += bias.float()
    return (output if activation is None else ACTIVATIONS[activation](output)).to(input.dtype)


_int8_linear = torch.library.custom_op("sdp_kernels::block_sparse_linear_int8", _compute, mutates_args=())


@_int8_linear.register_fake
def _(input: Tensor, values: Tensor, scales: Tensor, *others: Any) -> Tensor:
    return input.new_empty((input.shape[0], scales.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, values, scales, bias, crow, col, ctx.activation = inputs
    ctx.in_features, ctx.has_bias = input.shape[1], bias is not None
    ctx.save_for_backward(values, scales, crow, col)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through: the gradient of the product with the dequantized weight."""
    if ctx.activation is not None:
        raise RuntimeError("the fused activation keeps nothing for a backward; block_sparse_linear applies it apart")
    need_input, _, _, need_bias = ctx.needs_input_grad[:4]
    of_input = None
    if need_input:
        values, scales, crow, col = ctx.saved_tensors
        shape, sides = (scales.shape[0], ctx.in_features), (values.shape[1], values.shape[2])
        lists = BlockLists.none(values.device)
        weight = BlockSparseMatrix(values, crow, col, shape, sides, lists, scales).to_dense()
        of_input = (gradient.float() @ weight).to(gradient.dtype)
    return of_input, None, None, gradient.sum(0) if need_bias and ctx.has_bias else None, None, None, None


_int8_linear.register_autograd(_backward, setup_context=_setup_context)
