"""The compiled CPU product. It needs numba, is compiled on first use and kept on disk where that can be written.

A tile of the output, a few tokens by one or two vectors of output features, stays in registers while all blocks of
a row pass by: each weight vector that is loaded meets every token of the tile. LLVM does not find such a tile in
scalar loops, so the inner loops are given to it in vector form. The blocks are repacked with their output
features innermost, the tokens of a tile copied next to each other; both are small beside the products.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,call-arg,attr-defined"
# mypy: disable-error-code="import-untyped,import-not-found"

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from sdp_kernels.block_sparse_linear import cpu

FLOAT, INDEX, LANE = ir.FloatType(), ir.IntType(64), ir.IntType(32)


def _vector_registers() -> tuple[int, int]:
    """(floats in a vector register, tokens of a tile): two vectors a token, two weights and a factor must fit."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 12  # 32 registers
    if features.get("avx"):
        return 8, 6  # 16 registers
    return 4, 12  # 32 registers on ARM; whatever else there is, LLVM makes do with what it has


LANES, TILE = _vector_registers()
SMALL_TILE = TILE // 3
TILE_ROWS = -(-TILE // LANES) * LANES  # so that whole squares can be transposed into a tile
VECTOR = ir.VectorType(FLOAT, LANES)
ITEMS_PER_THREAD = 8  # so that no thread waits long for another

_lock = threading.Lock()  # numba's simplest way of running threads allows one caller at a time
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=cpu.leave_threads_to_parent)


