"""The compiled CPU product. It needs numba, is compiled on first use and kept on disk where that can be written.

The tokens of a tile are copied next to each other, as integers where the weight has them, which is small beside the
products that register_tile.py makes. How the blocks are laid out for it, packing.py says.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,call-arg,attr-defined"
# mypy: disable-error-code="import-untyped,import-not-found"

import math
from typing import Any

import numba
import numpy as np
from numba import prange

from sdp_kernels.cpu_engine.packing import Packed
from sdp_kernels.cpu_engine.register_tile import (
    INT8,
    LANES,
    PIECES,
    TILE,
    TILE_ROWS,
    add_up_bytes,
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


@compiled()
def _gather_words(kind, tile, features, gathered):
    """Words of inputs that do not lie next to each other, for all tokens of a tile."""
    pieces = PIECES[kind]
    for word in range(len(features) // pieces):
        for i in range(pieces):
            feature = features[word * pieces + i]
            put_piece(tile[feature // pieces], 32 // pieces, feature % pieces, i, gathered[word])


@compiled()
def _fill_tiles(kind, input, count, tiles, bytes, terms):
    """The first `count` tokens, tile by tile; for INT8 as integers, with their zeros and scales in `terms`."""
    for tile in range(-(-count // TILE)):
        start = tile * TILE
        here = min(TILE, count - start)
        if kind == INT8:
            for t in range(here):
                quantize_token(input[start + t], bytes[t], terms[start + t])
            _fill_tile(bytes.view(np.float32), here, tiles[tile])
        else:
            _fill_tile(input[start:], here, tiles[tile])


@compiled()
def _multiply_row(
    kind, count, tiles, weights, padded_height, columns, width, gathered, rows, terms, output, kept, edge
):
    """Some tokens times one or two vectors of the output features of a row of blocks, of which `kept` count."""
    vectors = 2 if edge.shape[1] == 2 * LANES else 1
    first_word = np.zeros(1, np.int32)
    words = len(columns) // PIECES[kind] if len(gathered) else len(columns) * width
    if kind == INT8:
        add_up_bytes(vectors, weights, padded_height, words, rows)
    for start in range(0, count, TILE):
        tile, here = tiles[start // TILE], min(TILE, count - start)
        inside = here == TILE and kept == vectors * LANES
        result = output[start:, 0:] if inside else edge[0:, 0:]
        if len(gathered):
            _gather_words(kind, tile, columns, gathered)
            multiply_tile(
                kind, gathered, here, weights, padded_height, first_word, words, rows, terms[start:], result, vectors
            )
        else:
            multiply_tile(
                kind, tile, here, weights, padded_height, columns, width, rows, terms[start:], result, vectors
            )
        if not inside:
            for t in range(here):
                for h in range(kept):
                    output[start + t, h] = edge[t, h]


@compiled(parallel=True)
def _multiply(kind, input, packed, offsets, columns, gathered, rows, output, height, bounds, tiles):
    """output = input @ matrix + bias. An item of work is some tiles of tokens times the rows between two bounds.

    Args:
        kind: what a word holds.
        input: (tokens, words), or for INT8 (tokens, in) float32.
        packed: (blocks, words across, padded height) words.
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
    _, width, padded_height = packed.shape
    tokens, out_features = output.shape
    flat = packed.reshape(-1)
    parts, together, groups = tiles.shape[0], tiles.shape[1] * TILE, bounds.shape[0] - 1
    pieces = PIECES[kind] if gathered.shape[1] else 1
    items = -(-tokens // together) * groups
    for part in prange(parts):
        edge = np.empty((TILE, 2 * LANES), np.float32)
        terms = np.zeros((together + TILE, 2), np.float32)
        bytes = np.zeros((TILE_ROWS if kind == INT8 else 0, 4 * tiles.shape[2]), np.uint8)
        of_rows = np.zeros((3, 2 * LANES), np.float32)
        if kind != INT8:
            tiles[part, :, input.shape[1] :] = 0
        filled = -1
        for item in range(items * part // parts, items * (part + 1) // parts):
            base, group = item // groups * together, item % groups
            count = min(together, tokens - base)
            if base != filled:
                _fill_tiles(kind, input[base:], count, tiles[part], bytes, terms)
                filled = base
            for row in range(bounds[group], bounds[group + 1]):
                start, end = offsets[row], offsets[row + 1]
                for first in range(0, padded_height, 2 * LANES):
                    feature = row * height + first
                    lanes = min(2 * LANES, padded_height - first)
                    kept = min(lanes, height - first, out_features - feature)
                    of_rows[:2] = rows[:2, feature : feature + 2 * LANES]
                    _multiply_row(
                        kind,
                        count,
                        tiles[part],
                        flat[start * width * padded_height + first :],
                        padded_height,
                        columns[start * pieces : end * pieces],
                        width,
                        gathered[part],
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
        rows: (1, out) the bias; of an int8 matrix (2, out) bias and scales; float32.
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
    work = packed.offsets + np.arange(lines + 1)  # blocks before each row of blocks, and a little for the row itself
    bounds = np.searchsorted(work, work[-1] * np.arange(groups + 1) // groups)
    longest = int(np.diff(packed.offsets).max()) if packed.gathers else 0
    padded = np.zeros((3, lines * packed.height + 2 * LANES), np.float32)
    padded[: len(rows), : rows.shape[1]] = rows
    with lock:
        tiles = _room("tiles", threads, together, words, TILE_ROWS)
        gathered = _room("gathered", threads, longest, TILE_ROWS)
        matrix = packed.kind, input, packed.values, packed.offsets, packed.columns, gathered
        run_on_threads(threads, _multiply, *matrix, padded, output, packed.height, bounds, tiles)


_rooms: dict[str, Any] = {}  # to be used under the lock


def _room(name: str, *shape: int) -> Any:
    """Memory for what lives as long as a product, kept for the next one: fresh pages cost more than few tokens do."""
    size = math.prod(shape)
    if name not in _rooms or _rooms[name].size < size:
        _rooms[name] = np.empty(size, np.float32)
    return _rooms[name][:size].reshape(shape)
