"""The compiled gradient of the kept blocks of a weight, with the register tiles of the block-sparse product.

A tile of a block's gradient, a few of its rows by one or two vectors of its columns, stays in registers while tokens
pass by. What a block takes from them is copied next to each other beforehand, because the same features of many tokens
lie on as many pages of memory, and push each other out of the cache.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"
# mypy: disable-error-code="import-untyped,import-not-found"

import numba
import numpy as np
import torch
from numba import prange

from sdp_kernels.cpu_engine.register_tile import LANES, TILE, TILE_ROWS, multiply_tile
from sdp_kernels.cpu_engine.threads import compiled, run_on_threads

TOKENS = 512  # copied at a time
FEW_TOKENS = 16  # copied at a time for one block: what is read and written then stays in the first cache


@compiled(parallel=True)
def _copy_inputs(input, width, blocks, parts):
    """blocks[j, t, c] = input[t, j * width + c]."""
    tokens = len(input)
    for part in prange(parts):
        for start in range(tokens * part // parts, tokens * (part + 1) // parts, FEW_TOKENS):
            end = min(start + FEW_TOKENS, tokens * (part + 1) // parts)
            for j in range(len(blocks)):
                for t in range(start, end):
                    for c in range(width):
                        blocks[j, t, c] = input[t, j * width + c]


@compiled(parallel=True)
def _copy_gradients(gradient, height, tiles, parts):
    """tiles[j, i, t, r] = gradient[t, j * height + i * TILE + r]."""
    tokens = len(gradient)
    for part in prange(parts):
        for start in range(tokens * part // parts, tokens * (part + 1) // parts, FEW_TOKENS):
            end = min(start + FEW_TOKENS, tokens * (part + 1) // parts)
            for j in range(len(tiles)):
                for i in range(tiles.shape[1]):
                    first = j * height + i * TILE
                    rows = min(TILE, height - i * TILE)
                    for t in range(start, end):
                        if rows == TILE:  # a loop of a length that is known becomes vectors
                            for r in range(TILE):
                                tiles[j, i, t, r] = gradient[t, first + r]
                        else:
                            for r in range(rows):
                                tiles[j, i, t, r] = gradient[t, first + r]


@compiled()
def _add_block(tiles, inputs, tokens, height, width, edge, result):
    """result += gradients of a row of blocks, transposed, times inputs of a column of blocks."""
    one_block, no_bias = np.zeros(1, np.int32), np.zeros((3, 2 * LANES), np.float32)
    no_terms = np.zeros((TILE, 2), np.float32)
    padded_width = inputs.shape[1]
    flat = inputs.reshape(-1)
    for i in range(len(tiles)):
        rows = min(TILE, height - i * TILE)
        for first in range(0, padded_width, 2 * LANES):
            vectors = min(2, (padded_width - first) // LANES)
            columns = min(vectors * LANES, width - first)
            weights = flat[first:]
            multiply_tile(tiles[i], rows, weights, padded_width, one_block, tokens, no_bias, no_terms, edge, vectors)
            for r in range(rows):
                for c in range(columns):
                    result[i * TILE + r, first + c] += edge[r, c]


@compiled(parallel=True)
def _add_blocks(gradient, input, rows, columns, height, width, result, parts):
    """Add to the kept blocks of the result; each part of the work has as many of them as any other."""
    most = min(TOKENS, len(input))
    blocks = np.zeros((input.shape[1] // width, most, -(-width // LANES) * LANES), np.float32)
    tiles = np.zeros((gradient.shape[1] // height, -(-height // TILE), most, TILE_ROWS), np.float32)
    for start in range(0, len(input), TOKENS):
        tokens = min(TOKENS, len(input) - start)
        _copy_inputs(input[start : start + tokens], width, blocks, parts)
        _copy_gradients(gradient[start : start + tokens], height, tiles, parts)
        for part in prange(parts):
            edge = np.empty((TILE, 2 * LANES), np.float32)
            for block in range(len(rows) * part // parts, len(rows) * (part + 1) // parts):
                row, column = rows[block], columns[block]
                corner = result[row * height :, column * width :]
                _add_block(tiles[row], blocks[column], tokens, height, width, edge, corner)


def add_weight_gradient(gradient, input, rows, columns, block_shape: tuple[int, int], result) -> None:
    """Add the gradient of the weight to its kept blocks.

    Args:
        gradient: (tokens, out) contiguous float32.
        input: (tokens, in) contiguous float32.
        rows: (blocks,) the block row of each kept block, ascending.
        columns: (blocks,) its block column.
        block_shape: (out, in) of a block.
        result: (out, in) contiguous float32.
    """
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    run_on_threads(threads, _add_blocks, gradient, input, rows, columns, *block_shape, result, threads)
