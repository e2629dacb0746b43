"""Vectors of the CPU in the code that is given to LLVM: how long they are, where they lie, what is done with them."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,call-arg,attr-defined"
# mypy: disable-error-code="import-untyped,import-not-found,misc"

import functools

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

FLOAT, INDEX = ir.FloatType(), ir.IntType(64)
LANE, SHORT, BYTE = ir.IntType(32), ir.IntType(16), ir.IntType(8)


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


FEATURES = _cpu_features()
LANES, TILE = _vector_registers(FEATURES)
SMALL_TILE = TILE // 3
TILE_ROWS = -(-TILE // LANES) * LANES  # so that whole squares can be transposed into a tile
VECTOR, INTEGERS = ir.VectorType(FLOAT, LANES), ir.VectorType(LANE, LANES)


def array_of(context, builder, signature, args, position):
    """The record of an array argument: data, strides, shape."""
    return context.make_array(signature.args[position])(context, builder, args[position])


def strides(builder, array):
    """Strides in floats."""
    return [builder.sdiv(stride, INDEX(4)) for stride in cgutils.unpack_tuple(builder, array.strides)]


def vector_at(builder, pointer, *offsets):
    offset = functools.reduce(builder.add, offsets)
    return builder.bitcast(builder.gep(pointer, [offset]), VECTOR.as_pointer())


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


@intrinsic
def transpose_square(typing_context, source, target):
    """target[j, i] = source[i, j] for LANES x LANES numbers, by swapping ever larger sub-squares in registers."""
    signature = types.void(source, target)

    def generate(context, builder, signature, args):
        source, target = (array_of(context, builder, signature, args, i) for i in range(2))
        source_stride, target_stride = (strides(builder, array)[0] for array in (source, target))

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
