"""The compiled gradients of a masked weight and of its input, from the kept columns of the weight.

Both are sums of kept columns: the gradient of the input gathers them, the lanes of a vector being tokens; that of the
weight makes them, the lanes being outputs. What vectors are loaded from is copied next to each other beforehand,
because the same features of many tokens lie on as many pages of memory, and push each other out of the cache.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"
# mypy: disable-error-code="import-untyped,import-not-found"

import numpy as np
from numba import prange

from sdp_kernels.cpu_engine.column_tile import add_rows_product, transpose
from sdp_kernels.cpu_engine.threads import compiled
from sdp_kernels.cpu_engine.vectors import LANES

TOKENS = 512  # copied at a time for the gradient of the weight
FEW_TOKENS = 256  # multiplied at a time: what a register tile reads of them stays in the first cache
WIDTH = 2 * LANES  # of a register tile


@compiled()
def row_of(offsets, place):
    """The row of blocks whose list holds this place."""
    return np.searchsorted(offsets, place, side="right") - 1


@compiled(parallel=True)
def write_input_gradient(gradient, packed, offsets, columns, height, result, parts):
    """result = gradient @ weight, a tile of tokens at a time.

    Args:
        gradient: (tokens, out).
        packed: (columns, padded height) the kept columns of the weight.
        offsets: (rows of blocks + 1,) where each begins in the list of columns.
        columns: (columns,) their places in the weight.
        height: rows of a block.
        result: (tokens, in).
        parts: of the work.
    """
    tokens, in_features = result.shape
    starts, places = np.arange(len(packed)) * packed.shape[1], columns.astype(np.int64) * WIDTH
    tiles = -(-tokens // WIDTH)
    for part in prange(parts):
        slope = np.zeros((gradient.shape[1], WIDTH), np.float32)
        tile = np.empty((in_features + 1, WIDTH), np.float32)  # with a row to spare
        for item in range(tiles * part // parts, tiles * (part + 1) // parts):
            base, count = item * WIDTH, min(WIDTH, tokens - item * WIDTH)
            transpose(gradient[base : base + count], slope)
            tile[:] = 0
            for row in range(len(offsets) - 1):
                kept = slice(offsets[row], offsets[row + 1])
                matrix = slope[row * height :].reshape(-1)
                weights = packed.reshape(-1), starts[kept], height
                add_rows_product(*weights, matrix, WIDTH, tile.reshape(-1), places[kept], in_features * WIDTH, 2)
            transpose(tile[:in_features, :count], result[base : base + count])


@compiled(parallel=True)
def _copy_tokens(gradient, input, height, slopes, inputs, parts):
    """slopes[row, t, h] = gradient[t, row * height + h] and inputs[k, t] = input[t, k]."""
    tokens, in_features = input.shape
    for part in prange(parts):
        left, right = in_features * part // parts, in_features * (part + 1) // parts
        transpose(input[:, left:right], inputs[left:right])
        for t in range(tokens * part // parts, tokens * (part + 1) // parts):
            for row in range(len(slopes)):
                for h in range(height):
                    slopes[row, t, h] = gradient[t, row * height + h]


@compiled()
def _add_columns(inputs, starts, tokens, slope, packed, places):
    """Add to some columns of one row of blocks: the products of their inputs with the gradients of its outputs."""
    padded_height = packed.shape[1]
    spare = packed.size - padded_height
    for base in range(0, tokens, FEW_TOKENS):
        factors, some = inputs.reshape(-1)[base:], min(FEW_TOKENS, tokens - base)
        for top in range(0, padded_height, WIDTH):
            vectors = min(2, (padded_height - top) // LANES)
            matrix, result = slope[base:].reshape(-1)[top:], packed.reshape(-1)[top:]
            add_rows_product(factors, starts, some, matrix, padded_height, result, places, spare, vectors)


@compiled(parallel=True)
def add_weight_gradient(gradient, input, offsets, columns, height, packed, parts):
    """packed += the kept columns of gradient.T @ input; each part of the work has as many of them as any other.

    Args:
        gradient: (tokens, out).
        input: (tokens, in).
        offsets: (rows of blocks + 1,) where each begins in the list of columns.
        columns: (columns,) their places in the weight.
        height: rows of a block.
        packed: (columns + 1, padded height), the last row to spare.
        parts: of the work.
    """
    tokens, count = len(input), len(columns)
    most = min(TOKENS, tokens)
    slopes = np.zeros((len(offsets) - 1, most, packed.shape[1]), np.float32)
    inputs = np.empty((input.shape[1], most + LANES), np.float32)  # at a distance that is no power of two
    starts, places = columns.astype(np.int64) * inputs.shape[1], np.arange(count) * packed.shape[1]
    for base in range(0, tokens, TOKENS):
        some = min(TOKENS, tokens - base)
        _copy_tokens(gradient[base : base + some], input[base : base + some], height, slopes, inputs, parts)
        for part in prange(parts):
            first, last = count * part // parts, count * (part + 1) // parts
            while first < last:
                row = row_of(offsets, first)
                end = min(last, offsets[row + 1])
                _add_columns(inputs, starts[first:end], some, slopes[row], packed, places[first:end])
                first = end
