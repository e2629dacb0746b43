"""Products with a masked weight on a GPU, without a masked copy of it.

* Few tokens, any mask: a tile of the weight is masked in registers, with words of 32 weights or with a bool tile.
* Kept blocks: a program computes a tile of tokens times the features of one row (or column) of blocks, and walks along
  the list of its kept blocks. The next block is loaded one step ahead, because loads that wait for an index are
  not pipelined. Lists have room for all blocks, and how many are kept is only read on the device: a new mask needs
  neither a new compilation nor a new CUDA graph.
* The gradient of the weight, by blocks: only the kept ones, or all of them, with the sum of gradient * weight.

Inputs in half precision are multiplied in it, with float32 accumulation.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdp_kernels.block_sparse_linear.launch import choose_launch, values_step, values_warps
from sdp_kernels.dispatch import float32_precision, on_its_device
from sdp_kernels.masked_linear import kernel_zero
from sdp_kernels.masked_linear.blocks import ActiveBlocks
from sdp_kernels.spec import KernelConfig

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@on_its_device
def masked_product(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """The input times the transposed masked weight, plus the bias; or times the masked weight itself.

    Args:
        input: (tokens, in), or (tokens, out) if `transposed`.
        weight: (out, in), of the dtype of the input or wider; it is converted in registers.
        mask: (out, in) bool, or the int32 words of a `BitMask`.
        bias: one for each feature of the result, or None.
        transposed: multiply with the weight as it is stored, for the gradient of the input.
    """
    tokens = input.shape[0]
    features = weight.shape[1 if transposed else 0]
    output = input.new_empty(tokens, features)
    if output.numel() == 0:
        return output
    block_tokens, block_features, step, stages = _masked_launch(tokens, input.dtype)
    _masked_kernel[(triton.cdiv(features, block_features), triton.cdiv(tokens, block_tokens))](
        input.contiguous(),
        weight.contiguous(),
        mask.contiguous(),
        input if bias is None else bias.contiguous(),
        output,
        tokens,
        weight.shape[0],
        weight.shape[1],
        PACKED=mask.dtype == torch.int32,
        TRANSPOSED=transposed,
        HAS_BIAS=bias is not None,
        BLOCK_TOKENS=block_tokens,
        FEATURES=block_features,
        STEP=step,
        PRECISION=float32_precision(),
        num_warps=4,
        num_stages=stages,
    )
    return output


def _masked_launch(tokens: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Tokens and features of a tile, features a step, and stages; float32 products need registers instead of units."""
    block_tokens = max(16, triton.next_power_of_2(tokens))
    return (min(32, block_tokens), 32, 32, 2) if dtype == torch.float32 else (min(64, block_tokens), 64, 64, 3)


