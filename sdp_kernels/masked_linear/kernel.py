"""Products with a masked weight on a GPU, without a masked copy of it.

* Few tokens, any mask: a tile of the weight is masked in registers, with words of 32 weights or with a bool tile.
* Kept blocks: a program computes a tile of tokens times the features of one row (or column) of blocks, and walks along
  the list of its kept blocks. The next block is loaded one step ahead, because loads that wait for an index are
  not pipelined. Lists have room for all blocks, and how many are kept is only read on the device: a new mask needs
  neither a new compilation nor a new CUDA graph.

Both can also sum over the columns of what they compute, and of a teacher's features, while a tile is in registers.

Inputs in half precision are multiplied in it, with float32 accumulation.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdp_kernels.dispatch import float32_precision, on_its_device
from sdp_kernels.masked_linear import kernel_gradient, kernel_zero
from sdp_kernels.masked_linear.arguments import Teacher
from sdp_kernels.masked_linear.kernel_gradient import BLOCK_SHAPES
from sdp_kernels.masks import ActiveBlocks
from sdp_kernels.spec import TRITON_NAMES, KernelConfig
from sdp_kernels.tiles.kernel_columns import load_rows, tile_statistics
from sdp_kernels.tiles.launch import choose_launch


@on_its_device
def masked_product(
    input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, transposed: bool, teacher: Teacher | None = None
) -> tuple[Tensor, Tensor]:
    """The input times the transposed masked weight, plus the bias; or times the masked weight itself.

    Args:
        input: (tokens, in), or (tokens, out) if `transposed`.
        weight: (out, in), of the dtype of the input or wider; it is converted in registers.
        mask: (out, in) bool, or the int32 words of a `BitMask`.
        bias: one for each feature of the result, or None.
        transposed: multiply with the weight as it is stored, for the gradient of the input.
        teacher: with what to compare, or None.

    Returns:
        The output, and (tiles of tokens, 5, features) float32, which is empty without a teacher: the weight of the
        tile's rows, and mean and squares about it of the output's columns and of the teacher's.
    """
    tokens = input.shape[0]
    features = weight.shape[1 if transposed else 0]
    output = input.new_empty(tokens, features)
    if output.numel() == 0:
        return output, output.new_empty(0)
    block_tokens, block_features, step, stages = _masked_launch(tokens, input.dtype)
    statistics, sources, flags = _epilogue(output, teacher, block_tokens)
    _masked_kernel[(triton.cdiv(features, block_features), triton.cdiv(tokens, block_tokens))](
        input.contiguous(),
        weight.contiguous(),
        mask.contiguous(),
        input if bias is None else bias.contiguous(),
        output,
        *sources,
        statistics,
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
        **flags,
        num_warps=4,
        num_stages=stages,
    )
    return output, statistics


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
    teacher: Teacher | None = None,
) -> tuple[Tensor, Tensor]:
    """As `masked_product`, by the lists of the kept blocks."""
    tokens = input.shape[0]
    features = weight.shape[1 if transposed else 0]
    output = input.new_empty(tokens, features)
    if output.numel() == 0:
        return output, output.new_empty(0)
    height, width = block_shape[::-1] if transposed else block_shape
    block_tokens, warps, stages = _blocks_launch(tokens, height, input.dtype, weight.dtype)
    statistics, sources, flags = _epilogue(output, teacher, block_tokens)
    _blocks_kernel[(features // height, triton.cdiv(tokens, block_tokens))](
        input.contiguous(),
        weight.contiguous(),
        input if bias is None else bias.contiguous(),
        lists.ccol_indices if transposed else lists.crow_indices,
        lists.row_indices if transposed else lists.col_indices,
        output,
        *sources,
        statistics,
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
        **flags,
        num_warps=warps,
        num_stages=stages,
    )
    return output, statistics


def _blocks_launch(tokens: int, height: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[int, int, int]:
    """Tokens of a tile, warps and stages, which fit into 99 KiB of shared memory."""
    block_tokens, warps, _ = choose_launch(tokens, height, dtype, capability=90)
    stage = 64 * (block_tokens * dtype.itemsize + height * weight_dtype.itemsize)
    return block_tokens, warps, max(2, min(4, 92 * 1024 // stage))


def _epilogue(
    output: Tensor, teacher: Teacher | None, block_tokens: int
) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, bool]]:
    """Where a product stores its sums over the columns, what these are made of, and the kernel's options for them."""
    flags = {"STATISTICS": teacher is not None, "CENTER": False, "HAS_WEIGHT": False}
    if teacher is None:
        return output.new_empty(0), (output, output), flags
    flags |= {"CENTER": teacher.center, "HAS_WEIGHT": teacher.sample_weight is not None}
    share = output if teacher.sample_weight is None else teacher.sample_weight
    tiles = triton.cdiv(output.shape[0], block_tokens)
    statistics = output.new_empty((tiles, 5, output.shape[1]), dtype=torch.float32)
    return statistics, (teacher.features.contiguous(), share.contiguous()), flags