def run_on_threads(threads: int, function: Callable[..., Any], *args: Any) -> None:
    """Call a compiled function on so many of numba's threads, and leave the counts of numba and torch as they were."""
    with _lock:
        threads_of_torch = torch.get_num_threads()
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            function(*args)
        finally:
            numba.set_num_threads(before)
            if torch.get_num_threads() != threads_of_torch:  # both may share OpenMP, which numba sets up once
                torch.set_num_threads(threads_of_torch)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """numba's `njit`, with results kept on disk where that can be written."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # neither the folder of this file nor the user's cache can be written
            return njit(**options)(function)

    return decorate


def _array(context, builder, signature, args, position):
    """The record of an array argument: data, strides, shape."""
    return context.make_array(signature.args[position])(context, builder, args[position])


def _strides(builder, array):
    """Strides in floats."""
    return [builder.sdiv(stride, INDEX(4)) for stride in cgutils.unpack_tuple(builder, array.strides)]


def _vector_at(builder, pointer, *offsets):
    offset = functools.reduce(builder.add, offsets)
    return builder.bitcast(builder.gep(pointer, [offset]), VECTOR.as_pointer())


def _tile_product(vectors: int, tokens: int):
    """The product of a few tokens with one row of blocks, for `vectors` vectors of output features.

    result[t] = bias + sum over the blocks, and k within, of tile[columns[block] * width + k, t] * packed[block, k],
    where `packed` is flat and begins with the first of the features; `height` is how many it has in all.
    """

    @intrinsic
    def tile_product(typing_context, tile, packed, height, columns, width, bias, result):
        signature = types.void(tile, packed, types.intp, columns, types.intp, bias, result)

        def generate(context, builder, signature, args):
            tile, packed, columns, bias, result = (
                _array(context, builder, signature, args, i) for i in (0, 1, 3, 5, 6)
            )
            height, width = args[2], args[4]
            fma_type = ir.FunctionType(VECTOR, [VECTOR] * 3)
            fma = cgutils.get_or_insert_function(builder.module, fma_type, f"llvm.fma.v{LANES}f32")
            splat = ir.Constant(ir.VectorType(LANE, LANES), [0] * LANES)
            undefined = ir.Constant(VECTOR, ir.Undefined)
            # LLVM turns these into registers.
            sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(vectors)] for _ in range(tokens)]
            for v in range(vectors):
                start = builder.load(_vector_at(builder, bias.data, INDEX(v * LANES)), align=4)
                for t in range(tokens):
                    builder.store(start, sums[t][v])

            (blocks,) = cgutils.unpack_tuple(builder, columns.shape)
            with cgutils.for_range(builder, blocks) as block_loop:
                column = builder.sext(builder.load(builder.gep(columns.data, [block_loop.index])), INDEX)
                corner = builder.gep(tile.data, [builder.mul(column, builder.mul(width, INDEX(TILE_ROWS)))])
                begin = builder.mul(block_loop.index, builder.mul(width, height))
                with cgutils.for_range(builder, width) as loop:
                    here = builder.add(begin, builder.mul(loop.index, height))
                    places = [_vector_at(builder, packed.data, here, INDEX(v * LANES)) for v in range(vectors)]
                    weights = [builder.load(place, align=4) for place in places]
                    factors = builder.gep(corner, [builder.mul(loop.index, INDEX(TILE_ROWS))])
                    for t in range(tokens):
                        factor = builder.load(builder.gep(factors, [INDEX(t)]))
                        factor = builder.insert_element(undefined, factor, LANE(0))
                        factor = builder.shuffle_vector(factor, undefined, splat)
                        for v in range(vectors):
                            total = builder.call(fma, [factor, weights[v], builder.load(sums[t][v])])
                            builder.store(total, sums[t][v])
            result_stride = _strides(builder, result)[0]
            for t in range(tokens):
                for v in range(vectors):
                    place = _vector_at(builder, result.data, builder.mul(result_stride, INDEX(t)), INDEX(v * LANES))
                    builder.store(builder.load(sums[t][v]), place, align=4)
            return context.get_dummy_value()

        return signature, generate

    return tile_product


_product_2_vectors = _tile_product(2, TILE)
_product_1_vector = _tile_product(1, TILE)
_small_product_2_vectors = _tile_product(2, SMALL_TILE)
_small_product_1_vector = _tile_product(1, SMALL_TILE)


@intrinsic
def _transpose_square(typing_context, source, target):
    """target[j, i] = source[i, j] for LANES x LANES numbers, by swapping ever larger sub-squares in registers."""
    signature = types.void(source, target)

    def generate(context, builder, signature, args):
        source, target = (_array(context, builder, signature, args, i) for i in range(2))
        source_stride, target_stride = (_strides(builder, array)[0] for array in (source, target))

        def place(array, stride, row):
            return _vector_at(builder, array.data, builder.mul(stride, INDEX(row)))

        rows = [builder.load(place(source, source_stride, i), align=4) for i in range(LANES)]
        step = 1
        while step < LANES:
            low = [lane + LANES - step if lane & step else lane for lane in range(LANES)]
            high = [lane + LANES if lane & step else lane + step for lane in range(LANES)]
            masks = [ir.Constant(ir.VectorType(LANE, LANES), lanes) for lanes in (low, high)]
            for i in range(LANES):
                if not i & step:
                    pair = rows[i], rows[i + step]
                    rows[i], rows[i + step] = (builder.shuffle_vector(*pair, mask) for mask in masks)
            step *= 2
        for i in range(LANES):
            builder.store(rows[i], place(target, target_stride, i), align=4)
        return context.get_dummy_value()

    return signature, generate


@compiled(parallel=True)
def _pack_blocks(values, positions, packed, transposed, parts):
    """packed[b, k, h] = values[positions[b], h, k], or values[positions[b], k, h]; zeros up to the padded height."""
    blocks, width, padded_height = packed.shape
    height = values.shape[2] if transposed else values.shape[1]
    whole = not transposed and height % LANES == 0 and width % LANES == 0
    for part in prange(parts):
        for block in range(blocks * part // parts, blocks * (part + 1) // parts):
            source, target = values[positions[block]], packed[block]
            if whole:
                for h in range(0, height, LANES):
                    for k in range(0, width, LANES):
                        _transpose_square(source[h:, k:], target[k:, h:])
                continue
            for k in range(width):
                for h in range(height):
                    target[k, h] = source[k, h] if transposed else source[h, k]
                for h in range(height, padded_height):
                    target[k, h] = 0


@compiled()
def multiply_tile(tile, count, packed, height, columns, width, bias, result, vectors):
    """`_tile_product` for the first `count` tokens of a tile, in small steps if it is far from full."""
    if count > TILE - SMALL_TILE:
        if vectors == 2:
            _product_2_vectors(tile, packed, height, columns, width, bias, result)
        else:
            _product_1_vector(tile, packed, height, columns, width, bias, result)
        return
    for t in range(0, count, SMALL_TILE):
        if vectors == 2:
            _small_product_2_vectors(tile[:, t:], packed, height, columns, width, bias, result[t:])
        else:
            _small_product_1_vector(tile[:, t:], packed, height, columns, width, bias, result[t:])


@compiled()
def _fill_tile(input, count, tile):
    """tile[k, t] = input[t, k] for `count` tokens."""
    tokens, in_features = input.shape
    squares = 0
    if tokens >= TILE_ROWS:
        squares = in_features // LANES * LANES
        for k in range(0, squares, LANES):
            for t in range(0, TILE_ROWS, LANES):
                _transpose_square(input[t:, k:], tile[k:, t:])
    for t in range(count):
        for k in range(squares, in_features):
            tile[k, t] = input[t, k]


@compiled(parallel=True)
def _multiply(input, packed, offsets, columns, bias, output, height, bounds, tiles):
    """output = input @ matrix + bias. An item of work is a tile of tokens times the rows between two bounds.

    Args:
        input: (tokens, in).
        packed: (blocks, width, padded height).
        offsets: (rows of blocks + 1,).
        columns: (blocks,).
        bias: (rows of blocks * padded height or more,).
        output: (tokens, out).
        height: rows of a block that count.
        bounds: (groups + 1,) rows of blocks.
        tiles: (parts, rows that the blocks cover, TILE_ROWS) zeros; each part of the work copies its tokens here.
    """
    _, width, padded_height = packed.shape
    tokens, out_features = output.shape
    flat = packed.reshape(-1)
    groups, parts = bounds.shape[0] - 1, tiles.shape[0]
    items = -(-tokens // TILE) * groups
    for part in prange(parts):
        tile = tiles[part]
        edge = np.empty((TILE, 2 * LANES), np.float32)
        filled = -1
        for item in range(items * part // parts, items * (part + 1) // parts):
            base, group = item // groups * TILE, item % groups
            count = min(TILE, tokens - base)
            if base != filled:
                _fill_tile(input[base:], count, tile)
                filled = base
            for row in range(bounds[group], bounds[group + 1]):
                start, end = offsets[row], offsets[row + 1]
                for first in range(0, padded_height, 2 * LANES):
                    feature = row * height + first
                    vectors = min(2, (padded_height - first) // LANES)
                    kept = min(vectors * LANES, height - first, out_features - feature)
                    weights = flat[start * width * padded_height + first :]
                    result = output[base : base + count, feature:]
                    if count < TILE or kept < vectors * LANES:
                        result = edge[:, 0:]
                    multiply_tile(
                        tile, count, weights, padded_height, columns[start:end], width, bias[feature:], result, vectors
                    )
                    if count < TILE or kept < vectors * LANES:
                        for t in range(count):
                            for h in range(kept):
                                output[base + t, feature + h] = edge[t, h]


class Engine:
    """A matrix packed for products with float32 inputs.

    Args:
        values: (blocks, height, width) contiguous float32.
        offsets: (rows of blocks + 1,) int32, where each begins in the lists below.
        columns: (blocks,) int32, the block column of each block.
        positions: (blocks,) int32, its place in `values`, or None where that is the order already.
        transposed: the blocks are multiplied transposed: width is their output side.
        threads: how many to run on; numba must have been started with as many.
    """

    def __init__(self, values, offsets, columns, positions, transposed: bool, threads: int) -> None:
        self.height, self.width = values.shape[:0:-1] if transposed else values.shape[1:]
        self.threads = min(threads, numba.config.NUMBA_NUM_THREADS)
        self.offsets, self.columns = offsets, columns
        padded_height = -(-self.height // LANES) * LANES
        if positions is None:
            positions = np.arange(len(columns), dtype=np.int32)
        self.packed = np.empty((len(columns), self.width, padded_height), np.float32)
        run_on_threads(self.threads, _pack_blocks, values, positions, self.packed, transposed, self.threads)

    def multiply(self, input, bias, output) -> None:
        """Write input @ matrix + bias: (tokens, in), (out,) and (tokens, out), all contiguous float32."""
        rows = len(self.offsets) - 1
        items = -(-len(input) // TILE)
        groups = 1 if self.threads == 1 else max(1, min(rows, ITEMS_PER_THREAD * self.threads // max(1, items)))
        work = self.offsets + np.arange(rows + 1)  # blocks before each row of blocks, and a little for the row itself
        bounds = np.searchsorted(work, work[-1] * np.arange(groups + 1) // groups)
        columns = -(-input.shape[1] // self.width) * self.width
        tiles = np.zeros((self.threads, columns, TILE_ROWS), np.float32)
        shift = np.zeros(rows * self.height + 2 * LANES, np.float32)
        shift[: len(bias)] = bias
        blocks = self.packed, self.offsets, self.columns
        run_on_threads(self.threads, _multiply, input, *blocks, shift, output, self.height, bounds, tiles)
