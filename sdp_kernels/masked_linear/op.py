"""Linear map with a masked weight: public function, checks, autograd, registration."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sdp_kernels.checks import check_choice, check_floating, check_same_device, check_shape
from sdp_kernels.dispatch import choose_backend
from sdp_kernels.masked_linear.bitmask import BitMask, block_grid, unpack_bits
from sdp_kernels.masked_linear.masking import masked

OFFERS = ("reference",)


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

    Bit for bit `F.linear(input, torch.where(mask, weight, 0), bias)`, but nothing of the weight's size is
    kept for backward besides the weight itself. Pruned values survive in `weight` and may even be NaN. Where
    they need not survive, `zero_` and a plain `F.linear` are cheaper.

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
        ValueError: shapes or devices do not fit, or an unknown `gradient`.
        TypeError: a tensor is not floating-point, or the mask is neither bool nor `BitMask`.
    """
    check_choice("gradient", gradient, ("masked", "dense"))
    _check_tensors(input, weight, bias, block_gate)
    check_mask("mask", mask, weight)
    choose_backend("masked_linear", (input, weight), OFFERS)
    device = input.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if autocast is not None and input.dtype == torch.float64:
        autocast = None
    keep = mask.words if isinstance(mask, BitMask) else mask
    output: Tensor = _masked_linear(input, weight, keep, bias, block_gate, gradient == "dense", autocast)
    return output


def check_mask(name: str, mask: Tensor | BitMask, weight: Tensor) -> None:
    """A mask for this weight: of its shape, on its device, bool or packed."""
    tensor = mask.words if isinstance(mask, BitMask) else mask
    if not isinstance(tensor, Tensor) or (tensor is mask and tensor.dtype != torch.bool):
        raise TypeError(f"{name} must be a bool tensor or a BitMask, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if tuple(mask.shape) != tuple(weight.shape):
        raise ValueError(f"{name} must have shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
    check_same_device(name, tensor, "its weight", weight)


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
    if block_gate is not None:
        check_floating("block_gate", block_gate)
        if block_gate.dim() != 2 or 0 in block_gate.shape:
            raise ValueError(f"block_gate must be a matrix, got shape {tuple(block_gate.shape)}")
        if weight.shape[0] % block_gate.shape[0] or weight.shape[1] % block_gate.shape[1]:
            raise ValueError(
                f"block_gate of shape {tuple(block_gate.shape)} must divide the weight's shape {tuple(weight.shape)}"
            )


def _masked(weight: Tensor, mask: Tensor) -> Tensor:
    """A copy of the weight with zeros where pruned; `mask` is bool, or the int32 words of a BitMask."""
    keep = mask if mask.dtype == torch.bool else unpack_bits(mask, weight.shape[1])
    return masked(weight, keep)


@torch.library.custom_op("sdp_kernels::masked_linear", mutates_args=())
def _masked_linear(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    block_gate: Tensor | None,
    dense_gradient: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    used = _masked(weight, mask)
    with torch.autocast(input.device.type, enabled=False):
        if dtype is None:
            return F.linear(input, used, bias)
        return F.linear(input.to(dtype), used.to(dtype), None if bias is None else bias.to(dtype))


@_masked_linear.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    block_gate: Tensor | None,
    dense_gradient: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=dtype)


@torch.library.custom_op("sdp_kernels::masked_linear_backward", mutates_args=())
def _masked_linear_backward(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    block_rows: int,
    block_columns: int,
    dense_gradient: bool,
    need_input: bool,
    need_weight: bool,
    need_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and gate, in their dtypes; empty where not needed."""
    input_gradient, weight_gradient = input.new_empty(0), weight.new_empty(0)
    gate_gradient = weight.new_empty(0)
    with torch.autocast(input.device.type, enabled=False):
        if need_input:
            input_gradient = (gradient @ _masked(weight, mask).to(gradient.dtype)).to(input.dtype)
        if need_weight or need_gate:
            rows = input.reshape(-1, input.shape[-1]).to(gradient.dtype)
            dense = (gradient.reshape(-1, gradient.shape[-1]).T @ rows).to(weight.dtype)
            if need_gate:
                grid = block_grid(dense.shape, (block_rows, block_columns))
                blocks = (dense * weight).view(grid[0], block_rows, grid[1], block_columns)
                gate_gradient = blocks.sum((1, 3))
            if need_weight:
                weight_gradient = dense if dense_gradient else _masked(dense, mask)
    return input_gradient, weight_gradient, gate_gradient


@_masked_linear_backward.register_fake
def _(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    block_rows: int,
    block_columns: int,
    dense_gradient: bool,
    need_input: bool,
    need_weight: bool,
    need_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grid = (weight.shape[0] // block_rows, weight.shape[1] // block_columns)
    return (
        input.new_empty(input.shape if need_input else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(grid if need_gate else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, mask, bias, block_gate, ctx.dense_gradient, _ = inputs
    ctx.save_for_backward(input, weight, mask)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.gate = None if block_gate is None else (block_gate.shape, block_gate.dtype)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, mask = ctx.saved_tensors
    need_input, need_weight, _, need_bias, need_gate = ctx.needs_input_grad[:5]
    grid, gate_dtype = ctx.gate or ((1, 1), weight.dtype)
    input_gradient, weight_gradient, gate_gradient = _masked_linear_backward(
        gradient,
        input,
        weight,
        mask,
        weight.shape[0] // grid[0],
        weight.shape[1] // grid[1],
        ctx.dense_gradient,
        need_input,
        need_weight,
        need_gate,
    )
    bias_gradient = gradient.reshape(-1, gradient.shape[-1]).sum(0) if need_bias else None
    return (
        input_gradient if need_input else None,
        weight_gradient if need_weight else None,
        None,
        bias_gradient.to(ctx.bias_dtype) if bias_gradient is not None else None,
        gate_gradient.to(gate_dtype) if need_gate else None,
        None,
        None,
    )


_masked_linear.register_autograd(_backward, setup_context=_setup_context)
