"""The innermost product: a tile of the output that stays in vector registers.

A tile, a few tokens by one or two vectors of output features, stays in registers while all blocks of a row pass by:
each weight vector that is loaded meets every token of the tile. LLVM does not find such a tile in scalar loops, so the
inner loops are given to it in vector form.

What is loaded are words of 32 bits: one float32, two bfloat16 of neighbouring inputs, or four bytes of them. An
instruction multiplies all words of a vector and adds up what is in each. Which of them it is, the type of the array of
the weight tells, so that each has code of its own; inputs are carried as float32 whatever they hold.

Where no instruction multiplies bytes to exact sums, four bytes are split into two words: the even ones and the odd
ones, in 16 bits each, of which pairs are multiplied and added exactly. That is done once for many tiles of tokens, and
once for many rows of blocks, so that the innermost loop is the same for all.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,call-arg,attr-defined"
# mypy: disable-error-code="import-untyped,import-not-found,misc"

import functools
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sdp_kernels.cpu_engine.function_tile import emit_activation
from sdp_kernels.cpu_engine.threads import compiled
from sdp_kernels.cpu_engine.vectors import (
    BYTE,
    FEATURES,
    FLOAT,
    INDEX,
    INTEGERS,
    LANE,
    LANES,
    SHORT,
    SMALL_TILE,
    TILE,
    TILE_ROWS,
    VECTOR,
    array_of,
    called,
    multiply_floats,
    spread,
    strides,
    vector_at,
)

BIT = ir.IntType(1)

FLOAT32, BFLOAT16, INT8 = range(3)  # what a word holds
PIECES = (1, 2, 4)  # of them
LINE = 16  # words of a line of the cache


class _BFloat(ir.Type):
    """bfloat16, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


HAS_VNNI = LANES == 16 and "avx512vnni" in FEATURES
HAS_BFLOAT16 = LANES == 16 and "avx512bf16" in FEATURES
SPLITS = (1, 1, 1 if HAS_VNNI else 2)  # words that it is multiplied as: four bytes as two of 16 bits without VNNI
KINDS = {types.float32: FLOAT32, types.uint32: BFLOAT16, types.int32: INT8}  # by the type of the words of a weight
SHORTS, WIDE = ir.VectorType(SHORT, 2 * LANES), ir.VectorType(LANE, 2 * LANES)


def _tile_product(tokens: int):
    """The product of tiles of a few tokens with blocks next to each other, for one or two vectors of output features.

    What a token sums up to begins with 0 if this is the `first` product of these blocks' row, else with what `sums`
    holds. To it is added, over the blocks and words within,

        tiles[i, columns[block] * width + word, t] * packed[block, word],

    where `packed` is flat and begins with the first of the features; `height` is how many it has in all, and `width`
    counts words. If this is the `last` product, `result` gets what the sums come to, activated, by the kind of word:

    * FLOAT32, BFLOAT16: sums + rows[0];
    * INT8: (sums - terms[token, 0] * rows[2]) * (terms[token, 1] * rows[1]) + rows[0], where terms[token, 0] and
      rows[2] are integers, and what is in the brackets on the left too.

    Otherwise they go to `sums`, (tiles, tokens, two vectors); for INT8 as integers.
    """

    @intrinsic
    def tile_product(
        typing_context, vectors, tiles, packed, height, columns, width, sums, first, last, rows, terms, result, function
    ):
        index, flag = types.intp, types.boolean
        lead = (index, tiles, packed, index, columns, index)
        signature = types.void(*lead, sums, flag, flag, rows, terms, result, index)
        kind = KINDS[packed.dtype]

        def generate(context, builder, signature, args):
            places = (1, 2, 4, 6, 9, 10, 11)
            tiles, packed, columns, sums, rows, terms, result = (
                array_of(context, builder, signature, args, i) for i in places
            )
            given = [tiles.data, strides(builder, tiles)[0], cgutils.unpack_tuple(builder, tiles.shape)[0]]
            given += [builder.bitcast(packed.data, FLOAT.as_pointer()), args[3], columns.data]
            given += [cgutils.unpack_tuple(builder, columns.shape)[0], args[5], sums.data, strides(builder, sums)[0]]
            given += [builder.trunc(flag, BIT) for flag in args[7:9]]
            given += [rows.data, strides(builder, rows)[0], terms.data, result.data, strides(builder, result)[0]]
            for count in (1, 2):
                with builder.if_then(builder.icmp_signed("==", args[0], INDEX(count))):
                    builder.call(_product_function(builder.module, kind, count, tokens), [*given, args[12]])
            return context.get_dummy_value()

        return signature, generate

    return tile_product


