"""The compiled CPU product. It needs numba, is compiled on first use and kept on disk where that can be written.

The blocks are repacked with their output features innermost, the tokens of a tile copied next to each other; both are
small beside the products, which register_tile.py makes.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,call-arg,attr-defined"
# mypy: disable-error-code="import-untyped,import-not-found"

import numba
import numpy as np
from numba import prange

from sdp_kernels.cpu_engine.register_tile import LANES, TILE, TILE_ROWS, multiply_tile, transpose_square
from sdp_kernels.cpu_engine.threads import compiled, run_on_threads

ITEMS_PER_THREAD = 8  # so that no thread waits long for another


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
                        transpose_square(source[h:, k:], target[k:, h:])
                continue
            for k in range(width):
                for h in range(height):
                    target[k, h] = source[k, h] if transposed else source[h, k]
                for h in range(height, padded_height):
                    target[k, h] = 0


@compiled()
def _fill_tile(input, count, tile):
    """tile[k, t] = input[t, k] for `count` tokens."""
    tokens, in_features = input.shape
    squares = 0
    if tokens >= TILE_ROWS:
        squares = in_features // LANES * LANES
        for k in range(0, squares, LANES):
            for t in range(0, TILE_ROWS, LANES):
                transpose_square(input[t:, k:], tile[k:, t:])
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
