"""Block-sparse linear map: public function, checks, autograd, registration.

A product walks along the kept blocks of each row of blocks. On a GPU the column of the next step is loaded one step
ahead, because a load whose address waits for another load cannot be pipelined; rows are taken the fullest first, so
that no long one is left at the end; and with few tokens several programs share a row, whose sums are added in a fixed
order. On a CPU a tile of the output stays in registers while all blocks of a row pass by. Where so many blocks are kept
that a dense product is estimated to be faster (break_even.py), a dense weight is made for it and thrown away: to keep
it would double the memory of a layer whose point is to be small.
"""

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from sdp_kernels import cpu_engine
from sdp_kernels.block_sparse_linear.break_even import edge_passed
from sdp_kernels.block_sparse_linear.int8 import int8_linear
from sdp_kernels.block_sparse_linear.matrix import BlockSparseMatrix
from sdp_kernels.block_sparse_linear.reference import ACTIVATIONS, block_sparse_linear_reference
from sdp_kernels.checks import check_choice, check_floating, check_same_device, check_shape
from sdp_kernels.dispatch import (
    OFFERS,
    autocast_dtype,
    choose_backend,
    is_watched,
    needs_gradient,
    without_autocast,
)
from sdp_kernels.masks import Walk
from sdp_kernels.tiles.launch import KERNEL_SIDES


def block_sparse_linear(
    input: Tensor,
    weight: BlockSparseMatrix,
    bias: Tensor | None = None,
    *,
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] | None = None,
    path: Literal["auto", "sparse", "dense"] = "auto",
) -> Tensor:
    """`activation(input @ weight.T + bias)`, with work only for the kept blocks of the weight.

    The result is that of `F.linear` with `weight.to_dense()`, up to rounding. Gradients go to the input, the
    values of the weight and the bias. On a CPU the compiled engine needs numba (the extra `cpu`); without it
    the products are dense ones in torch, one for each row of blocks.

    With an int8 weight each token of the input is quantized to 8 bits, asymmetric (`quantize_tokens` in reference.py,
    where the product is defined); sums are exact integers of 32 bits, the same on every CPU, and scaled back in
    float32. The gradient of the input is that of the product with the dequantized weight, as if nothing were rounded;
    the values get none. A token with values that are not finite becomes NaN.

    Where so many blocks are kept that a dense product is estimated to be faster (`reasons_for_dense` in
    break_even.py says when and why), a dense weight is made from the blocks, multiplied with and thrown away.

    Args:
        input: (..., in), float32, float16, bfloat16 or float64, with any number of tokens, also none.
        weight: (out, in), with values of the input's dtype unless autocast converts both, as for `F.linear`; or
            int8 (`BlockSparseMatrix.quantize`).
        bias: (out,) of the same dtype, or None.
        activation: applied to the result; "gelu" is the exact one (`F.gelu`), "gelu_tanh" its tanh approximation
            (https://arxiv.org/abs/1606.08415), "silu" is x * sigmoid(x).
        path: "sparse" or "dense" whatever the estimate says, which "auto" follows. The backend "reference" is dense.

    Returns:
        (..., out), contiguous, the dtype that `F.linear` would return, also under autocast.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an unknown activation or path.
        TypeError: the weight is no `BlockSparseMatrix`, or a tensor is not floating-point.
        RuntimeError: on double backward of the sparse path, unless on the backend "reference".

    Example:
        >>> dense = torch.block_diag(torch.ones(16, 16), torch.ones(16, 16))
        >>> weight = BlockSparseMatrix.from_dense(dense, (16, 16))
        >>> output = block_sparse_linear(torch.ones(3, 32), weight, activation="relu")
        >>> output.shape, output.unique().item(), weight.density
        (torch.Size([3, 32]), 16.0, 0.5)
    """
    check_choice("activation", activation, tuple(ACTIVATIONS))
    check_choice("path", path, ("auto", "sparse", "dense"))
    _check_tensors(input, weight, bias)
    input, values, bias = _in_one_dtype(input, weight, bias)
    backend = choose_backend("block_sparse_linear", (input, values), OFFERS, _against_triton(weight))
    tokens = math.prod(input.shape[:-1])
    if (
        backend == "reference"
        or path == "dense"
        or (path == "auto" and edge_passed(weight, tokens, input.dtype, backend) is not None)
    ):
        matrix = replace(weight, values=values)
        with without_autocast(input):
            return block_sparse_linear_reference(input, matrix, bias, activation=activation)
    if weight.scales is not None:
        return int8_linear(input, weight, bias, activation)
    return _sparse_product(input, values, bias, weight, activation, backend)


def _sparse_product(
    input: Tensor, values: Tensor, bias: Tensor | None, weight: BlockSparseMatrix, activation: str | None, backend: str
) -> Tensor:
    """By the operator, or by its function where nothing watches; `values` take the place of those of the weight."""
    # The backward of an activation needs what came into it, which a fused one does not keep.
    trains = needs_gradient(input, values, bias)
    lists, rows = weight.lists, input.reshape(-1, weight.shape[1])
    if backend == "cpu" and not trains and not is_watched(input, values):
        walk = Walk(weight.crow_indices, weight.col_indices)
        output = cpu_engine.product(rows, values, bias, walk, weight.shape[0], activation, lists)
        return output.view(*input.shape[:-1], weight.shape[0])
    output = (_block_sparse_linear if trains or is_watched(input, values) else _compute)(
        rows,
        values,
        bias,
        crow_indices=weight.crow_indices,
        col_indices=weight.col_indices,
        block_rows=lists.block_rows,
        row_order=lists.row_order,
        ccol_indices=lists.ccol_indices,
        row_indices=lists.row_indices,
        positions=lists.positions,
        column_order=lists.column_order,
        out_features=weight.shape[0],
        activation=None if trains else activation,
        backend=backend,
    )
    output = output.view(*input.shape[:-1], weight.shape[0])
    return ACTIVATIONS[activation](output) if trains else output


