"""Register tiles for products with some of the rows of a matrix, each of which is found by where it begins."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,call-arg,attr-defined"
# mypy: disable-error-code="import-untyped,import-not-found"

import itertools

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sdp_kernels.cpu_engine.threads import compiled
from sdp_kernels.cpu_engine.vectors import (
    INDEX,
    LANES,
    SMALL_TILE,
    TILE,
    VECTOR,
    array_of,
    multiply_floats,
    spread,
    transpose_square,
    vector_at,
)


def _rows_product(vectors: int, rows: int):
    """The products of rows of numbers, a few at a time, with `vectors` vectors of the columns of a matrix.

    result[places[j] + lane] += sum over k < length of factors[starts[j] + k] * matrix[k * stride + lane], for as many
    j as fill whole tiles; all arrays are flat.
    """

    @intrinsic
    def rows_product(typing_context, factors, starts, length, matrix, stride, result, places):
        signature = types.void(factors, starts, types.intp, matrix, types.intp, result, places)

        def generate(context, builder, signature, args):
            arrays = [array_of(context, builder, signature, args, i) for i in (0, 1, 3, 5, 6)]
            factors, starts, matrix, result, places = (array.data for array in arrays)
            length, stride = args[2], args[4]
            (count,) = cgutils.unpack_tuple(builder, arrays[1].shape)
            sums = [[cgutils.alloca_once(builder, VECTOR) for _ in range(vectors)] for _ in range(rows)]
            with cgutils.for_range(builder, builder.sdiv(count, INDEX(rows))) as tiles:
                first = builder.mul(tiles.index, INDEX(rows))
                numbers = [builder.add(first, INDEX(j)) for j in range(rows)]
                lines = [builder.gep(factors, [builder.load(builder.gep(starts, [j]))]) for j in numbers]
                for vector in itertools.chain(*sums):
                    builder.store(ir.Constant(VECTOR, [0.0] * LANES), vector)
                with cgutils.for_range(builder, length) as loop:
                    here = builder.mul(loop.index, stride)
                    spots = [vector_at(builder, matrix, here, INDEX(v * LANES)) for v in range(vectors)]
                    columns = [builder.load(spot, align=4) for spot in spots]
                    for line, tile_row in zip(lines, sums, strict=True):
                        factor = spread(builder, builder.load(builder.gep(line, [loop.index])))
                        for v in range(vectors):
                            total = multiply_floats(builder, builder.load(tile_row[v]), factor, columns[v])
                            builder.store(total, tile_row[v])
                for j, tile_row in zip(numbers, sums, strict=True):
                    place = builder.load(builder.gep(places, [j]))
                    for v in range(vectors):
                        target = vector_at(builder, result, place, INDEX(v * LANES))
                        total = builder.fadd(builder.load(target, align=4), builder.load(tile_row[v]))
                        builder.store(total, target, align=4)
            return context.get_dummy_value()

        return signature, generate

    return rows_product


_product_2_vectors = _rows_product(2, TILE)
_product_1_vector = _rows_product(1, TILE)
_small_product_2_vectors = _rows_product(2, SMALL_TILE)
_small_product_1_vector = _rows_product(1, SMALL_TILE)


@compiled()
def add_rows_product(factors, starts, length, matrix, stride, result, places, spare, vectors):
    """`_rows_product` for all rows: whole tiles, and what is left in small ones that write their rest to `spare`."""
    whole = len(starts) // TILE * TILE
    if vectors == 2:
        _product_2_vectors(factors, starts, length, matrix, stride, result, places)
    else:
        _product_1_vector(factors, starts, length, matrix, stride, result, places)
    rest = len(starts) - whole
    if rest == 0:
        return
    last_starts, last_places = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
    for j in range(TILE):
        last_starts[j] = starts[whole + min(j, rest - 1)]
        last_places[j] = places[whole + j] if j < rest else spare
    some = -(-rest // SMALL_TILE) * SMALL_TILE
    if vectors == 2:
        _small_product_2_vectors(factors, last_starts[:some], length, matrix, stride, result, last_places)
    else:
        _small_product_1_vector(factors, last_starts[:some], length, matrix, stride, result, last_places)


@compiled()
def transpose(source, target):
    """target[j, i] = source[i, j], squares in registers."""
    rows, columns = source.shape
    whole_rows, whole_columns = rows // LANES * LANES, columns // LANES * LANES
    for i in range(0, whole_rows, LANES):
        for j in range(0, whole_columns, LANES):
            transpose_square(source[i:, j:], target[j:, i:])
    for i in range(rows):
        for j in range(whole_columns if i < whole_rows else 0, columns):
            target[j, i] = source[i, j]
