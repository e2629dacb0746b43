"""Linear map with a masked weight: public function, checks, autograd, registration."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sdp_kernels.checks import check_choice, check_floating, check_same_device, check_shape
from sdp_kernels.dispatch import autocast_dtype, choose_backend, without_autocast
from sdp_kernels.masked_linear.bitmask import BitMask, block_grid, unpack_bits
from sdp_kernels.masked_linear.blocks import ActiveBlocks
from sdp_kernels.masked_linear.masking import mask_, masked

OFFERS = ("triton", "cpu", "reference")
KERNEL_SIDES = (16, 32, 64, 128)
# Up to this many tokens the weight is masked in registers, where the product waits for memory and a masked copy would
# triple what is read and written; with more, the copy costs less than a product slower than cuBLAS. By arithmetic on
# published rates the two meet somewhere between 256 and 4096 tokens.
FEW_TOKENS = 256


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

    With a `BitMask` that has lists of blocks, all three products visit the kept blocks only: on a GPU blocks whose
    sides are 16, 32, 64 or 128, unless the mask is `mostly_kept` and there are more than 256 tokens; on a CPU up to a
    density of 0.5 in float32 by a compiled engine (with numba, the extra `cpu`), and otherwise up to 0.3 in float32 and
    float64. Any other mask is applied to the weight in registers on a GPU with up to 256 tokens, and otherwise to a
    copy that lives for one dense product and is made again in backward, where the result is that of `F.linear` bit
    for bit.

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
    """
    autocast = check_arguments(input, weight, mask, bias, block_gate, gradient)
    backend = choose_backend("masked_linear", (input, weight), OFFERS)
    output: Tensor = _masked_linear(
        input,
        weight,
        words_of(mask),
        bias,
        block_gate,
        *lists_of(mask, backend, input),
        gradient == "dense",
        autocast,
        backend,
    )
    return output


