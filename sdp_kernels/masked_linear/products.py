"""The three products of a masked linear map, each by what was chosen for the mask, the tokens and the backend.

Kept blocks are walked along where there are any and that is worth it; few tokens on a GPU meet a weight that is
masked in registers; everything else multiplies densely with a masked copy, or masks the dense gradient.
"""

from torch import Tensor
from torch.nn import functional as F

from sdp_kernels.masked_linear import cpu
from sdp_kernels.masked_linear.arguments import Masking, Teacher, has_kernel
from sdp_kernels.masks import BitMask, block_grid, keeps_everything, mask_, masked
from sdp_kernels.tiles.launch import KERNEL_SIDES


def output_of(input: Tensor, weight: Tensor, bias: Tensor | None, masking: Masking) -> Tensor:
    """(..., in) times the transposed masked weight, plus the bias; input and bias in one dtype, also of the result."""
    rows = input.reshape(-1, input.shape[-1])
    if masking.backend == "triton" and has_kernel(masking.lists, len(rows)):
        output, _ = kernel_product(rows, weight, bias, masking)
    elif (blocks := _blocks_on_cpu(rows, weight, masking)) is not None:
        output = cpu.product(rows, weight.to(rows.dtype), bias, blocks)
    else:
        return F.linear(input, _masked_copy(weight, masking).to(input.dtype), bias)
    return output.view(*input.shape[:-1], weight.shape[0])


def kernel_product(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    masking: Masking,
    *,
    transposed: bool = False,
    teacher: Teacher | None = None,
) -> tuple[Tensor, Tensor]:
    """A product by a Triton kernel, and its sums over the columns if there is a teacher; as `kernel.masked_product`."""
    from sdp_kernels.masked_linear.kernel import blocks_product, masked_product

    if masking.lists:
        return blocks_product(rows, weight, bias, masking.blocks, masking.block_shape, transposed, teacher)
    return masked_product(rows, weight, masking.mask, bias, transposed, teacher)


def input_gradient(rows: Tensor, weight: Tensor, masking: Masking) -> Tensor:
    """(tokens, out) gradients of the output times the masked weight."""
    if masking.backend == "triton" and has_kernel(masking.lists, len(rows)):
        return kernel_product(rows, weight, None, masking, transposed=True)[0]
    if (blocks := _blocks_on_cpu(rows, weight, masking)) is not None:
        return cpu.input_gradient(rows, weight.to(rows.dtype), blocks)
    return rows @ _masked_copy(weight, masking).to(rows.dtype)


def weight_gradient(rows: Tensor, columns: Tensor, weight: Tensor, masking: Masking, dense: bool) -> Tensor:
    """The gradient of the weight, zero where pruned unless `dense`.

    Args:
        rows: (tokens, out) gradients of the output.
        columns: (tokens, in), the input in their dtype.
        weight: (out, in), for its shape and dtype.
        masking: which weights are pruned, and on what it runs.
        dense: leave the gradient of pruned weights.
    """
    if not dense and masking.backend == "triton" and masking.lists:
        from sdp_kernels.masked_linear.kernel_gradient import weight_gradient as by_blocks

        return by_blocks(rows, columns, weight, masking.blocks, masking.block_shape)
    if not dense and (blocks := _blocks_on_cpu(rows, weight, masking)) is not None:
        return cpu.weight_gradient(rows, columns, weight, blocks)
    result = (rows.T @ columns).to(weight.dtype)
    if not dense:
        _zero_fresh_(result, masking)
    return result


def gated_gradient(
    rows: Tensor, columns: Tensor, weight: Tensor, masking: Masking, gate_shape: tuple[int, int], dense: bool
) -> tuple[Tensor, Tensor]:
    """As `weight_gradient`, and the sums of the dense gradient times the weight over blocks of `gate_shape`."""
    if masking.backend == "triton" and set(gate_shape) <= set(KERNEL_SIDES):
        from sdp_kernels.masked_linear.kernel_gradient import gated_gradient as by_blocks

        return by_blocks(rows, columns, weight, None if dense else masking.mask, gate_shape)
    result = (rows.T @ columns).to(weight.dtype)
    grid = block_grid(result.shape, gate_shape)
    gate = (result * weight).view(grid[0], gate_shape[0], grid[1], gate_shape[1]).sum((1, 3))
    if not dense:
        _zero_fresh_(result, masking)
    return result, gate


def _blocks_on_cpu(rows: Tensor, weight: Tensor, masking: Masking) -> BitMask | None:
    """The mask, if a product on a CPU goes along its kept blocks."""
    if masking.backend != "cpu" or keeps_everything(masking.mask, weight):
        return None
    mask = masking.bit_mask(weight)
    return mask if mask is not None and cpu.worthwhile(rows.dtype, mask) else None


def _masked_copy(weight: Tensor, masking: Masking) -> Tensor:
    """The masked weight; itself, if a mask on a CPU keeps everything: to ask another device would stall it."""
    if masking.backend != "triton":
        return weight if keeps_everything(masking.mask, weight) else masked(weight, masking.mask)
    from sdp_kernels.masked_linear.kernel_zero import masked_copy

    return masked_copy(weight, masking.mask)


def _zero_fresh_(gradient: Tensor, masking: Masking) -> None:
    """Zero the pruned entries of a gradient that nobody else holds."""
    if masking.backend == "triton":
        from sdp_kernels.masked_linear.kernel_zero import masked_copy

        masked_copy(gradient, masking.mask, out=gradient)
    elif not keeps_everything(masking.mask, gradient):
        mask_(gradient, masking.mask)
