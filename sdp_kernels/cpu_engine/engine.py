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

from sdp_kernels.cpu_engine.function_tile import FUNCTIONS
from sdp_kernels.cpu_engine.packing import WORDS, Packed
from sdp_kernels.cpu_engine.register_tile import (
    INT8,
    KINDS,
    PIECES,
    SPLITS,
    add_up_bytes,
    kind_of,
    multiply_rest,
    multiply_tiles,
    put_piece,
    split_tokens,
)
from sdp_kernels.cpu_engine.threads import compiled, lock, run_on_threads
from sdp_kernels.cpu_engine.token import quantize_token
from sdp_kernels.cpu_engine.vectors import LANES, TILE, TILE_ROWS, transpose_square

ITEMS_PER_THREAD = 8  # so that no thread waits long for another
TILES_BYTES = 2**20  # of the tiles that the rows of blocks pass by together: what they read of weights is read once
MOST_TILES = 32
TILES_PER_THREAD = 4  # or more, and each thread has tokens of its own
WEIGHTS_BYTES = 2**14  # of the weights that all of these tiles meet before the next: they stay in the first cache
NOTHING = np.zeros(0, np.float32)  # in place of a bias, or of scales


@compiled()
def fill_tile(input, count, tile):
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


def _fill_tiles(packed, input, count, tiles, gathers, bytes, terms):
    """The first `count` tokens, tile by tile; for INT8 as integers, with their zeros and scales in `terms`.

    Bytes are split, if they have to be, unless words are to be gathered from them first.
    """
    raise NotImplementedError


