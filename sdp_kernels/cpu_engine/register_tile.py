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

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sdp_kernels.cpu_engine.threads import compiled

FLOAT, INDEX = ir.FloatType(), ir.IntType(64)
LANE, SHORT, BYTE = ir.IntType(32), ir.IntType(16), ir.IntType(8)
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


def _cpu_features() -> set[str]:
    """What the code may use: those of this CPU, or those that numba is told to compile for."""
    told = numba.config.CPU_FEATURES
    if told is not None:
        return {feature[1:] for feature in told.split(",") if feature.startswith("+")}
    return {name for name, has in llvmlite.binding.get_host_cpu_features().items() if has}


def _vector_registers(features: set[str]) -> tuple[int, int]:
    """(floats in a vector register, tokens of a tile): two vectors a token, two weights and a factor must fit."""
    if "avx512f" in features:
        return 16, 12  # 32 registers
    if "avx" in features:
        return 8, 6  # 16 registers
    return 4, 12  # 32 registers on ARM; whatever else there is, LLVM makes do with what it has


_FEATURES = _cpu_features()
LANES, TILE = _vector_registers(_FEATURES)
HAS_VNNI = LANES == 16 and "avx512vnni" in _FEATURES
HAS_BFLOAT16 = LANES == 16 and "avx512bf16" in _FEATURES
SPLITS = (1, 1, 1 if HAS_VNNI else 2)  # words that it is multiplied as: four bytes as two of 16 bits without VNNI
KINDS = {types.float32: FLOAT32, types.uint32: BFLOAT16, types.int32: INT8}  # by the type of the words of a weight
SMALL_TILE = TILE // 3
TILE_ROWS = -(-TILE // LANES) * LANES  # so that whole squares can be transposed into a tile
VECTOR, INTEGERS = ir.VectorType(FLOAT, LANES), ir.VectorType(LANE, LANES)
SHORTS, WIDE = ir.VectorType(SHORT, 2 * LANES), ir.VectorType(LANE, 2 * LANES)


def array_of(context, builder, signature, args, position):
    """The record of an array argument: data, strides, shape."""
    return context.make_array(signature.args[position])(context, builder, args[position])


def _strides(builder, array):
    """Strides in floats."""
    return [builder.sdiv(stride, INDEX(4)) for stride in cgutils.unpack_tuple(builder, array.strides)]


def vector_at(builder, pointer, *offsets):
    offset = functools.reduce(builder.add, offsets)
    return builder.bitcast(builder.gep(pointer, [offset]), VECTOR.as_pointer())


def _tile_product(tokens: int):
    """The product of a few tokens with blocks next to each other, for one or two vectors of output features.

    sums[t] += sum over the blocks, and words within, of tile[columns[block] * width + word, t] * packed[block, word],
    where `packed` is flat and begins with the first of the features; `height` is how many it has in all, and `width`
    counts words. Rows of `sums` are two vectors long; for INT8 they hold integers.
    """

    @intrinsic
    def tile_product(typing_context, vectors, tile, packed, height, columns, width, sums):
        signature = types.void(types.intp, tile, packed, types.intp, columns, types.intp, sums)
        kind = KINDS[packed.dtype]

        def generate(context, builder, signature, args):
            tile, packed, columns, sums = (array_of(context, builder, signature, args, i) for i in (1, 2, 4, 6))
            (blocks,) = cgutils.unpack_tuple(builder, columns.shape)
            weights = builder.bitcast(packed.data, FLOAT.as_pointer())
            given = [tile.data, weights, args[3], columns.data, blocks, args[5], sums.data]
            for count in (1, 2):
                with builder.if_then(builder.icmp_signed("==", args[0], INDEX(count))):
                    builder.call(_product_function(builder.module, kind, count, tokens), given)
            return context.get_dummy_value()

        return signature, generate

    return tile_product


def _product_function(module, kind, vectors, tokens):
    """The code of `_tile_product` for one kind of word and one number of vectors; once however often it is called."""
    name = f"sdp_tile_product_{kind}_{vectors}_{tokens}"
    if name in module.globals:
        return module.globals[name]
    floats, lists = FLOAT.as_pointer(), LANE.as_pointer()
    arguments = [floats, floats, INDEX, lists, INDEX, INDEX, floats]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    _emit_product(builder, kind, vectors, tokens, *function.args)
    builder.ret_void()
    return function


def _emit_product(builder, kind, vectors, tokens, tile, packed, height, columns, blocks, width, sums):
    number = INTEGERS if kind == INT8 else VECTOR
    multiply_add = {FLOAT32: multiply_floats, BFLOAT16: _multiply_bfloats, INT8: _multiply_bytes}[kind]
    splits = SPLITS[kind]
    # LLVM turns these into registers.
    totals = [[cgutils.alloca_once(builder, number) for _ in range(vectors)] for _ in range(tokens)]
    places = [
        [
            builder.bitcast(vector_at(builder, sums, INDEX((2 * t + v) * LANES)), number.as_pointer())
            for v in range(vectors)
        ]
        for t in range(tokens)
    ]
    for t in range(tokens):
        for v in range(vectors):
            builder.store(builder.load(places[t][v], align=4), totals[t][v])

    with cgutils.for_range(builder, blocks) as block_loop:
        column = builder.sext(builder.load(builder.gep(columns, [block_loop.index])), INDEX)
        corner = builder.gep(tile, [builder.mul(column, builder.mul(width, INDEX(splits * TILE_ROWS)))])
        begin = builder.mul(block_loop.index, builder.mul(width, height))
        with cgutils.for_range(builder, width) as loop:
            for split in range(splits):
                row = builder.add(builder.mul(loop.index, INDEX(splits)), INDEX(split))
                here = builder.add(builder.mul(begin, INDEX(splits)), builder.mul(row, height))
                weights = [
                    builder.load(vector_at(builder, packed, here, INDEX(v * LANES)), align=4) for v in range(vectors)
                ]
                factors = builder.gep(corner, [builder.mul(row, INDEX(TILE_ROWS))])
                for t in range(tokens):
                    factor = spread(builder, builder.load(builder.gep(factors, [INDEX(t)])))
                    for v in range(vectors):
                        total = multiply_add(builder, builder.load(totals[t][v]), factor, weights[v])
                        builder.store(total, totals[t][v])

    for t in range(tokens):
        for v in range(vectors):
            builder.store(builder.load(totals[t][v]), places[t][v], align=4)


@intrinsic
def finish_tile(typing_context, packed, sums, rows, terms, result):
    """What the sums of a tile come to, for all output features of a row of blocks, by the kind of word.

    * FLOAT32, BFLOAT16: result[t] = sums[t] + rows[0];
    * INT8: result[t] = (sums[t] - terms[t, 0] * rows[2]) * (terms[t, 1] * rows[1]) + rows[0], where terms[t, 0] and
      rows[2] are integers, and what is in the brackets on the left too.

    `sums` is (pairs of vectors, TILE, 2 * LANES).
    """
    signature = types.void(packed, sums, rows, terms, result)
    kind = KINDS[packed.dtype]

    def generate(context, builder, signature, args):
        sums, rows, terms, result = (array_of(context, builder, signature, args, i) for i in range(1, 5))
        line, term_stride, stride = (_strides(builder, array)[0] for array in (rows, terms, result))
        vectors = builder.sdiv(cgutils.unpack_tuple(builder, rows.shape)[1], INDEX(LANES))

        def finish(pair, count):
            """One or two vectors of all tokens, beside what is of the features and stays in registers."""
            first = builder.mul(pair, INDEX(2 * LANES))
            of_rows = [
                [
                    builder.load(vector_at(builder, rows.data, builder.mul(line, INDEX(i)), first, INDEX(v * LANES)), align=4)
                    for i in range(3 if kind == INT8 else 1)
                ]
                for v in range(count)
            ]
            with cgutils.for_range(builder, INDEX(TILE)) as tokens:
                term = builder.gep(terms.data, [builder.mul(term_stride, tokens.index)])
                target = builder.gep(result.data, [builder.mul(stride, tokens.index)])
                row = builder.add(builder.mul(pair, INDEX(TILE)), tokens.index)
                place = builder.mul(row, INDEX(2 * LANES))
                for v in range(count):
                    total = builder.load(vector_at(builder, sums.data, place, INDEX(v * LANES)), align=4)
                    bias, *others = of_rows[v]
                    if kind == INT8:
                        total = _scaled(builder, builder.bitcast(total, INTEGERS), term, *others)
                    spot = vector_at(builder, target, first, INDEX(v * LANES))
                    builder.store(builder.fadd(total, bias), spot, align=4)

        pairs = builder.sdiv(vectors, INDEX(2))
        with cgutils.for_range(builder, pairs) as loop:
            finish(loop.index, 2)
        with builder.if_then(builder.icmp_signed("<", builder.mul(pairs, INDEX(2)), vectors)):
            finish(pairs, 1)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def expect_writes(typing_context, result, height):
    """Fetch what the first TILE rows of the result will be written to, `height` numbers of each.

    They lie on as many pages, so that no CPU guesses the next, and waits for each while it is written.
    """
    signature = types.void(result, types.intp)

    def generate(context, builder, signature, args):
        result = array_of(context, builder, signature, args, 0)
        stride = _strides(builder, result)[0]
        fetch = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), LANE, LANE, LANE])
        function = cgutils.get_or_insert_function(builder.module, fetch, "llvm.prefetch.p0")
        with cgutils.for_range(builder, INDEX(TILE)) as tokens:
            row = builder.gep(result.data, [builder.mul(stride, tokens.index)])
            lines = builder.sdiv(args[1], INDEX(LINE))
            with cgutils.for_range(builder, lines) as loop:
                place = builder.gep(row, [builder.mul(loop.index, INDEX(LINE))])
                builder.call(function, [builder.bitcast(place, BYTE.as_pointer()), LANE(1), LANE(3), LANE(1)])
        return context.get_dummy_value()

    return signature, generate


