"""The compiled CPU product. It needs numba, is compiled on first use and kept on disk where that can be written.

The tokens of a tile are copied next to each other, as integers where the weight has them, which is small beside the
products that register_tile.py makes. How the blocks are laid out for it, packing.py says.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,call-arg,attr-defined"
# mypy: disable-error-code="import-untyped,import-not-found,unreachable,var-annotated"

import math
from typing import Any

import numba
import numpy as np
from numba import prange
from numba.extending import overload

from sdp_kernels.cpu_engine.packing import Packed
from sdp_kernels.cpu_engine.register_tile import (
    INT8,
    KINDS,
    LANES,
    PIECES,
    TILE,
    TILE_ROWS,
    add_up_bytes,
    kind_of,
    multiply_tile,
    put_piece,
    transpose_square,
)
from sdp_kernels.cpu_engine.threads import compiled, lock, run_on_threads
from sdp_kernels.cpu_engine.token import quantize_token

ITEMS_PER_THREAD = 8  # so that no thread waits long for another
TILES_BYTES = 2**18  # of the tiles that the rows of blocks pass by together: they stay in the second cache
MOST_TILES = 16


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


def _fill_tiles(packed, input, count, tiles, bytes, terms):
    """The first `count` tokens, tile by tile; for INT8 as integers, with their zeros and scales in `terms`."""
    raise NotImplementedError


@overload(_fill_tiles)
def _(packed, input, count, tiles, bytes, terms):
    def copied(packed, input, count, tiles, bytes, terms):
        for start in range(0, count, TILE):
            _fill_tile(input[start:], min(TILE, count - start), tiles[start // TILE])

    def quantized(packed, input, count, tiles, bytes, terms):
        for start in range(0, count, TILE):
            here = min(TILE, count - start)
            for t in range(here):
                quantize_token(input[start + t], bytes[t], terms[start + t])
            _fill_tile(bytes.view(np.float32), here, tiles[start // TILE])

    return quantized if KINDS[packed.dtype] == INT8 else copied


def _gather_words(packed, tile, features, gathered):
    """Words of inputs that do not lie next to each other, for all tokens of a tile."""
    raise NotImplementedError


@overload(_gather_words)
def _(packed, tile, features, gathered):
    pieces = PIECES[KINDS[packed.dtype]]
    bits = 32 // pieces

    def nothing(packed, tile, features, gathered):
        pass

    def gather(packed, tile, features, gathered):
        for word in range(len(features) // pieces):
            for i in range(pieces):
                feature = features[word * pieces + i]
                put_piece(tile[feature // pieces], bits, feature % pieces, i, gathered[word])

    return nothing if pieces == 1 else gather


@compiled()
def _multiply_row(count, tiles, weights, padded_height, columns, width, gathered, rows, terms, output, kept, edge):
    """Some tokens times one or two vectors of the output features of a row of blocks, of which `kept` count."""
    vectors = edge.shape[1] // LANES
    words = len(columns) * width
    if len(gathered):
        columns, features, width = np.zeros(1, np.int32), columns, len(columns) // PIECES[kind_of(weights)]
        words = width
    else:
        features = columns
    if kind_of(weights) == INT8:
        add_up_bytes(vectors, weights, padded_height, words, rows)
    for start in range(0, count, TILE):
        tile, here = tiles[start // TILE], min(TILE, count - start)
        if len(gathered):
            _gather_words(weights, tile, features, gathered)
            tile = gathered
        inside = here == TILE and kept == vectors * LANES
        result = output[start:, 0:] if inside else edge[0:, 0:]
        multiply_tile(tile, here, weights, padded_height, columns, width, rows, terms[start:], result, vectors)
        if not inside:
            for t in range(here):
                for h in range(kept):
                    output[start + t, h] = edge[t, h]


@compiled(parallel=True)
def _multiply(input, packed, offsets, columns, gathered, rows, output, height, bounds, tiles):
    """output = input @ matrix + bias. An item of work is some tiles of tokens times the rows between two bounds.

    Args:
        input: (tokens, words), or for INT8 (tokens, in), float32.
        packed: (blocks, words across, padded height), of the type of what they hold.
        offsets: (rows of blocks + 1,), where each begins in `packed`.
        columns: (blocks,) the block column of each block, or the inputs in the pieces of each word.
        gathered: (parts, words, TILE_ROWS), room for the words of a row of blocks that are gathered piece by piece;
            no words where the columns are of blocks.
        rows: (3, rows of blocks * padded height or more): bias; for INT8 the scales, and room for sums of the weights.
        output: (tokens, out).
        height: rows of a block that count.
        bounds: (groups + 1,) rows of blocks.
        tiles: (parts, tiles, words that the blocks cover, TILE_ROWS); each part of the work copies tokens here.
    """
    parts = tiles.shape[0]
    for part in prange(parts):
        _multiply_part(
            part, parts, input, packed, offsets, columns, gathered[part], rows, output, height, bounds, tiles[part]
        )


@compiled()
def _multiply_part(part, parts, input, packed, offsets, columns, gathered, rows, output, height, bounds, tiles):
    kind = kind_of(packed)
    _, width, padded_height = packed.shape
    tokens, out_features = output.shape
    flat = packed.reshape(-1)
    together, groups = tiles.shape[0] * TILE, bounds.shape[0] - 1
    pieces = PIECES[kind] if len(gathered) else 1
    items = -(-tokens // together) * groups
    edge = np.empty((TILE, 2 * LANES), np.float32)
    terms = np.zeros((together + TILE, 2), np.float32)
    bytes = np.zeros((TILE_ROWS if kind == INT8 else 0, 4 * tiles.shape[1]), np.uint8)
    of_rows = np.zeros((3, 2 * LANES), np.float32)
    if kind != INT8:
        for tile in range(len(tiles)):
            for word in range(input.shape[1], tiles.shape[1]):
                for t in range(TILE_ROWS):
                    tiles[tile, word, t] = 0
    filled = -1
    for item in range(items * part // parts, items * (part + 1) // parts):
        base, group = item // groups * together, item % groups
        count = min(together, tokens - base)
        if base != filled:
            _fill_tiles(packed, input[base:], count, tiles, bytes, terms)
            filled = base
        for row in range(bounds[group], bounds[group + 1]):
            start, end = offsets[row], offsets[row + 1]
            for first in range(0, padded_height, 2 * LANES):
                feature = row * height + first
                lanes = min(2 * LANES, padded_height - first)
                kept = min(lanes, height - first, out_features - feature)
                for i in range(2):
                    for lane in range(2 * LANES):
                        of_rows[i, lane] = rows[i, feature + lane]
                _multiply_row(
                    count,
                    tiles,
                    flat[start * width * padded_height + first :],
                    padded_height,
                    columns[start * pieces : end * pieces],
                    width,
                    gathered,
                    of_rows,
                    terms,
                    output[base:, feature:],
                    kept,
                    edge[:, :lanes],
                )


def multiply(packed: Packed, input, rows, output, threads: int) -> None:
    """Write input @ matrix + bias.

    Args:
        packed: the matrix.
        input: (tokens, in) contiguous: float32, or bfloat16 as words (tokens, words) that hold two.
        rows: the bias, (out,), or nothing; of an int8 matrix bias and scales; float32.
        output: (tokens, out) contiguous float32.
        threads: how many to run on; no more than numba was started with.
    """
    threads = min(threads, numba.config.NUMBA_NUM_THREADS)
    lines = len(packed.offsets) - 1
    tiles = -(-len(input) // TILE)
    words = max(packed.words, 1)
    together = max(1, min(MOST_TILES, tiles, TILES_BYTES // (words * TILE_ROWS * 4)))
    items = max(1, -(-tiles // together))
    groups = 1 if threads == 1 else max(1, min(lines, ITEMS_PER_THREAD * threads // items))
    bounds = packed.bounds(groups)
    width = lines * packed.height + 2 * LANES
    with lock:
        of_rows = _room("rows", 3, width)
        for line, given in zip(of_rows, rows, strict=False):
            known = 0 if given is None else len(given)
            line[:known] = given
            line[known:] = 0
        tiles = _room("tiles", threads, together, words, TILE_ROWS)
        gathered = _room("gathered", threads, packed.longest if packed.gathers else 0, TILE_ROWS)
        matrix = input, packed.values, packed.offsets, packed.columns, gathered
        run_on_threads(threads, _multiply, *matrix, of_rows, output, packed.height, bounds, tiles)


_rooms: dict[str, Any] = {}  # to be used under the lock


def _room(name: str, *shape: int) -> Any:
    """Memory for what lives as long as a product, kept for the next one: fresh pages cost more than few tokens do."""
    size = math.prod(shape)
    if name not in _rooms or _rooms[name].size < size:
        _rooms[name] = np.empty(size, np.float32)
    return _rooms[name][:size].reshape(shape)