class _Arguments(NamedTuple):
    """Those of the code of a product: places in memory, with how far it is to the next in words."""

    tiles: Any
    tile_stride: Any
    count: Any
    packed: Any
    height: Any
    columns: Any
    blocks: Any
    width: Any
    sums: Any
    sums_stride: Any
    first: Any
    last: Any
    rows: Any
    row_stride: Any
    terms: Any
    result: Any
    result_stride: Any
    function: Any


def _product_function(module, kind, vectors, tokens):
    """The code of `_tile_product` for one kind of word and one number of vectors; once however often it is called."""
    name = f"sdp_tile_product_{kind}_{vectors}_{tokens}"
    if name in module.globals:
        return module.globals[name]
    floats, lists = FLOAT.as_pointer(), LANE.as_pointer()
    kinds = _Arguments(
        *(floats, INDEX, INDEX, floats, INDEX, lists, INDEX, INDEX, floats, INDEX, BIT, BIT),
        *(floats, INDEX, floats, floats, INDEX, INDEX),
    )
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    given = _Arguments(*function.args)
    with cgutils.for_range(builder, given.count) as loop:
        _emit_tile(builder, kind, vectors, tokens, given, loop.index)
    builder.ret_void()
    return function


def _emit_tile(builder, kind, vectors, tokens, given, number):
    """The product of one tile."""
    grid = [(t, v) for t in range(tokens) for v in range(vectors)]
    word = INTEGERS if kind == INT8 else VECTOR
    totals = {spot: cgutils.alloca_once(builder, word) for spot in grid}  # LLVM turns these into registers
    sums = builder.gep(given.sums, [builder.mul(number, given.sums_stride)])
    token = builder.mul(number, INDEX(tokens))
    result = builder.gep(given.result, [builder.mul(token, given.result_stride)])
    places = {
        (t, v): builder.bitcast(vector_at(builder, sums, INDEX((2 * t + v) * LANES)), word.as_pointer())
        for t, v in grid
    }
    with builder.if_else(given.first) as (begins, goes_on):
        with begins:
            for spot in grid:
                builder.store(ir.Constant(word, None), totals[spot])
        with goes_on:
            for spot in grid:
                builder.store(builder.load(places[spot], align=4), totals[spot])
    with builder.if_then(given.last):
        # They lie on as many pages, so that no CPU guesses the next, and waits for each while it is written.
        for t in range(tokens):
            _expect_write(builder, builder.gep(result, [builder.mul(given.result_stride, INDEX(t))]), vectors)

    tile = builder.gep(given.tiles, [builder.mul(number, given.tile_stride)])
    _emit_sums(builder, kind, vectors, tokens, given, tile, totals)

    with builder.if_else(given.last) as (ends, is_kept):
        with is_kept:
            for spot in grid:
                builder.store(builder.load(totals[spot]), places[spot], align=4)
        with ends:
            _emit_result(builder, kind, vectors, tokens, given, token, totals, result)


def _emit_sums(builder, kind, vectors, tokens, given, tile, totals):
    """Add the products of one tile with all blocks."""
    multiply_add = {FLOAT32: multiply_floats, BFLOAT16: _multiply_bfloats, INT8: _multiply_bytes}[kind]
    splits = SPLITS[kind]
    with cgutils.for_range(builder, given.blocks) as block_loop:
        column = builder.sext(builder.load(builder.gep(given.columns, [block_loop.index])), INDEX)
        corner = builder.gep(tile, [builder.mul(column, builder.mul(given.width, INDEX(splits * TILE_ROWS)))])
        begin = builder.mul(block_loop.index, builder.mul(given.width, given.height))
        with cgutils.for_range(builder, given.width) as loop:
            for split in range(splits):
                row = builder.add(builder.mul(loop.index, INDEX(splits)), INDEX(split))
                here = builder.add(builder.mul(begin, INDEX(splits)), builder.mul(row, given.height))
                weights = [
                    builder.load(vector_at(builder, given.packed, here, INDEX(v * LANES)), align=4)
                    for v in range(vectors)
                ]
                factors = builder.gep(corner, [builder.mul(row, INDEX(TILE_ROWS))])
                for t in range(tokens):
                    factor = spread(builder, builder.load(builder.gep(factors, [INDEX(t)])))
                    for v in range(vectors):
                        total = multiply_add(builder, builder.load(totals[t, v]), factor, weights[v])
                        builder.store(total, totals[t, v])


