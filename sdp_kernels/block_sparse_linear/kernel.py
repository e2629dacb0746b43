"""The block-sparse product and the gradient of its values on a GPU.

A program computes a tile of tokens times the output features of one row of blocks, and walks along its blocks
`STEP` input features at a time: two or four narrow blocks in one step, a wide one in two. The column of the next
step is loaded one step ahead, because a load whose address waits for another load cannot be pipelined. Rows
of blocks are taken the fullest first, so that no long one is left at the end. With few tokens the blocks of
a row are shared by several programs, whose sums are added in a fixed order.

Inputs in half precision are multiplied in it, with float32 accumulation.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from sdp_kernels.block_sparse_linear.launch import TUNED, ProductClass, choose_splits
from sdp_kernels.dispatch import capability_of, float32_precision, on_its_device
from sdp_kernels.masks import Walk
from sdp_kernels.spec import TRITON_NAMES, KernelConfig
from sdp_kernels.tiles.launch import STEP, choose_launch, values_step, values_warps

__all__ = ["OutOfResources", "configurations", "product", "values_gradient"]

GROUP_BYTES = 2**23  # of the input that programs running together read
FINISH_BLOCK = 1024


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; many where there is none, so that the interpreter walks the same way as a large device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@on_its_device
def product(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    walk: Walk,
    order: Tensor,
    out_features: int,
    activation: str | None,
) -> Tensor:
    """As `cpu_engine.product`; `order` names the rows of blocks, the fullest first."""
    tokens, in_features = input.shape
    blocks, height, width = values.shape
    output = input.new_empty(tokens, out_features)
    if tokens == 0:
        return output
    input = input.contiguous()
    if values.stride() not in ((height * width, width, 1), (height * width, 1, height)):
        values = values.contiguous()
    tuned = TUNED.get(ProductClass.of(tokens, (out_features, in_features), (height, width), input.dtype))
    launch = tuned.launch if tuned else choose_launch(tokens, height, input.dtype, capability_of(input.device))
    tiles, lines = triton.cdiv(tokens, launch.block_tokens), order.numel()
    programs = tiles * lines
    steps = blocks * width / (lines * STEP)
    splits = tuned.splits if tuned else choose_splits(programs, steps, multiprocessors(input.device))
    sums = output if splits == 1 else input.new_empty(splits, tokens, out_features, dtype=torch.float32)
    epilogue = {"HAS_BIAS": bias is not None, "ACTIVATION": activation or "none"}
    _product_kernel[(programs, splits)](
        input,
        values,
        input if bias is None else bias.contiguous(),
        walk.offsets,
        walk.neighbours,
        walk.neighbours if walk.positions is None else walk.positions,
        order,
        sums,
        tokens,
        in_features,
        out_features,
        lines,
        max(1, GROUP_BYTES // (launch.block_tokens * in_features * input.itemsize)),
        HEIGHT=height,
        WIDTH=width,
        HEIGHT_STRIDE=values.stride(1),
        WIDTH_STRIDE=values.stride(2),
        STEP=STEP,
        BLOCK_TOKENS=launch.block_tokens,
        WHOLE_INPUT=in_features % width == 0,
        PERMUTED=walk.positions is not None,
        SPLIT=splits > 1,
        PRECISION=float32_precision(),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **(epilogue if splits == 1 else {"HAS_BIAS": False, "ACTIVATION": "none"}),
    )
    if splits > 1:
        _finish_kernel[(triton.cdiv(output.numel(), FINISH_BLOCK),)](
            sums,
            input if bias is None else bias.contiguous(),
            output,
            output.numel(),
            out_features,
            splits,
            BLOCK=FINISH_BLOCK,
            **epilogue,
        )
    return output


@on_its_device
def values_gradient(
    gradient: Tensor, input: Tensor, block_rows: Tensor, neighbours: Tensor, block_shape: tuple[int, int]
) -> Tensor:
    """As `cpu_engine.values_product`, from the row of each block; one program a block."""
    height, width = block_shape
    blocks = neighbours.numel()
    result = input.new_empty(blocks, height, width)
    if blocks == 0:
        return result
    _values_kernel[(blocks,)](
        gradient.contiguous(),
        input.contiguous(),
        block_rows,
        neighbours,
        result,
        input.shape[0],
        input.shape[1],
        gradient.shape[1],
        HEIGHT=height,
        WIDTH=width,
        BLOCK_TOKENS=values_step(input.dtype),
        PRECISION=float32_precision(),
        num_warps=values_warps(block_shape),
        num_stages=2,
    )
    return result


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def _gelu(x):
    """x times half the complementary error function of -x / sqrt(2), within 3e-7 of its size as F.gelu is.

    The fit to erfc is that of Press et al., Numerical Recipes in C (1992), section 6.2, https://numerical.recipes. The
    erf of libdevice picks each coefficient by the argument, for which a tile of 128 x 128 has not enough registers.
    """
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.5 * z)
    fit = -0.82215223 + t * 0.17087277
    fit = 1.48851587 + t * fit
    fit = -1.13520398 + t * fit
    fit = 0.27886807 + t * fit
    fit = -0.18628806 + t * fit
    fit = 0.09678418 + t * fit
    fit = 0.37409196 + t * fit
    fit = 1.00002368 + t * fit
    fit = -1.26551223 + t * fit
    tail = 0.5 * t * tl.exp(fit - z * z)
    return x * tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # NaN stays
    elif ACTIVATION == "gelu":
        x = _gelu(x)
    elif ACTIVATION == "gelu_tanh":
        x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * _sigmoid(x)
    return x


@triton.jit
def _columns_at(pointer, lane, high, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """The entry of each lane's block; the same for all lanes of a block, which lets the loads after it be wide."""
    found = tl.load(pointer + lane // WIDTH, mask=lane < high, other=0)
    return tl.max_constancy(found, min(WIDTH, STEP))


@triton.jit(do_not_specialize=["tokens", "lines", "group_tiles"])
def _product_kernel(
    input,  # (tokens, in)
    values,  # (blocks, HEIGHT, WIDTH) with the strides given
    bias,  # (out,), read if HAS_BIAS
    offsets,  # (lines + 1,): where each row of blocks begins
    columns,  # (blocks,)
    positions,  # (blocks,) in `values`, read if PERMUTED
    order,  # (lines,)
    output,  # (tokens, out), or (splits, tokens, out) float32 if SPLIT
    tokens,
    in_features,
    out_features,
    lines,
    group_tiles,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT_STRIDE: tl.constexpr,
    WIDTH_STRIDE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WHOLE_INPUT: tl.constexpr,
    PERMUTED: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # All rows of blocks meet a group of token tiles, whose input stays in the cache, before the next group.
    program = tl.program_id(0)
    first_tile = program // (group_tiles * lines) * group_tiles
    group_size = tl.minimum(tl.cdiv(tokens, BLOCK_TOKENS) - first_tile, group_tiles)
    within = program % (group_tiles * lines)
    line = tl.load(order + within // group_size)
    token = (first_tile + within % group_size) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    feature = tl.arange(0, HEIGHT)

    low = tl.load(offsets + line) * WIDTH
    high = tl.load(offsets + line + 1) * WIDTH
    if SPLIT:
        share = tl.cdiv(tl.cdiv(high - low, STEP), tl.num_programs(1)) * STEP
        low += tl.program_id(1) * share
        high = tl.minimum(low + share, high)
    step = tl.arange(0, STEP)
    rows = input + token.to(tl.int64)[:, None] * in_features
    here = token[:, None] < tokens
    sums = tl.zeros((BLOCK_TOKENS, HEIGHT), tl.float32)
    column = _columns_at(columns, low + step, high, WIDTH, STEP)
    if PERMUTED:
        position = _columns_at(positions, low + step, high, WIDTH, STEP)
    for start in range(low, high, STEP):
        lane = start + step
        within_block = lane % WIDTH
        source = tl.max_constancy(column, min(WIDTH, STEP)) * WIDTH + within_block
        known = here
        if STEP > WIDTH:
            known = known & (lane < high)[None, :]
        if not WHOLE_INPUT:
            known = known & (source < in_features)[None, :]
        x = tl.load(rows + source[None, :], mask=known, other=0.0)
        block = tl.max_constancy(position, min(WIDTH, STEP)) if PERMUTED else lane // WIDTH
        place = block.to(tl.int64) * (HEIGHT * WIDTH) + within_block * WIDTH_STRIDE
        places = values + place[:, None] + (feature * HEIGHT_STRIDE)[None, :]
        weight = tl.load(places, mask=(lane < high)[:, None], other=0.0) if STEP > WIDTH else tl.load(places)
        column = _columns_at(columns, lane + STEP, high, WIDTH, STEP)
        if PERMUTED:
            position = _columns_at(positions, lane + STEP, high, WIDTH, STEP)
        sums = tl.dot(x, weight, sums, input_precision=PRECISION)

    out = line * HEIGHT + feature
    kept = here & (out < out_features)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + out, mask=out < out_features, other=0.0).to(tl.float32)[None, :]
    sums = _activate(sums, ACTIVATION)
    if SPLIT:
        output += tl.program_id(1).to(tl.int64) * tokens * out_features
    place = output + token.to(tl.int64)[:, None] * out_features + out[None, :]
    tl.store(place, sums.to(output.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["splits"])
def _finish_kernel(
    sums,  # (splits, tokens, out) float32
    bias,  # (out,), read if HAS_BIAS
    output,  # (tokens, out)
    elements,
    out_features,
    splits,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    total = tl.zeros((BLOCK,), tl.float32)
    place = sums + index
    for _ in range(0, splits):
        total += tl.load(place, mask=inside, other=0.0)
        place += elements
    if HAS_BIAS:
        total += tl.load(bias + index % out_features, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + index, _activate(total, ACTIVATION).to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _values_kernel(
    gradient,  # (tokens, out)
    input,  # (tokens, in)
    block_rows,  # (blocks,)
    columns,  # (blocks,)
    output,  # (blocks, HEIGHT, WIDTH)
    tokens,
    in_features,
    out_features,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0)
    h = tl.arange(0, HEIGHT)
    w = tl.arange(0, WIDTH)
    out = tl.load(block_rows + block) * HEIGHT + h
    source = tl.load(columns + block) * WIDTH + w
    sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for start in range(0, tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        row = token.to(tl.int64)
        slope = tl.load(
            gradient + row[None, :] * out_features + out[:, None],
            mask=(token < tokens)[None, :] & (out < out_features)[:, None],
            other=0.0,
        )
        x = tl.load(
            input + row[:, None] * in_features + source[None, :],
            mask=(token < tokens)[:, None] & (source < in_features)[None, :],
            other=0.0,
        )
        sums = tl.dot(slope, x, sums, input_precision=PRECISION)
    place = output + block.to(tl.int64) * (HEIGHT * WIDTH) + h[:, None] * WIDTH + w[None, :]
    tl.store(place, sums.to(output.dtype.element_ty))


BLOCK_SHAPES = ((16, 16), (32, 32), (64, 64), (128, 128), (128, 32), (64, 32), (16, 64))


def configurations(capability: int = 120) -> Iterator[KernelConfig]:
    """The kernels as they are launched on a capability; by default on the one with the least shared memory."""
    for dtype, name in TRITON_NAMES.items():
        indices = dict.fromkeys(("offsets", "columns", "positions", "order", "block_rows"), "*i32")
        sizes = dict.fromkeys(
            ("tokens", "in_features", "out_features", "lines", "group_tiles", "elements", "splits"), "i32"
        )
        floats = dict.fromkeys(("input", "values", "bias", "output", "gradient"), f"*{name}")
        types = {**indices, **sizes, **floats, "sums": "*fp32"}
        half = dtype != torch.float32
        precision = {"PRECISION": "ieee"}
        for block_shape in BLOCK_SHAPES:
            for tokens in (16, 4096):
                for transposed in (False, True):
                    height, width = block_shape[::-1] if transposed else block_shape
                    launch = choose_launch(tokens, height, dtype, capability)
                    split = tokens == 16
                    constants = {
                        "HEIGHT": height,
                        "WIDTH": width,
                        "HEIGHT_STRIDE": 1 if transposed else width,
                        "WIDTH_STRIDE": height if transposed else 1,
                        "STEP": STEP,
                        "BLOCK_TOKENS": launch.block_tokens,
                        "WHOLE_INPUT": True,
                        "PERMUTED": transposed,
                        "SPLIT": split,
                        "HAS_BIAS": not split,
                        "ACTIVATION": "none" if split or transposed else "gelu",
                        **precision,
                    }
                    used = {**types, "output": "*fp32"} if split else types
                    yield KernelConfig(
                        _product_kernel, used, constants, launch.num_warps, launch.num_stages, tensor_cores=half
                    )
            sides = {"HEIGHT": block_shape[0], "WIDTH": block_shape[1], "BLOCK_TOKENS": values_step(dtype)}
            warps = values_warps(block_shape)
            yield KernelConfig(_values_kernel, types, {**sides, **precision}, warps, 2, tensor_cores=half)
        for activation in ("none", "relu", "gelu", "gelu_tanh", "silu"):
            constants = {"HAS_BIAS": True, "ACTIVATION": activation, "BLOCK": FINISH_BLOCK}
            yield KernelConfig(_finish_kernel, types, constants)
