"""Linear map with a masked weight: public function, checks, autograd, registration.

A weight whose zeros stand in place (`zero_`) costs nothing more than the dense product, so this op is for weights whose
pruned values must survive. What it does then depends on where the time goes (products.py): few tokens wait for memory,
and the mask is applied in registers; many tokens pay for a masked copy that lives for one cuBLAS product, because a
kernel of ours would be slower than that; and a mask of whole blocks saves work, so all three products walk along the
kept blocks as long as these are few. On a GPU their lists are padded to the full grid and read on the device: a pruning
step neither recompiles nor breaks a CUDA graph. The compiled engine of a CPU reads the words of the mask.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdp_kernels.checks import check_choice, check_floating, check_same_device, check_shape
from sdp_kernels.dispatch import OFFERS, autocast_dtype, choose_backend, is_watched, without_autocast
from sdp_kernels.masked_linear.arguments import Masking, mask_arguments
from sdp_kernels.masked_linear.products import gated_gradient, input_gradient, output_of, weight_gradient
from sdp_kernels.masks import BitMask, check_mask


def masked_linear(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | BitMask,
    bias: Tensor | None = None,
    *,
    gradient: Literal["masked", "dense"] = "masked",
    block_gate: Tensor | None = None,
) -> Tensor:
    """`input` times the transposed weight, its pruned entries taken as 0, plus the bias.

    That is `F.linear(input, torch.where(mask, weight, 0), bias)`, but nothing of the weight's size is kept for
    backward besides the weight itself. Pruned values survive in `weight` and may even be NaN. Where they need not
    survive, `zero_` and a plain `F.linear` are cheaper.

    With a `BitMask` of blocks, all three products visit the kept blocks only: on a GPU blocks whose sides are 16, 32,
    64 or 128, unless the mask is `mostly_kept` and there are more than 256 tokens; on a CPU blocks that are at least 16
    high, however narrow they are, up to a density of 0.5 in float32 by a compiled engine (with numba, the extra `cpu`),
    and otherwise blocks whose sides are at least 16, up to 0.3 in float32 and float64. Any other mask is applied to the
    weight in registers on a GPU with up to 256 tokens, and otherwise to a copy that lives for one dense product and is
    made again in backward, where the result is that of `F.linear` bit for bit; on a CPU a mask that keeps everything
    needs no copy.

    Args:
        input: (..., in), any float dtype.
        weight: (out, in), the dtype of the input unless autocast converts both, as for `F.linear`.
        mask: (out, in) bool, True where kept, or a `BitMask`.
        bias: (out,) or None.
        gradient: "masked" gives pruned weights no gradient; "dense" gives them the gradient that they
            would have if they were kept (straight-through), as movement pruning needs.
        block_gate: (out / block rows, in / block columns), a stand-in for a factor of 1 on every block.
            Its values are not read; its gradient is the sum over the block of gradient * weight, pruned
            blocks included: a score for each block that needs no dense gradient to be kept.

    Returns:
        (..., out), the dtype that `F.linear` would return, also under autocast.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an unknown `gradient`.
        TypeError: a tensor is not floating-point, or the mask is neither bool nor `BitMask`.

    Example:
        >>> weight = torch.tensor([[2.0, float("nan")], [3.0, 4.0]])
        >>> mask = torch.tensor([[True, False], [True, True]])
        >>> masked_linear(torch.ones(1, 2), weight, mask)
        tensor([[2., 7.]])
    """
    autocast = check_arguments(input, weight, mask, bias, block_gate, gradient)
    backend = choose_backend("masked_linear", (input, weight), OFFERS)
    parts = mask_arguments(mask, backend, input)
    direct = backend == "cpu" and not is_watched(input, weight, parts["mask"])
    run: Callable[..., Tensor] = _Direct.apply if direct else _masked_linear
    sides = parts["block_rows"], parts["block_columns"]
    tensors = input, weight, parts["mask"], bias, block_gate, parts["lists"]
    return run(*tensors, *sides, gradient == "dense", autocast, backend)


def check_arguments(
    input: Tensor, weight: Tensor, mask: Tensor | BitMask, bias: Tensor | None, block_gate: Tensor | None, gradient: str
) -> torch.dtype | None:
    """Raise what `masked_linear` raises; the dtype that autocast converts to, or None where it does not."""
    check_choice("gradient", gradient, ("masked", "dense"))
    _check_tensors(input, weight, bias, block_gate)
    check_mask("mask", mask, weight)
    autocast = autocast_dtype(input)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if autocast is None and tensor is not None and tensor.dtype != input.dtype:
            raise ValueError(f"{name} must have the dtype of input, {input.dtype}, got {tensor.dtype}")
    return autocast


def _check_tensors(input: Tensor, weight: Tensor, bias: Tensor | None, block_gate: Tensor | None) -> None:
    check_floating("input", input)
    check_floating("weight", weight)
    check_same_device("weight", weight, "input", input)
    if weight.dim() != 2 or input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight must be (out, in) for an input (..., in), "
            f"got weight {tuple(weight.shape)} and input {tuple(input.shape)}"
        )
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, weight.shape[:1])
        check_same_device("bias", bias, "input", input)
    if block_gate is not None:
        check_floating("block_gate", block_gate)
        check_same_device("block_gate", block_gate, "input", input)
        if block_gate.dim() != 2 or 0 in block_gate.shape:
            raise ValueError(f"block_gate must be a matrix, got shape {tuple(block_gate.shape)}")
        if weight.shape[0] % block_gate.shape[0] or weight.shape[1] % block_gate.shape[1]:
            raise ValueError(
                f"block_gate of shape {tuple(block_gate.shape)} must divide the weight's shape {tuple(weight.shape)}"
            )


def _product(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    block_gate: Tensor | None,
    lists: Sequence[Tensor],
    block_rows: int,
    block_columns: int,
    dense_gradient: bool,
    dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    """The gate is here for the backward, as is `dense_gradient`."""
    dtype = dtype or input.dtype
    masking = Masking(mask, lists, (block_rows, block_columns), backend)
    with without_autocast(input):
        return output_of(input.to(dtype), weight, None if bias is None else bias.to(dtype), masking)


_masked_linear = torch.library.custom_op("sdp_kernels::masked_linear", _product, mutates_args=())


@_masked_linear.register_fake
def _(input: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=others[-2])


def _gradients(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    lists: Sequence[Tensor],
    block_rows: int,
    block_columns: int,
    gate_rows: int,
    gate_columns: int,
    dense_gradient: bool,
    need_input: bool,
    need_weight: bool,
    need_gate: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and gate, in their dtypes; empty where not needed."""
    of_input, of_weight, of_gate = input.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    masking = Masking(mask, lists, (block_rows, block_columns), backend)
    with without_autocast(input):
        rows = gradient.reshape(-1, gradient.shape[-1])
        if need_input:
            of_input = input_gradient(rows, weight, masking).view(input.shape).to(input.dtype)
        if need_weight or need_gate:
            columns = input.reshape(-1, input.shape[-1]).to(gradient.dtype)
            if need_gate:
                gate_shape = (gate_rows, gate_columns)
                of_weight, of_gate = gated_gradient(rows, columns, weight, masking, gate_shape, dense_gradient)
            else:
                of_weight = weight_gradient(rows, columns, weight, masking, dense_gradient)
            if not need_weight:
                of_weight = weight.new_empty(0)
    return of_input, of_weight, of_gate.to(weight.dtype)