def _emit_result(builder, kind, vectors, tokens, given, token, totals, result):
    """Write what the sums of one tile come to."""
    for v in range(vectors):
        bias, *of_rows = (
            builder.load(
                vector_at(builder, given.rows, builder.mul(given.row_stride, INDEX(i)), INDEX(v * LANES)), align=4
            )
            for i in range(3 if kind == INT8 else 1)
        )
        for t in range(tokens):
            total = builder.load(totals[t, v])
            if kind == INT8:
                term = builder.gep(given.terms, [builder.mul(builder.add(token, INDEX(t)), INDEX(2))])
                total = _scaled(builder, total, term, *of_rows)
            place = vector_at(builder, result, builder.mul(given.result_stride, INDEX(t)), INDEX(v * LANES))
            builder.store(builder.fadd(total, bias), place, align=4)
    emit_activation(builder, given.function, result, given.result_stride, tokens, vectors)


def _expect_write(builder, place, vectors):
    fetch = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), LANE, LANE, LANE])
    function = cgutils.get_or_insert_function(builder.module, fetch, "llvm.prefetch.p0")
    for start in range(0, vectors * LANES, LINE):
        line = builder.bitcast(builder.gep(place, [INDEX(start)]), BYTE.as_pointer())
        builder.call(function, [line, LANE(1), LANE(3), LANE(1)])


def _multiply_bfloats(builder, total, factor, weights):
    """Two products a lane."""
    pair = ir.VectorType(_BFloat(), 2 * LANES)
    factor, weights = (builder.bitcast(vector, pair) for vector in (factor, weights))
    return called(builder, f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}", VECTOR, total, factor, weights)


def _multiply_bytes(builder, total, factor, weights):
    """Four products a lane, of unsigned bytes of the input with signed ones of the weight; two, of what is split."""
    if HAS_VNNI:
        factor, weights = (builder.bitcast(vector, INTEGERS) for vector in (factor, weights))
        name = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}"
        return called(builder, name, INTEGERS, total, factor, weights)
    # LLVM has instructions for this pattern: pmaddwd on x86
    factor, weights = (builder.sext(builder.bitcast(vector, SHORTS), WIDE) for vector in (factor, weights))
    products = builder.mul(factor, weights)
    for side in range(2):
        lanes = ir.Constant(INTEGERS, [2 * lane + side for lane in range(LANES)])
        total = builder.add(total, builder.shuffle_vector(products, products, lanes))
    return total


def _split_bytes(builder, words, signed):
    """The even and the odd bytes of words as 16 bits."""
    words = builder.bitcast(words, SHORTS)
    eight = ir.Constant(SHORTS, [8] * (2 * LANES))
    if signed:
        return builder.ashr(builder.shl(words, eight), eight), builder.ashr(words, eight)
    return builder.and_(words, ir.Constant(SHORTS, [255] * (2 * LANES))), builder.lshr(words, eight)


def _scaled(builder, total, term, scales, sums):
    """(total - zero * sums) * (scale of the token * scales)."""
    zero, scale = (spread(builder, builder.load(builder.gep(term, [INDEX(i)]))) for i in range(2))
    zero, sums = (builder.bitcast(vector, INTEGERS) for vector in (zero, sums))
    exact = builder.sitofp(builder.sub(total, builder.mul(zero, sums)), VECTOR)
    return builder.fmul(exact, builder.fmul(scale, scales))


@intrinsic
def kind_of(typing_context, packed):
    """What the words of a weight hold, known where it is compiled."""
    kind = KINDS[packed.dtype]

    def generate(context, builder, signature, args):
        return INDEX(kind)

    return types.intp(packed), generate