def _in_one_dtype(
    input: Tensor, weight: BlockSparseMatrix, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, values and bias, converted as autocast says, or as they are if they agree; int8 values always are."""
    dtype, values = autocast_dtype(input), weight.values
    if dtype is not None:
        input, values = input.to(dtype), values if weight.scales is not None else values.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, tensor in (("weight", values), ("bias", bias)):
        if tensor is not None and tensor.dtype not in (input.dtype, torch.int8):
            raise ValueError(f"{name} must have the dtype of input, {input.dtype}, got {tensor.dtype}")
    return input, values, bias


def _against_triton(weight: BlockSparseMatrix) -> list[str]:
    if weight.scales is not None:
        return ["the values are int8"]
    sides = weight.block_shape
    return [f"a block side of {side} is none of {KERNEL_SIDES}" for side in sides if side not in KERNEL_SIDES]


def _check_tensors(input: Tensor, weight: BlockSparseMatrix, bias: Tensor | None) -> None:
    check_floating("input", input)
    if not isinstance(weight, BlockSparseMatrix):
        raise TypeError(f"weight must be a BlockSparseMatrix, got {type(weight).__name__}")
    if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input must have shape (..., {weight.shape[1]}), got {tuple(input.shape)}")
    check_same_device("weight", weight.values, "input", input)
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, (weight.shape[0],))
        check_same_device("bias", bias, "input", input)


def _compute(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    block_rows: Tensor,
    row_order: Tensor,
    ccol_indices: Tensor,
    row_indices: Tensor,
    positions: Tensor,
    column_order: Tensor,
    out_features: int,
    activation: str | None,
    backend: str,
) -> Tensor:
    """(tokens, in) -> (tokens, out). The lists of the block columns are here for the backward."""
    return _product(input, values, bias, Walk(crow_indices, col_indices), row_order, out_features, activation, backend)


def _product(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    walk: Walk,
    order: Tensor,
    out_features: int,
    activation: str | None,
    backend: str,
) -> Tensor:
    if backend == "triton":
        from sdp_kernels.block_sparse_linear.kernel import product

        return product(input, values, bias, walk, order, out_features, activation)
    return cpu_engine.product(input, values, bias, walk, out_features, activation)


_block_sparse_linear = torch.library.custom_op("sdp_kernels::block_sparse_linear", _compute, mutates_args=())


@_block_sparse_linear.register_fake
def _(input: Tensor, values: Tensor, *others: Any) -> Tensor:
    return input.new_empty((input.shape[0], others[-3]))


@torch.library.custom_op("sdp_kernels::block_sparse_linear_backward", mutates_args=())
def _block_sparse_linear_backward(
    gradient: Tensor,
    input: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    block_rows: Tensor,
    ccol_indices: Tensor,
    row_indices: Tensor,
    positions: Tensor,
    column_order: Tensor,
    need_input: bool,
    need_values: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of input and values, in their dtype; empty where not needed."""
    of_input, of_values = input.new_empty(0), values.new_empty(0)
    if need_input:
        across, walk = values.transpose(1, 2), Walk(ccol_indices, row_indices, positions)
        of_input = _product(gradient, across, None, walk, column_order, input.shape[1], None, backend)
    if need_values:
        block_shape = (values.shape[1], values.shape[2])
        if backend == "triton":
            from sdp_kernels.block_sparse_linear.kernel import values_gradient

            of_values = values_gradient(gradient, input, block_rows, col_indices, block_shape)
        else:
            of_values = cpu_engine.values_product(gradient, input, crow_indices, col_indices, block_shape)
    return of_input, of_values


@_block_sparse_linear_backward.register_fake
def _(gradient: Tensor, input: Tensor, values: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    need_input, need_values = others[-3:-1]
    return (
        input.new_empty(input.shape if need_input else (0,)),
        values.new_empty(values.shape if need_values else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, values, bias, crow, col, block_rows, _, ccol, row, positions, order, _, ctx.activation, ctx.backend = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, values, crow, col, block_rows, ccol, row, positions, order)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.activation is not None:
        raise RuntimeError("the fused activation keeps nothing for a backward; block_sparse_linear applies it apart")
    need_input, need_values, need_bias = ctx.needs_input_grad[:3]
    input_gradient, values_gradient = _block_sparse_linear_backward(
        gradient, *ctx.saved_tensors, need_input, need_values, ctx.backend
    )
    return (
        input_gradient if need_input else None,
        values_gradient if need_values else None,
        gradient.sum(0) if need_bias and ctx.has_bias else None,
        *[None] * 11,
    )


_block_sparse_linear.register_autograd(_backward, setup_context=_setup_context)