@triton.jit
def _store_output(
    sums,
    output,
    teacher,
    sample_weight,
    statistics,
    token,
    feature,
    tokens,
    features,
    STATISTICS: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Write a tile of the output and, from what its dtype leaves of it, the sums over its columns."""
    result = sums.to(output.dtype.element_ty)
    place = output + token.to(tl.int64)[:, None] * features + feature[None, :]
    inside = feature < features
    tl.store(place, result, mask=(token < tokens)[:, None] & inside[None, :])
    if STATISTICS:
        target, share = load_rows(teacher, sample_weight, token, feature, tokens, features, HAS_WEIGHT)
        own = tl.where(share > 0, result.to(tl.float32), 0.0)  # rows that are left out may hold NaN
        total, mean, squares = tile_statistics(own, share, CENTER)
        _, target_mean, target_squares = tile_statistics(target, share, CENTER)
        out = statistics + tl.program_id(1).to(tl.int64) * 5 * features + feature
        tl.store(out, total + tl.zeros_like(mean), mask=inside)
        tl.store(out + features, mean, mask=inside)
        tl.store(out + 2 * features, squares, mask=inside)
        tl.store(out + 3 * features, target_mean, mask=inside)
        tl.store(out + 4 * features, target_squares, mask=inside)


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


@triton.jit(do_not_specialize=["tokens"])
def _masked_kernel(
    input,  # (tokens, columns), or (tokens, rows) if TRANSPOSED
    weight,  # (rows, columns)
    mask,  # (rows, words of a row) int32 if PACKED, otherwise (rows, columns) bool
    bias,  # one a feature, read if HAS_BIAS
    output,  # (tokens, rows), or (tokens, columns) if TRANSPOSED
    teacher,  # (tokens, rows), read if STATISTICS
    sample_weight,  # (tokens,) float32, read if STATISTICS and HAS_WEIGHT
    statistics,  # (tiles of tokens, 5, rows) float32, written if STATISTICS
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
    STATISTICS: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
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
    _store_output(
        sums,
        output,
        teacher,
        sample_weight,
        statistics,
        token,
        feature,
        tokens,
        features,
        STATISTICS,
        CENTER,
        HAS_WEIGHT,
    )


@triton.jit
def _blocks_at(neighbours, lane, high, blocks, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """The block of each lane; the same for all lanes of a block, which lets the loads after it be wide."""
    index = lane // WIDTH
    found = tl.load(neighbours + index, mask=(lane < high) & (index < blocks), other=0)
    return tl.max_constancy(found, min(WIDTH, STEP))


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _blocks_kernel(
    input,  # (tokens, input_stride)
    weight,  # (features, input_stride), or (input_stride, features) if TRANSPOSED
    bias,  # (features,), read if HAS_BIAS
    offsets,  # (features / HEIGHT + 1,)
    neighbours,  # (blocks,)
    output,  # (tokens, features)
    teacher,  # (tokens, features), read if STATISTICS
    sample_weight,  # (tokens,) float32, read if STATISTICS and HAS_WEIGHT
    statistics,  # (tiles of tokens, 5, features) float32, written if STATISTICS
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
    STATISTICS: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
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
    _store_output(
        sums,
        output,
        teacher,
        sample_weight,
        statistics,
        token,
        feature,
        tokens,
        features,
        STATISTICS,
        CENTER,
        HAS_WEIGHT,
    )


# The output with its bias, the gradient of the input, and the output with sums over its columns.
EPILOGUES: tuple[dict[str, Any], ...] = tuple(
    {
        "TRANSPOSED": transposed,
        "HAS_BIAS": not transposed,
        "PRECISION": "ieee",
        "STATISTICS": statistics,
        "CENTER": statistics,
        "HAS_WEIGHT": statistics,
    }
    for transposed, statistics in ((False, False), (True, False), (False, True))
)


def configurations() -> Iterator[KernelConfig]:
    """Every kernel as it is launched, with inputs of each dtype, and a float32 weight under autocast."""
    others = dict.fromkeys(("tokens", "rows", "columns", "input_stride", "features", "blocks"), "i32")
    others |= {"offsets": "*i32", "neighbours": "*i32", "sample_weight": "*fp32", "statistics": "*fp32"}
    for dtype, name in TRITON_NAMES.items():
        half = dtype != torch.float32
        types = others | dict.fromkeys(("input", "bias", "output", "teacher"), f"*{name}")
        for weight in {dtype, torch.float32}:
            typed = types | {"weight": f"*{TRITON_NAMES[weight]}"}
            for packed, tokens, kind in product((True, False), (1, 64), EPILOGUES):
                block_tokens, features, step, stages = _masked_launch(tokens, dtype)
                constants = {"PACKED": packed, "BLOCK_TOKENS": block_tokens, "FEATURES": features, "STEP": step}
                used = typed | {"mask": "*i32" if packed else "*i1"}
                yield KernelConfig(_masked_kernel, used, constants | kind, 4, stages, tensor_cores=half)
            for block_shape, tokens, kind in product(BLOCK_SHAPES, (16, 4096), EPILOGUES):
                height, width = block_shape[::-1] if kind["TRANSPOSED"] else block_shape
                block_tokens, warps, stages = _blocks_launch(tokens, height, dtype, weight)
                constants = {"BLOCK_TOKENS": block_tokens, "HEIGHT": height, "WIDTH": width, "STEP": 64}
                yield KernelConfig(_blocks_kernel, typed, constants | kind, warps, stages, tensor_cores=half)
    yield from kernel_gradient.configurations()
    yield from kernel_zero.configurations()