@on_its_device
def blocks_product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lists: ActiveBlocks,
    block_shape: tuple[int, int],
    transposed: bool,
) -> Tensor:
    """As `masked_product`, by the lists of the kept blocks."""
    tokens = input.shape[0]
    features = weight.shape[1 if transposed else 0]
    output = input.new_empty(tokens, features)
    if output.numel() == 0:
        return output
    height, width = block_shape[::-1] if transposed else block_shape
    block_tokens, warps, stages = _blocks_launch(tokens, height, input.dtype, weight.dtype)
    _blocks_kernel[(features // height, triton.cdiv(tokens, block_tokens))](
        input.contiguous(),
        weight.contiguous(),
        input if bias is None else bias.contiguous(),
        lists.ccol_indices if transposed else lists.crow_indices,
        lists.row_indices if transposed else lists.col_indices,
        output,
        tokens,
        input.shape[1],
        features,
        lists.col_indices.numel(),
        TRANSPOSED=transposed,
        HAS_BIAS=bias is not None,
        BLOCK_TOKENS=block_tokens,
        HEIGHT=height,
        WIDTH=width,
        STEP=64,
        PRECISION=float32_precision(),
        num_warps=warps,
        num_stages=stages,
    )
    return output


def _blocks_launch(tokens: int, height: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[int, int, int]:
    """Tokens of a tile, warps and stages, which fit into 99 KiB of shared memory."""
    block_tokens, warps, _ = choose_launch(tokens, height, dtype, capability=86)
    stage = 64 * (block_tokens * dtype.itemsize + height * weight_dtype.itemsize)
    return block_tokens, warps, max(2, min(4, 92 * 1024 // stage))


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
def _keep_tile(mask, row, column, rows, columns, PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) bool: which weights are kept; `column` begins with a multiple of 32. False outside."""
    if PACKED:
        words = tl.cdiv(columns, 32)
        word = tl.min(column, 0) // 32 + tl.arange(0, COLUMNS // 32)
        place = mask + row.to(tl.int64)[:, None] * words + word[None, :]
        found = tl.load(place, mask=(row < rows)[:, None] & (word < words)[None, :], other=0)
        bits = (found[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        keep = tl.reshape(bits, (ROWS, COLUMNS)) != 0
    else:
        place = mask + row.to(tl.int64)[:, None] * columns + column[None, :]
        keep = tl.load(place, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0) != 0
    return keep


@triton.jit
def _masked_kernel(
    input,  # (tokens, columns), or (tokens, rows) if TRANSPOSED
    weight,  # (rows, columns)
    mask,  # (rows, words of a row) int32 if PACKED, otherwise (rows, columns) bool
    bias,  # one a feature, read if HAS_BIAS
    output,  # (tokens, rows), or (tokens, columns) if TRANSPOSED
    tokens,
    rows,
    columns,
    PACKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    length = rows if TRANSPOSED else columns
    features = columns if TRANSPOSED else rows
    sums = tl.zeros((BLOCK_TOKENS, FEATURES), tl.float32)
    for start in range(0, length, STEP):
        step = start + tl.arange(0, STEP)
        place = input + token.to(tl.int64)[:, None] * length + step[None, :]
        x = tl.load(place, mask=(token < tokens)[:, None] & (step < length)[None, :], other=0.0)
        row = step if TRANSPOSED else feature
        column = feature if TRANSPOSED else step
        places = weight + row.to(tl.int64)[:, None] * columns + column[None, :]
        w = tl.load(places, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)
        if TRANSPOSED:
            keep = _keep_tile(mask, row, column, rows, columns, PACKED, STEP, FEATURES)
        else:
            keep = _keep_tile(mask, row, column, rows, columns, PACKED, FEATURES, STEP)
        w = tl.where(keep, w, 0.0).to(x.dtype)  # a pruned weight may be NaN
        if not TRANSPOSED:
            w = tl.trans(w)
        sums = tl.dot(x, w, sums, input_precision=PRECISION)
    if HAS_BIAS:
        sums += tl.load(bias + feature, mask=feature < features, other=0.0).to(tl.float32)[None, :]
    place = output + token.to(tl.int64)[:, None] * features + feature[None, :]
    inside = (token < tokens)[:, None] & (feature < features)[None, :]
    tl.store(place, sums.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _blocks_at(neighbours, lane, high, blocks, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """The block of each lane; the same for all lanes of a block, which lets the loads after it be wide."""
    index = lane // WIDTH
    found = tl.load(neighbours + index, mask=(lane < high) & (index < blocks), other=0)
    return tl.max_constancy(found, min(WIDTH, STEP))


@triton.jit
def _blocks_kernel(
    input,  # (tokens, input_stride)
    weight,  # (features, input_stride), or (input_stride, features) if TRANSPOSED
    bias,  # (features,), read if HAS_BIAS
    offsets,  # (features / HEIGHT + 1,)
    neighbours,  # (blocks,)
    output,  # (tokens, features)
    tokens,
    input_stride,
    features,
    blocks,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    line = tl.program_id(0)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    feature = line * HEIGHT + tl.arange(0, HEIGHT)
    low = tl.load(offsets + line) * WIDTH
    high = tl.load(offsets + line + 1) * WIDTH
    step = tl.arange(0, STEP)
    rows = input + token.to(tl.int64)[:, None] * input_stride
    here = (token < tokens)[:, None]
    sums = tl.zeros((BLOCK_TOKENS, HEIGHT), tl.float32)
    block = _blocks_at(neighbours, low + step, high, blocks, WIDTH, STEP)
    for start in range(low, high, STEP):
        lane = start + step
        source = tl.max_constancy(block, min(WIDTH, STEP)) * WIDTH + lane % WIDTH
        known = lane < high
        x = tl.load(rows + source[None, :], mask=here & known[None, :], other=0.0)
        if TRANSPOSED:
            places = weight + source.to(tl.int64)[:, None] * features + feature[None, :]
        else:
            places = weight + feature.to(tl.int64)[None, :] * input_stride + source[:, None]
        w = tl.load(places, mask=known[:, None], other=0.0)
        block = _blocks_at(neighbours, lane + STEP, high, blocks, WIDTH, STEP)
        sums = tl.dot(x, w.to(x.dtype), sums, input_precision=PRECISION)
    if HAS_BIAS:
        sums += tl.load(bias + feature).to(tl.float32)[None, :]
    place = output + token.to(tl.int64)[:, None] * features + feature[None, :]
    tl.store(place, sums.to(output.dtype.element_ty), mask=here)


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


@triton.jit
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


@triton.jit
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


SIDES = (16, 32, 64, 128)
BLOCK_SHAPES = ((16, 16), (32, 32), (64, 64), (128, 128), (128, 32), (16, 64))


def configurations() -> Iterator[KernelConfig]:
    """Every kernel as it is launched, with inputs of each dtype, and a float32 weight under autocast."""
    sizes = dict.fromkeys(("tokens", "rows", "columns", "input_stride", "features", "blocks"), "i32")
    for name, dtype in DTYPES.items():
        half = dtype != torch.float32
        lists = {"offsets": "*i32", "neighbours": "*i32", "gate": "*fp32"}
        floats = dict.fromkeys(("input", "weight", "bias", "output", "gradient"), f"*{name}")
        types = sizes | lists | floats
        precision: dict[str, Any] = {"PRECISION": "ieee"}
        constants: dict[str, Any]
        for weight in {name, "fp32"}:
            typed = types | {"weight": f"*{weight}"}
            for packed in (True, False):
                for tokens in (1, 64):
                    for transposed in (False, True):
                        block_tokens, features, step, stages = _masked_launch(tokens, dtype)
                        constants = {"PACKED": packed, "TRANSPOSED": transposed, "HAS_BIAS": not transposed}
                        constants |= {"BLOCK_TOKENS": block_tokens, "FEATURES": features, "STEP": step}
                        used = typed | {"mask": "*i32" if packed else "*i1"}
                        yield KernelConfig(_masked_kernel, used, constants | precision, 4, stages, tensor_cores=half)
            for block_shape in BLOCK_SHAPES:
                for tokens in (16, 4096):
                    for transposed in (False, True):
                        height, width = block_shape[::-1] if transposed else block_shape
                        block_tokens, warps, stages = _blocks_launch(tokens, height, dtype, DTYPES[weight])
                        constants = {"TRANSPOSED": transposed, "HAS_BIAS": not transposed, "BLOCK_TOKENS": block_tokens}
                        constants |= {"HEIGHT": height, "WIDTH": width, "STEP": 64}
                        yield KernelConfig(
                            _blocks_kernel, typed, constants | precision, warps, stages, tensor_cores=half
                        )
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
    yield from kernel_zero.configurations()
