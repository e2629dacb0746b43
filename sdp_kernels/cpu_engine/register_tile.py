"""The innermost product: a tile of the output that stays in vector registers.

A tile, a few tokens by one or two vectors of output features, stays in registers while all blocks of a row pass by:
each weight vector that is loaded meets every token of the tile. LLVM does not find such a tile in scalar loops, so the
inner loops are given to it in vector form.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,call-arg,attr-defined"
# mypy: disable-error-code="import-untyped,import-not-found"

import functools

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sdp_kernels.cpu_engine.threads import compiled

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
def transpose_square(typing_context, source, target):
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