masked_linear_backward = torch.library.custom_op("sdp_kernels::masked_linear_backward", _gradients, mutates_args=())


@masked_linear_backward.register_fake
def _(gradient: Tensor, input: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    gate_rows, gate_columns, _, need_input, need_weight, need_gate, _ = others[-7:]
    grid = (weight.shape[0] // gate_rows, weight.shape[1] // gate_columns)
    return (
        input.new_empty(input.shape if need_input else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(grid if need_gate else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, mask, bias, block_gate, lists, *ctx.sides, ctx.dense_gradient, _, ctx.backend = inputs
    ctx.save_for_backward(input, weight, mask, *lists)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.gate = None if block_gate is None else (block_gate.shape, block_gate.dtype)


def _backward(ctx: Any, gradient: Tensor, make: Callable[..., Any] = masked_linear_backward) -> tuple[Any, ...]:
    input, weight, mask, *lists = ctx.saved_tensors
    need_input, need_weight, _, need_bias, need_gate = ctx.needs_input_grad[:5]
    grid, gate_dtype = ctx.gate or ((1, 1), weight.dtype)
    of_input, of_weight, of_gate = make(
        gradient=gradient,
        input=input,
        weight=weight,
        mask=mask,
        lists=lists,
        block_rows=ctx.sides[0],
        block_columns=ctx.sides[1],
        gate_rows=weight.shape[0] // grid[0],
        gate_columns=weight.shape[1] // grid[1],
        dense_gradient=ctx.dense_gradient,
        need_input=need_input,
        need_weight=need_weight,
        need_gate=need_gate,
        backend=ctx.backend,
    )
    of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if need_bias else None
    return (
        of_input if need_input else None,
        of_weight if need_weight else None,
        None,
        of_bias.to(ctx.bias_dtype) if of_bias is not None else None,
        of_gate.to(gate_dtype) if need_gate else None,
        [None] * len(lists),
        *[None] * 5,
    )


_masked_linear.register_autograd(_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The operator without the way through torch's dispatcher, which takes as long as a small product."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # a setup_context of its own would cost the binding of all arguments
        output = _product(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, gradient, _gradients)[:5], *[None] * 6
