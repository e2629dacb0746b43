"""The gradient of a masked weight on a GPU, by blocks: the kept ones, or all with the sums of gradient * weight."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdp_kernels.dispatch import float32_precision, on_its_device
from sdp_kernels.masks import ActiveBlocks
from sdp_kernels.spec import TRITON_NAMES, KernelConfig
from sdp_kernels.tiles.launch import values_step, values_warps

BLOCK_SHAPES = ((16, 16), (32, 32), (64, 64), (128, 128), (128, 32), (16, 64))


@on_its_device
def weight_gradient(
    gradient: Tensor, input: Tensor, weight: Tensor, lists: ActiveBlocks, block_shape: tuple[int, int]
) -> Tensor:
    """(out, in), zero in pruned blocks: one program for each block, of which those that are pruned end at once."""
    result = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    height, width = block_shape
    rows, columns = weight.shape[0] // height, weight.shape[1] // width
    _weight_gradient_kernel[(rows * columns,)](
        gradient.contiguous(),
        input.contiguous(),
        lists.crow_indices,
        lists.col_indices,
        result,
        input.shape[0],
        weight.shape[0],
        weight.shape[1],
        HEIGHT=height,
        WIDTH=width,
        BLOCK_TOKENS=values_step(input.dtype),
        PRECISION=float32_precision(),
        num_warps=values_warps(block_shape),
        num_stages=2,
    )
    return result


@on_its_device
def gated_gradient(
    gradient: Tensor, input: Tensor, weight: Tensor, mask: Tensor | None, block_shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(out, in), zero where pruned unless `mask` is None, and the sums of the dense gradient * weight over blocks."""
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    height, width = block_shape
    rows, columns = weight.shape[0] // height, weight.shape[1] // width
    gate = weight.new_empty((rows, columns), dtype=torch.float32)
    _gated_gradient_kernel[(rows * columns,)](
        gradient.contiguous(),
        input.contiguous(),
        weight.contiguous(),
        weight if mask is None else mask.contiguous(),
        result,
        gate,
        input.shape[0],
        weight.shape[0],
        weight.shape[1],
        MASKING="none" if mask is None else "bits" if mask.dtype == torch.int32 else "bool",
        HEIGHT=height,
        WIDTH=width,
        BLOCK_TOKENS=values_step(input.dtype),
        PRECISION=float32_precision(),
        num_warps=values_warps(block_shape),
        num_stages=2,
    )
    return result, gate


@triton.jit
def _gradient_block(
    gradient,
    input,
    row,
    column,
    tokens,
    rows,
    columns,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of the weights in some rows and columns, as if they were kept."""
    sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for start in range(0, tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        inside = token < tokens
        place = token.to(tl.int64)
        slope = tl.load(gradient + place[None, :] * rows + row[:, None], mask=inside[None, :], other=0.0)
        x = tl.load(input + place[:, None] * columns + column[None, :], mask=inside[:, None], other=0.0)
        sums = tl.dot(slope, x.to(slope.dtype), sums, input_precision=PRECISION)
    return sums


@triton.jit(do_not_specialize=["tokens"])
def _weight_gradient_kernel(
    gradient,  # (tokens, rows)
    input,  # (tokens, columns)
    offsets,  # (rows / HEIGHT + 1,)
    neighbours,  # (blocks,)
    output,  # (rows, columns) zeros
    tokens,
    rows,
    columns,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    line = tl.program_id(0) // (columns // WIDTH)
    index = tl.load(offsets + line) + tl.program_id(0) % (columns // WIDTH)
    if index >= tl.load(offsets + line + 1):
        return
    row = line * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.load(neighbours + index) * WIDTH + tl.arange(0, WIDTH)
    sums = _gradient_block(gradient, input, row, column, tokens, rows, columns, HEIGHT, WIDTH, BLOCK_TOKENS, PRECISION)
    place = output + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(place, sums.to(output.dtype.element_ty))


@triton.jit(do_not_specialize=["tokens"])
def _gated_gradient_kernel(
    gradient,  # (tokens, rows)
    input,  # (tokens, columns)
    weight,  # (rows, columns)
    mask,  # (rows, words of a row) int32, or (rows, columns) bool; read unless MASKING is "none"
    output,  # (rows, columns)
    gate,  # (rows / HEIGHT, columns / WIDTH) float32: sums of the dense gradient * weight
    tokens,
    rows,
    columns,
    MASKING: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0) // (columns // WIDTH) * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.program_id(0) % (columns // WIDTH) * WIDTH + tl.arange(0, WIDTH)
    sums = _gradient_block(gradient, input, row, column, tokens, rows, columns, HEIGHT, WIDTH, BLOCK_TOKENS, PRECISION)
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    w = tl.load(weight + offset).to(tl.float32)
    tl.store(gate + tl.program_id(0), tl.sum(sums * w))
    if MASKING == "bits":
        word = tl.load(mask + row.to(tl.int64)[:, None] * tl.cdiv(columns, 32) + (column // 32)[None, :])
        sums = tl.where(((word >> (column % 32)[None, :]) & 1) != 0, sums, 0.0)
    elif MASKING == "bool":
        sums = tl.where(tl.load(mask + offset) != 0, sums, 0.0)
    tl.store(output + offset, sums.to(output.dtype.element_ty))


def configurations() -> Iterator[KernelConfig]:
    """Both kernels for inputs of each dtype and every kind of mask."""
    others = dict.fromkeys(("tokens", "rows", "columns"), "i32")
    others |= {"offsets": "*i32", "neighbours": "*i32", "gate": "*fp32"}
    for dtype, name in TRITON_NAMES.items():
        half = dtype != torch.float32
        types = others | dict.fromkeys(("input", "weight", "output", "gradient"), f"*{name}")
        precision: dict[str, Any] = {"PRECISION": "ieee"}
        for block_shape in BLOCK_SHAPES:
            sides: dict[str, Any] = {
                "HEIGHT": block_shape[0],
                "WIDTH": block_shape[1],
                "BLOCK_TOKENS": values_step(dtype),
            }
            warps = values_warps(block_shape)
            yield KernelConfig(_weight_gradient_kernel, types, sides | precision, warps, 2, tensor_cores=half)
            for masking, mask in (("none", f"*{name}"), ("bits", "*i32"), ("bool", "*i1")):
                constants = {"MASKING": masking} | sides
                typed = types | {"mask": mask}
                yield KernelConfig(_gated_gradient_kernel, typed, constants | precision, warps, 2, tensor_cores=half)