@intrinsic
def add_up_bytes(typing_context, vectors, packed, height, words, rows, split):
    """rows[2] += the sums of the INT8 weights of one or two vectors of output features, `words` of them in a row.

    Made anew in each product, beside many times as much work, so that they are those of the weights as they are now.
    Where bytes are split, `split` gets the weights so: (words, splits, two vectors), the second perhaps left out.
    """
    signature = types.void(types.intp, packed, types.intp, types.intp, rows, split)
    chains = 4  # of additions that wait for each other

    def generate(context, builder, signature, args):
        count, height, words = args[0], args[2], args[3]
        packed, rows, split = (array_of(context, builder, signature, args, i) for i in (1, 4, 5))
        line = builder.mul(strides(builder, rows)[0], INDEX(2))
        step = INDEX(2 * LANES)
        for v in range(2):
            with builder.if_then(builder.icmp_signed("<", INDEX(v), count)):
                sums = [cgutils.alloca_once_value(builder, ir.Constant(INTEGERS, None)) for _ in range(chains)]
                for total in sums:  # not only once, where the entry of the function puts it
                    builder.store(ir.Constant(INTEGERS, None), total)

                def add(word, total, v=v):
                    place = vector_at(builder, packed.data, builder.mul(word, height), INDEX(v * LANES))
                    weights = builder.load(place, align=4)
                    if SPLITS[INT8] == 1:
                        added = ir.Constant(INTEGERS, [0x01010101] * LANES), weights
                    else:
                        pieces = _split_bytes(builder, weights, signed=True)
                        for i, piece in enumerate(pieces):
                            here = builder.mul(builder.add(builder.mul(word, INDEX(2)), INDEX(i)), step)
                            target = vector_at(builder, split.data, here, INDEX(v * LANES))
                            builder.store(builder.bitcast(piece, VECTOR), target, align=4)
                        added = ir.Constant(SHORTS, [1] * (2 * LANES)), builder.add(*pieces)
                    builder.store(_multiply_bytes(builder, builder.load(total), *added), total)

                whole = builder.sdiv(words, INDEX(chains))
                with cgutils.for_range(builder, whole) as loop:
                    for i in range(chains):
                        add(builder.add(builder.mul(loop.index, INDEX(chains)), INDEX(i)), sums[i])
                with cgutils.for_range(builder, words, start=builder.mul(whole, INDEX(chains))) as loop:
                    add(loop.index, sums[0])
                place = builder.bitcast(vector_at(builder, rows.data, line, INDEX(v * LANES)), INTEGERS.as_pointer())
                parts = [builder.load(place, align=4), *map(builder.load, sums)]
                builder.store(functools.reduce(builder.add, parts), place, align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def split_tokens(typing_context, tile, words):
    """Split the bytes of the first `words` rows of a tile; each begins where the rows lie that it becomes."""
    signature = types.void(tile, types.intp)

    def generate(context, builder, signature, args):
        data = array_of(context, builder, signature, args, 0).data
        if SPLITS[INT8] > 1:
            with cgutils.for_range(builder, args[1]) as loop:
                row = builder.mul(loop.index, INDEX(SPLITS[INT8] * TILE_ROWS))
                for start in range(0, TILE_ROWS, LANES):
                    source = vector_at(builder, data, row, INDEX(start))
                    for i, piece in enumerate(_split_bytes(builder, builder.load(source, align=4), signed=False)):
                        target = vector_at(builder, data, row, INDEX(i * TILE_ROWS + start))
                        builder.store(builder.bitcast(piece, VECTOR), target, align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def put_piece(typing_context, source, bits, taken, put, target):
    """Put the piece `taken` of each word of the source, `bits` wide, into the words of the target, in place of `put`.

    Pieces come in order: that of place 0 clears the others.
    """
    signature = types.void(source, types.intp, types.intp, types.intp, target)

    def generate(context, builder, signature, args):
        source, target = (array_of(context, builder, signature, args, i) for i in (0, 4))
        bits, taken, put = (builder.trunc(args[i], LANE) for i in (1, 2, 3))
        first = builder.icmp_signed("==", put, LANE(0))
        ones = builder.sub(builder.shl(LANE(1), bits), LANE(1))
        down, up, mask = (spread(builder, n) for n in (builder.mul(taken, bits), builder.mul(put, bits), ones))
        zero = ir.Constant(INTEGERS, None)
        for start in range(0, TILE_ROWS, LANES):
            words, place = (
                builder.bitcast(vector_at(builder, array.data, INDEX(start)), INTEGERS.as_pointer())
                for array in (source, target)
            )
            piece = builder.and_(builder.lshr(builder.load(words, align=4), down), mask)
            before = builder.select(first, zero, builder.load(place, align=4))
            builder.store(builder.or_(before, builder.shl(piece, up)), place, align=4)
        return context.get_dummy_value()

    return signature, generate


multiply_tiles, _small_product = _tile_product(TILE), _tile_product(SMALL_TILE)


@compiled()
def multiply_rest(
    vectors, tiles, count, packed, height, columns, width, sums, first, last, rows, terms, result, function
):
    """`_tile_product` of one tile for its first `count` tokens, in small steps if it is far from full.

    `tiles` and `sums` hold that tile alone; all rows of the result, as many as a tile has tokens, may be written.
    """
    at_ends = first, last, rows
    if count > TILE - SMALL_TILE:
        multiply_tiles(vectors, tiles, packed, height, columns, width, sums, *at_ends, terms, result, function)
        return
    for t in range(0, count, SMALL_TILE):
        tile, total = tiles[:, :, t:], sums[:, t:]
        _small_product(vectors, tile, packed, height, columns, width, total, *at_ends, terms[t:], result[t:], function)
