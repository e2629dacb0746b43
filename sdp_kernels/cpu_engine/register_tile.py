"""The innermost product: a tile of the output that stays in vector registers.

A tile, a few tokens by one or two vectors of output features, stays in registers while all blocks of a row pass by:
each weight vector that is loaded meets every token of the tile. LLVM does not find such a tile in scalar loops, so the
inner loops are given to it in vector form.

What is loaded are words of 32 bits: one float32, two bfloat16 of neighbouring inputs, or four bytes of them. An
instruction multiplies all words of a vector and adds up what is in each. Which of them it is, the type of the array of
the weight tells, so that each has code of its own; inputs are carried as float32 whatever they hold.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,call-arg,attr-defined"
# mypy: disable-error-code="import-untyped,import-not-found,misc"

import functools
from itertools import chain

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
KINDS = {types.float32: FLOAT32, types.uint32: BFLOAT16, types.int32: INT8}  # by the type of the words of a weight
SMALL_TILE = TILE // 3
TILE_ROWS = -(-TILE // LANES) * LANES  # so that whole squares can be transposed into a tile
VECTOR, INTEGERS = ir.VectorType(FLOAT, LANES), ir.VectorType(LANE, LANES)


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
    """The product of a few tokens with one row of blocks, for one or two vectors of output features.

    sums[t] = sum over the blocks, and words within, of tile[columns[block] * width + word, t] * packed[block, word],
    where `packed` is flat and begins with the first of the features; `height` is how many it has in all, and `width`
    counts words. Then, by the kind of word,

    * FLOAT32, BFLOAT16: result[t] = sums[t] + rows[0];
    * INT8: result[t] = (sums[t] - terms[t, 0] * rows[2]) * (terms[t, 1] * rows[1]) + rows[0], where terms[t, 0] and
      rows[2] are integers, and what is in the brackets on the left too.
    """

    @intrinsic
    def tile_product(typing_context, vectors, tile, packed, height, columns, width, rows, terms, result):
        signature = types.void(types.intp, tile, packed, types.intp, columns, types.intp, rows, terms, result)
        kind = KINDS[packed.dtype]

        def generate(context, builder, signature, args):
            tile, packed, columns, rows, terms, result = (
                array_of(context, builder, signature, args, i) for i in (1, 2, 4, 6, 7, 8)
            )
            (blocks,) = cgutils.unpack_tuple(builder, columns.shape)
            strided = [(array.data, _strides(builder, array)[0]) for array in (rows, terms, result)]
            weights = builder.bitcast(packed.data, FLOAT.as_pointer())
            given = [tile.data, weights, args[3], columns.data, blocks, args[5], *chain.from_iterable(strided)]
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
    arguments = [floats, floats, INDEX, lists, INDEX, INDEX, floats, INDEX, floats, INDEX, floats, INDEX]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    _emit_product(builder, kind, vectors, tokens, *function.args)
    builder.ret_void()
    return function


def _emit_product(
    builder,
    kind,
    vectors,
    tokens,
    tile,
    packed,
    height,
    columns,
    blocks,
    width,
    rows,
    line,
    terms,
    terms_stride,
    result,
    result_stride,
):
    number = INTEGERS if kind == INT8 else VECTOR
    multiply_add = {FLOAT32: _multiply_floats, BFLOAT16: _multiply_bfloats, INT8: _multiply_bytes}[kind]
    # LLVM turns these into registers.
    sums = [[cgutils.alloca_once(builder, number) for _ in range(vectors)] for _ in range(tokens)]
    for v in range(vectors):
        place = vector_at(builder, rows, INDEX(v * LANES))
        start = ir.Constant(number, None) if kind == INT8 else builder.load(place, align=4)
        for t in range(tokens):
            builder.store(start, sums[t][v])

    with cgutils.for_range(builder, blocks) as block_loop:
        column = builder.sext(builder.load(builder.gep(columns, [block_loop.index])), INDEX)
        corner = builder.gep(tile, [builder.mul(column, builder.mul(width, INDEX(TILE_ROWS)))])
        begin = builder.mul(block_loop.index, builder.mul(width, height))
        with cgutils.for_range(builder, width) as loop:
            here = builder.add(begin, builder.mul(loop.index, height))
            places = [vector_at(builder, packed, here, INDEX(v * LANES)) for v in range(vectors)]
            weights = [builder.load(place, align=4) for place in places]
            factors = builder.gep(corner, [builder.mul(loop.index, INDEX(TILE_ROWS))])
            for t in range(tokens):
                factor = spread(builder, builder.load(builder.gep(factors, [INDEX(t)])))
                for v in range(vectors):
                    total = multiply_add(builder, builder.load(sums[t][v]), factor, weights[v])
                    builder.store(total, sums[t][v])

    for v in range(vectors):
        places = [vector_at(builder, rows, builder.mul(line, INDEX(i)), INDEX(v * LANES)) for i in range(3)]
        of_rows = [builder.load(place, align=4) for place in places] if kind == INT8 else []
        for t in range(tokens):
            total = builder.load(sums[t][v])
            if kind == INT8:
                term = builder.gep(terms, [builder.mul(terms_stride, INDEX(t))])
                total = _scaled(builder, total, term, *of_rows)
            place = vector_at(builder, result, builder.mul(result_stride, INDEX(t)), INDEX(v * LANES))
            builder.store(total, place, align=4)


def spread(builder, value):
    """A number in every lane."""
    undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    one = builder.insert_element(undefined, value, LANE(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(INTEGERS, None))


def called(builder, name, returned, *args):
    function_type = ir.FunctionType(returned, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def _multiply_floats(builder, total, factor, weights):
    return called(builder, f"llvm.fma.v{LANES}f32", VECTOR, factor, weights, total)


def _multiply_bfloats(builder, total, factor, weights):
    """Two products a lane."""
    pair = ir.VectorType(_BFloat(), 2 * LANES)
    factor, weights = (builder.bitcast(vector, pair) for vector in (factor, weights))
    return called(builder, f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}", VECTOR, total, factor, weights)


def _multiply_bytes(builder, total, factor, weights):
    """Four products a lane, of unsigned bytes of the input with signed ones of the weight."""
    if HAS_VNNI:
        factor, weights = (builder.bitcast(vector, INTEGERS) for vector in (factor, weights))
        name = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}"
        return called(builder, name, INTEGERS, total, factor, weights)
    return _multiply_bytes_widened(builder, total, factor, weights)


def _multiply_bytes_widened(builder, total, factor, weights):
    """The same by wider integers: the even and the odd bytes as 16 bits, whose products are added in 32 bits."""
    two = ir.VectorType(SHORT, 2 * LANES)
    wide = ir.VectorType(LANE, 2 * LANES)
    factor, weights = (builder.bitcast(vector, two) for vector in (factor, weights))
    eight = ir.Constant(two, [8] * (2 * LANES))
    low = builder.and_(factor, ir.Constant(two, [255] * (2 * LANES))), builder.ashr(builder.shl(weights, eight), eight)
    high = builder.lshr(factor, eight), builder.ashr(weights, eight)
    for factors, signed in (low, high):
        products = builder.mul(builder.zext(factors, wide), builder.sext(signed, wide))
        for side in range(2):
            lanes = ir.Constant(INTEGERS, [2 * lane + side for lane in range(LANES)])
            total = builder.add(total, builder.shuffle_vector(products, products, lanes))
    return total


def _scaled(builder, total, term, bias, scales, sums):
    """(total - zero * sums) * (scale of the token * scales) + bias."""
    zero, scale = (spread(builder, builder.load(builder.gep(term, [INDEX(i)]))) for i in range(2))
    zero, sums = (builder.bitcast(vector, INTEGERS) for vector in (zero, sums))
    exact = builder.sitofp(builder.sub(total, builder.mul(zero, sums)), VECTOR)
    return builder.fadd(builder.fmul(exact, builder.fmul(scale, scales)), bias)


@intrinsic
def kind_of(typing_context, packed):
    """What the words of a weight hold, known where it is compiled."""
    kind = KINDS[packed.dtype]

    def generate(context, builder, signature, args):
        return INDEX(kind)

    return types.intp(packed), generate


@intrinsic
def add_up_bytes(typing_context, vectors, packed, height, words, rows):
    """rows[2] = the sums of the INT8 weights of one or two vectors of output features, `words` of them behind another.

    Made anew in each product, beside many times as much work, so that they are those of the weights as they are now.
    """
    signature = types.void(types.intp, packed, types.intp, types.intp, rows)
    chains = 4  # of additions that wait for each other

    def generate(context, builder, signature, args):
        count, height, words = args[0], args[2], args[3]
        packed, rows = (array_of(context, builder, signature, args, i) for i in (1, 4))
        line = builder.mul(_strides(builder, rows)[0], INDEX(2))
        ones = ir.Constant(INTEGERS, [0x01010101] * LANES)
        for v in range(2):
            with builder.if_then(builder.icmp_signed("<", INDEX(v), count)):
                sums = [cgutils.alloca_once_value(builder, ir.Constant(INTEGERS, None)) for _ in range(chains)]
                for total in sums:  # not only once, where the entry of the function puts it
                    builder.store(ir.Constant(INTEGERS, None), total)

                def add(word, total, v=v):
                    place = vector_at(builder, packed.data, builder.mul(word, height), INDEX(v * LANES))
                    weights = builder.load(place, align=4)
                    builder.store(_multiply_bytes(builder, builder.load(total), ones, weights), total)

                whole = builder.sdiv(words, INDEX(chains))
                with cgutils.for_range(builder, whole) as loop:
                    for i in range(chains):
                        add(builder.add(builder.mul(loop.index, INDEX(chains)), INDEX(i)), sums[i])
                with cgutils.for_range(builder, words, start=builder.mul(whole, INDEX(chains))) as loop:
                    add(loop.index, sums[0])
                total = functools.reduce(builder.add, [builder.load(each) for each in sums])
                place = vector_at(builder, rows.data, line, INDEX(v * LANES))
                builder.store(builder.bitcast(total, VECTOR), place, align=4)
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
def multiply_tile(tile, count, packed, height, columns, width, rows, terms, result, vectors):
    """`_tile_product` for the first `count` tokens of a tile, in small steps if it is far from full."""
    if count > TILE - SMALL_TILE:
        _product(vectors, tile, packed, height, columns, width, rows, terms, result)
        return
    for t in range(0, count, SMALL_TILE):
        _small_product(vectors, tile[:, t:], packed, height, columns, width, rows, terms[t:], result[t:])