def spread(builder, value):
    """A number in every lane."""
    undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    one = builder.insert_element(undefined, value, LANE(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(INTEGERS, None))


def called(builder, name, returned, *args):
    function_type = ir.FunctionType(returned, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def multiply_floats(builder, total, factor, weights):
    return called(builder, f"llvm.fma.v{LANES}f32", VECTOR, factor, weights, total)


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
        line = builder.mul(_strides(builder, rows)[0], INDEX(2))
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


@intrinsic
def transpose_square(typing_context, source, target):
    """target[j, i] = source[i, j] for LANES x LANES numbers, by swapping ever larger sub-squares in registers."""
    signature = types.void(source, target)

    def generate(context, builder, signature, args):
        source, target = (array_of(context, builder, signature, args, i) for i in range(2))
        source_stride, target_stride = (_strides(builder, array)[0] for array in (source, target))

        def place(array, stride, row):
            return vector_at(builder, array.data, builder.mul(stride, INDEX(row)))

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


_product, _small_product = _tile_product(TILE), _tile_product(SMALL_TILE)


@compiled()
def multiply_tile(tile, count, packed, height, columns, width, sums, vectors):
    """`_tile_product` for the first `count` tokens of a tile, in small steps if it is far from full."""
    if count > TILE - SMALL_TILE:
        _product(vectors, tile, packed, height, columns, width, sums)
        return
    for t in range(0, count, SMALL_TILE):
        _small_product(vectors, tile[:, t:], packed, height, columns, width, sums[t:])