def check_arguments(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | BitMask,
    bias: Tensor | None,
    block_gate: Tensor | None,
    gradient: str,
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


def words_of(mask: Tensor | BitMask) -> Tensor:
    """The mask as an operator takes it: words or bools."""
    return mask.words if isinstance(mask, BitMask) else mask


def lists_of(mask: Tensor | BitMask, backend: str, input: Tensor) -> tuple[list[Tensor], int, int]:
    """The lists of the kept blocks and the blocks' sides, as an operator takes them; empty where they are no use."""
    if backend == "reference" or not isinstance(mask, BitMask) or mask.lists is None or mask.block_shape is None:
        return [], 0, 0
    if backend == "triton":
        many = input.numel() > FEW_TOKENS * input.shape[-1]  # with few, what counts is how much of the weight is read
        if not set(mask.block_shape) <= set(KERNEL_SIDES) or (many and mask.mostly_kept):
            return [], 0, 0
    lists = mask.lists
    tensors = [lists.crow_indices, lists.col_indices, lists.ccol_indices, lists.row_indices]
    return tensors, *mask.block_shape


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


def _masked(weight: Tensor, mask: Tensor) -> Tensor:
    """A copy of the weight with zeros where pruned; `mask` is bool, or the int32 words of a BitMask."""
    keep = mask if mask.dtype == torch.bool else unpack_bits(mask, weight.shape[1])
    return masked(weight, keep)


def _masked_copy(weight: Tensor, mask: Tensor, backend: str) -> Tensor:
    if backend != "triton":
        return _masked(weight, mask)
    from sdp_kernels.masked_linear.kernel_zero import masked_copy

    return masked_copy(weight, mask)


def _walks_blocks(input: Tensor, lists: Sequence[Tensor], backend: str) -> bool:
    """Whether the products go along the lists of kept blocks."""
    if not lists:
        return False
    if backend == "triton":
        return True
    from sdp_kernels.masked_linear.cpu import worthwhile

    return worthwhile(input, ActiveBlocks(*lists))


@torch.library.custom_op("sdp_kernels::masked_linear", mutates_args=())
def _masked_linear(
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
    sides = (block_rows, block_columns)
    with without_autocast(input):
        rows = input.reshape(-1, input.shape[-1]).to(dtype)
        bias = None if bias is None else bias.to(dtype)
        if backend == "triton" and (lists or len(rows) <= FEW_TOKENS):
            output = _kernel_product(rows, weight, mask, bias, lists, sides, transposed=False)
        elif _walks_blocks(rows, lists, backend):
            from sdp_kernels.masked_linear.cpu import product

            output = product(rows, weight.to(dtype), bias, ActiveBlocks(*lists), sides)
        else:
            return F.linear(input.to(dtype), _masked_copy(weight, mask, backend).to(dtype), bias)
    return output.view(*input.shape[:-1], weight.shape[0])


def _kernel_product(
    rows: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    lists: Sequence[Tensor],
    sides: tuple[int, int],
    transposed: bool,
) -> Tensor:
    from sdp_kernels.masked_linear.kernel import blocks_product, masked_product

    if lists:
        return blocks_product(rows, weight, bias, ActiveBlocks(*lists), sides, transposed)[0]
    return masked_product(rows, weight, mask, bias, transposed)[0]


@_masked_linear.register_fake
def _(input: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=others[-2])


@torch.library.custom_op("sdp_kernels::masked_linear_backward", mutates_args=())
def _masked_linear_backward(
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
    input_gradient, weight_gradient = input.new_empty(0), weight.new_empty(0)
    gate_gradient = weight.new_empty(0)
    sides = (block_rows, block_columns)
    with without_autocast(input):
        rows = gradient.reshape(-1, gradient.shape[-1])
        if need_input:
            product = _input_gradient(rows, weight, mask, lists, sides, backend)
            input_gradient = product.view(input.shape).to(input.dtype)
        if need_weight or need_gate:
            columns = input.reshape(-1, input.shape[-1]).to(gradient.dtype)
            if need_gate:
                weight_gradient, gate_gradient = _gated_gradient(
                    rows, columns, weight, mask, (gate_rows, gate_columns), dense_gradient, backend
                )
            else:
                weight_gradient = _weight_gradient(rows, columns, weight, mask, lists, sides, dense_gradient, backend)
            if not need_weight:
                weight_gradient = weight.new_empty(0)
    return input_gradient, weight_gradient, gate_gradient.to(weight.dtype)


def _input_gradient(
    rows: Tensor, weight: Tensor, mask: Tensor, lists: Sequence[Tensor], sides: tuple[int, int], backend: str
) -> Tensor:
    if backend == "triton" and (lists or len(rows) <= FEW_TOKENS):
        return _kernel_product(rows, weight, mask, None, lists, sides, transposed=True)
    if _walks_blocks(rows, lists, backend):
        from sdp_kernels.masked_linear.cpu import input_gradient

        return input_gradient(rows, weight.to(rows.dtype), ActiveBlocks(*lists), sides)
    return rows @ _masked_copy(weight, mask, backend).to(rows.dtype)


def _weight_gradient(
    rows: Tensor,
    columns: Tensor,
    weight: Tensor,
    mask: Tensor,
    lists: Sequence[Tensor],
    sides: tuple[int, int],
    dense: bool,
    backend: str,
) -> Tensor:
    if not dense and _walks_blocks(rows, lists, backend):
        if backend == "triton":
            from sdp_kernels.masked_linear.kernel_gradient import weight_gradient
        else:
            from sdp_kernels.masked_linear.cpu import weight_gradient

        return weight_gradient(rows, columns, weight, ActiveBlocks(*lists), sides)
    result = (rows.T @ columns).to(weight.dtype)
    if not dense:
        _zero_fresh_(result, mask, backend)
    return result


def _zero_fresh_(gradient: Tensor, mask: Tensor, backend: str) -> None:
    """Zero the pruned entries of a gradient that nobody else holds."""
    if backend == "triton":
        from sdp_kernels.masked_linear.kernel_zero import masked_copy

        masked_copy(gradient, mask, out=gradient)
    else:
        mask_(gradient, mask if mask.dtype == torch.bool else unpack_bits(mask, gradient.shape[1]))


def _gated_gradient(
    rows: Tensor,
    columns: Tensor,
    weight: Tensor,
    mask: Tensor,
    block_shape: tuple[int, int],
    dense: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The gradient of the weight, and the sums of the dense one times the weight over the blocks of the gate."""
    if backend == "triton" and set(block_shape) <= set(KERNEL_SIDES):
        from sdp_kernels.masked_linear.kernel_gradient import gated_gradient

        return gated_gradient(rows, columns, weight, None if dense else mask, block_shape)
    result = (rows.T @ columns).to(weight.dtype)
    grid = block_grid(result.shape, block_shape)
    gate = (result * weight).view(grid[0], block_shape[0], grid[1], block_shape[1]).sum((1, 3))
    if not dense:
        _zero_fresh_(result, mask, backend)
    return result, gate


@_masked_linear_backward.register_fake
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


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    input, weight, mask, *lists = ctx.saved_tensors
    need_input, need_weight, _, need_bias, need_gate = ctx.needs_input_grad[:5]
    grid, gate_dtype = ctx.gate or ((1, 1), weight.dtype)
    input_gradient, weight_gradient, gate_gradient = _masked_linear_backward(
        gradient,
        input,
        weight,
        mask,
        lists,
        *ctx.sides,
        weight.shape[0] // grid[0],
        weight.shape[1] // grid[1],
        ctx.dense_gradient,
        need_input,
        need_weight,
        need_gate,
        ctx.backend,
    )
    bias_gradient = gradient.reshape(-1, gradient.shape[-1]).sum(0) if need_bias else None
    return (
        input_gradient if need_input else None,
        weight_gradient if need_weight else None,
        None,
        bias_gradient.to(ctx.bias_dtype) if bias_gradient is not None else None,
        gate_gradient.to(gate_dtype) if need_gate else None,
        [None] * len(lists),
        *[None] * 5,
    )


_masked_linear.register_autograd(_backward, setup_context=_setup_context)