@overload(_fill_tiles)
def _(packed, input, count, tiles, gathers, bytes, terms):
    def copied(packed, input, count, tiles, gathers, bytes, terms):
        for start in range(0, count, TILE):
            fill_tile(input[start:], min(TILE, count - start), tiles[start // TILE])

    def quantized(packed, input, count, tiles, gathers, bytes, terms):
        rows = 1 if gathers else SPLITS[INT8]
        for start in range(0, count, TILE):
            here, tile = min(TILE, count - start), tiles[start // TILE]
            for t in range(here):
                quantize_token(input[start + t], bytes[t], terms[start + t])
            fill_tile(bytes.view(np.float32), here, tile[::rows])
            if not gathers:
                split_tokens(tile, len(tile) // rows)

    return quantized if KINDS[packed.dtype] == INT8 else copied


def _gather_words(packed, tile, features, gathered):
    """Words of inputs that do not lie next to each other, for all tokens of a tile."""
    raise NotImplementedError


@overload(_gather_words)
def _(packed, tile, features, gathered):
    kind = KINDS[packed.dtype]
    pieces = PIECES[kind]
    bits, rows = 32 // pieces, SPLITS[kind]

    def nothing(packed, tile, features, gathered):
        pass

    def gather(packed, tile, features, gathered):
        for word in range(len(features) // pieces):
            for i in range(pieces):
                feature = features[word * pieces + i]
                put_piece(tile[feature // pieces], bits, feature % pieces, i, gathered[word * rows])
        if rows > 1:
            split_tokens(gathered, len(features) // pieces)

    return nothing if pieces == 1 else gather


@compiled()
def _multiply_row(
    count, tiles, weights, height, columns, width, gathered, split, sums, rows, terms, output, edge, function
):
    """Some tokens times a row of blocks; `edge` takes what would be written beyond the last token or feature.

    All tokens meet some of the blocks before any meets the next: the weights then stay in the first cache, and so does
    what a tile gives all features.
    """
    kind, gathers = kind_of(weights), len(gathered) > 0
    pieces = PIECES[kind] if gathers else 1
    blocks, splits = len(columns) // pieces, SPLITS[kind]
    together = max(1, WEIGHTS_BYTES // (4 * height * splits * width))
    rows[2] = 0
    for begin in range(0, max(blocks, 1), together):
        end = min(begin + together, blocks)
        here, line, part = weights[begin * width * height :], height, 2 * LANES
        chosen, wide = columns[begin * pieces : end * pieces], width
        features = chosen
        if gathers:
            chosen, wide = np.zeros(1, np.int32), end - begin
        if kind == INT8:
            part_of_split = (end - begin) * width * splits * 2 * LANES
            for pair in range(sums.shape[1]):
                vectors, feature = min(2, height // LANES - 2 * pair), pair * 2 * LANES
                target = split[pair * part_of_split :]
                add_up_bytes(vectors, here[feature:], height, (end - begin) * width, rows[:, feature:], target)
            if splits > 1:
                here, line, part = split.view(weights.dtype), 2 * LANES, part_of_split
        ends = begin == 0, end == blocks
        inside = not gathers and output.shape[1] == height
        whole = count // TILE if inside else 0  # tiles whose results go where they belong at once
        for pair in range(sums.shape[1]):
            vectors, feature = min(2, height // LANES - 2 * pair), pair * 2 * LANES
            matrix, of_rows = (here[pair * part :], line, chosen, wide), rows[:, feature:]
            result = terms, output[:, feature:], function
            multiply_tiles(vectors, tiles[:whole], *matrix, sums[:, pair], *ends, of_rows, *result)
        for tile in range(whole, -(-count // TILE)):
            start = tile * TILE
            number, source = min(TILE, count - start), tiles[tile : tile + 1]
            if gathers:
                _gather_words(weights, tiles[tile], features, gathered)
                source = gathered.reshape(1, gathered.shape[0], TILE_ROWS)
            for pair in range(sums.shape[1]):
                vectors, feature = min(2, height // LANES - 2 * pair), pair * 2 * LANES
                matrix, of_rows = (here[pair * part :], line, chosen, wide), rows[:, feature:]
                totals, result = sums[tile : tile + 1, pair], (terms[start:], edge[:, feature:], function)
                multiply_rest(vectors, source, number, *matrix, totals, *ends, of_rows, *result)
            if end == blocks:
                for t in range(number):
                    output[start + t] = edge[t, : output.shape[1]]


@compiled(parallel=True)
def _multiply(input, packed, offsets, columns, gathered, split, bias, scales, output, height, bounds, tiles, function):
    """output = input @ matrix + bias, activated.

    An item of work is some tiles of tokens times the rows between two bounds.

    Args:
        input: (tokens, words), or for INT8 (tokens, in), float32.
        packed: (blocks, words across, padded height), of the type of what they hold.
        offsets: (rows of blocks + 1,), where each begins in `packed`.
        columns: (blocks,) the block column of each block, or the inputs in the pieces of each word.
        gathered: (parts, words, TILE_ROWS), room for the words of a row of blocks that are gathered piece by piece;
            no words where the columns are of blocks.
        split: (parts, words * padded height), room for the split words of a row of blocks, or empty.
        bias: (out,) or empty.
        scales: (out,) for INT8.
        output: (tokens, out).
        height: rows of a block that count.
        bounds: (groups + 1,) rows of blocks.
        tiles: (parts, tiles, words that the blocks cover, TILE_ROWS); each part of the work copies tokens here.
        function: place of the activation in FUNCTIONS.
    """
    parts = tiles.shape[0]
    for part in prange(parts):
        _multiply_part(
            part,
            parts,
            input,
            packed,
            offsets,
            columns,
            gathered[part],
            split[part],
            (bias, scales),
            output,
            height,
            bounds,
            tiles[part],
            function,
        )


@compiled()
def _multiply_part(
    part, parts, input, packed, offsets, columns, gathered, split, rows, output, height, bounds, tiles, function
):
    kind = kind_of(packed)
    _, width, padded_height = packed.shape
    tokens, out_features = output.shape
    flat = packed.reshape(-1)
    together, groups = tiles.shape[0] * TILE, bounds.shape[0] - 1
    pieces = PIECES[kind] if len(gathered) else 1
    items = -(-tokens // together) * groups
    edge = np.empty((TILE, padded_height), np.float32)
    sums = np.empty((tiles.shape[0], -(-padded_height // (2 * LANES)), TILE, 2 * LANES), np.float32)
    terms = np.zeros((together + TILE, 2), np.float32)
    words = tiles.shape[1] if len(gathered) else tiles.shape[1] // SPLITS[kind]
    bytes = np.zeros((TILE_ROWS if kind == INT8 else 0, 4 * words), np.uint8)
    of_rows = np.zeros((3, padded_height), np.float32)  # bias, scales, room for sums of the weights
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
            _fill_tiles(packed, input[base:], count, tiles, len(gathered) > 0, bytes, terms)
            filled = base
        for row in range(bounds[group], bounds[group + 1]):
            start, end = offsets[row], offsets[row + 1]
            feature = row * height
            kept = min(height, out_features - feature)
            for i in range(2):
                if len(rows[i]):
                    of_rows[i, :kept] = rows[i][feature : feature + kept]
            _multiply_row(
                count,
                tiles,
                flat[start * width * padded_height :],
                padded_height,
                columns[start * pieces : end * pieces],
                width,
                gathered,
                split,
                sums,
                of_rows,
                terms,
                output[base:, feature : feature + kept],
                edge,
                function,
            )


def multiply(packed: Packed, input, bias, scales, output, threads: int, activation: str | None = None) -> None:
    """Write input @ matrix + bias, activated.

    Args:
        packed: the matrix.
        input: (tokens, in) contiguous: float32, or bfloat16 as words (tokens, words) that hold two.
        bias: (out,) float32, or `NOTHING`.
        scales: of an int8 matrix (out,) float32, otherwise `NOTHING`.
        output: (tokens, out) contiguous float32.
        threads: how many to run on; no more than numba was started with.
        activation: one of FUNCTIONS.
    """
    threads = min(threads, numba.config.NUMBA_NUM_THREADS)
    lines = len(packed.offsets) - 1
    tiles = -(-len(input) // TILE)
    splits = SPLITS[WORDS.index(packed.values.dtype)]
    words = max(packed.words, 1) * (1 if packed.gathers else splits)
    together, items = _shares(tiles, max(1, min(MOST_TILES, TILES_BYTES // (words * TILE_ROWS * 4))), threads)
    groups = 1 if items % threads == 0 else max(1, min(lines, ITEMS_PER_THREAD * threads // items))
    bounds = packed.bounds(groups)
    padded_height = packed.values.shape[2]
    number = FUNCTIONS.index(activation)
    with lock:
        tiles = _room("tiles", threads, together, words, TILE_ROWS)
        gathered = _room("gathered", threads, packed.longest * splits if packed.gathers else 0, TILE_ROWS)
        of_row = packed.longest * packed.values.shape[1]
        split = _room("split", threads, of_row * splits * (padded_height + LANES) if splits > 1 else 0)
        matrix = input, packed.values, packed.offsets, packed.columns, gathered, split
        run_on_threads(threads, _multiply, *matrix, bias, scales, output, packed.height, bounds, tiles, number)


def _shares(tiles: int, most: int, threads: int) -> tuple[int, int]:
    """(tiles that are multiplied together, how often): about as many each time, and as often by each thread.

    Few tiles are multiplied by all threads, each with some of the rows of blocks, which then all convert the tokens.
    """
    times = max(1, -(-tiles // most))
    if tiles >= TILES_PER_THREAD * threads:
        times = -(-times // threads) * threads
    together = max(1, -(-tiles // times))
    return together, max(1, -(-tiles // together))


_rooms: dict[str, Any] = {}  # to be used under the lock


def _room(name: str, *shape: int) -> Any:
    """Memory for what lives as long as a product, kept for the next one: fresh pages cost more than few tokens do."""
    size = math.prod(shape)
    if name not in _rooms or _rooms[name].size < size:
        _rooms[name] = np.empty(size, np.float32)
    return _rooms[name][:size].reshape(shape)
