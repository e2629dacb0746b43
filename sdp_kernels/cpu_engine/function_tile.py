"""Functions of numbers while they are in the first cache: activations behind a product, and the softmax of attention.

The softmax runs along rows of vectors, lane by lane: nothing has to be added up across the lanes.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,call-arg,attr-defined,misc"
# mypy: disable-error-code="import-untyped,import-not-found"

import functools
import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sdp_kernels.cpu_engine.vectors import (
    INDEX,
    INTEGERS,
    LANES,
    VECTOR,
    array_of,
    called,
    multiply_floats,
    spread,
    vector_at,
)

COLUMNS = 2 * LANES  # that are softened together
LEAST = -126.0  # 2 to the power of less is nothing
# 2 to the power of x in [-1/2, 1/2], by its series: the next term is below a tenth of a rounding error
# erf by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26, to 1.5e-7, as torch has it in vectors too
ERF, ERF_STEP = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429), 0.3275911
SERIES = [math.log(2) ** power / math.factorial(power) for power in range(8)]


def emit_activation(builder, function, numbers, stride, rows, vectors):
    """Apply the activation of a number in FUNCTIONS in place to some rows of numbers, a few vectors of each."""
    for number, formula in enumerate(FORMULAS.values(), start=1):
        with (
            builder.if_then(builder.icmp_signed("==", function, INDEX(number)), likely=False),
            cgutils.for_range(builder, INDEX(rows)) as loop,
        ):
            for v in range(vectors):
                place = vector_at(builder, numbers, builder.mul(stride, loop.index), INDEX(v * LANES))
                builder.store(formula(builder, builder.load(place, align=4)), place, align=4)


def _constant(value):
    return ir.Constant(VECTOR, [value] * LANES)


def _relu(builder, x):
    return builder.select(builder.fcmp_ordered("<", x, _constant(0.0)), _constant(0.0), x)


def _gelu(builder, x):
    """x times half of what erf leaves to 1, or the rest of 1, by the sign."""
    size = called(builder, f"llvm.fabs.v{LANES}f32", VECTOR, x)
    step = multiply_floats(builder, _constant(1.0), size, _constant(ERF_STEP * math.sqrt(0.5)))
    step = builder.fdiv(_constant(1.0), step)
    terms = [_constant(term / 2) for term in reversed(ERF)]
    total = functools.reduce(lambda total, term: multiply_floats(builder, term, total, step), terms)
    square = builder.fmul(x, builder.fmul(x, _constant(-math.log2(math.e) / 2)))
    half = builder.fmul(builder.fmul(total, step), _power_of_two(builder, square))
    positive = builder.fcmp_ordered(">", x, _constant(0.0))
    return builder.fmul(x, builder.select(positive, builder.fsub(_constant(1.0), half), half))


def _gelu_tanh(builder, x):
    """x times the sigmoid of twice what the tanh is taken of."""
    cubed = multiply_floats(builder, _constant(1.0), builder.fmul(x, x), _constant(0.044715))
    inner = builder.fmul(builder.fmul(x, cubed), _constant(math.sqrt(8 / math.pi)))
    return builder.fmul(x, _sigmoid(builder, inner))


def _silu(builder, x):
    return builder.fmul(x, _sigmoid(builder, x))


def _sigmoid(builder, x):
    """By a power that cannot overflow, whatever the sign."""
    size = called(builder, f"llvm.fabs.v{LANES}f32", VECTOR, x)
    power = _power_of_two(builder, builder.fmul(size, _constant(-math.log2(math.e))))
    negative = builder.fcmp_ordered("<", x, _constant(0.0))
    above = builder.select(negative, power, _constant(1.0))
    return builder.fdiv(above, builder.fadd(_constant(1.0), power))


FORMULAS = {"relu": _relu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu}
FUNCTIONS = (None, *FORMULAS)  # by their numbers in compiled code


@intrinsic
def soften(typing_context, scores, scale, sums):
    """scores[k] = 2 to the power of scale * (scores[k] - the largest of the column), and sums = what these add up to.

    A column of which every score is minus infinity comes to 0, and its sum is 0. `scores` is (rows, COLUMNS) contiguous
    with at least one row, `scale` above 0, `sums` (COLUMNS,).
    """
    signature = types.void(scores, types.float32, sums)

    def generate(context, builder, signature, args):
        scores, sums = (array_of(context, builder, signature, args, i) for i in (0, 2))
        rows, scale = cgutils.unpack_tuple(builder, scores.shape)[0], spread(builder, args[1])
        for start in (0, LANES):
            top, total = (cgutils.alloca_once(builder, VECTOR) for _ in range(2))
            builder.store(_constant(-math.inf), top)
            builder.store(_constant(0.0), total)
            with cgutils.for_range(builder, rows) as loop:
                place = vector_at(builder, scores.data, builder.mul(loop.index, INDEX(COLUMNS)), INDEX(start))
                score, most = builder.load(place, align=4), builder.load(top)
                builder.store(builder.select(builder.fcmp_ordered(">", score, most), score, most), top)
            most = builder.load(top)
            nothing = builder.fcmp_ordered("==", most, _constant(-math.inf))
            most = builder.select(nothing, _constant(0.0), most)
            with cgutils.for_range(builder, rows) as loop:
                place = vector_at(builder, scores.data, builder.mul(loop.index, INDEX(COLUMNS)), INDEX(start))
                power = _power_of_two(builder, builder.fmul(scale, builder.fsub(builder.load(place, align=4), most)))
                builder.store(power, place, align=4)
                builder.store(builder.fadd(builder.load(total), power), total)
            builder.store(builder.load(total), vector_at(builder, sums.data, INDEX(start)), align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def divide(typing_context, numbers, sums):
    """numbers[k] /= sums, column by column; what is divided by 0 comes to 0. `numbers` is (rows, COLUMNS)."""
    signature = types.void(numbers, sums)

    def generate(context, builder, signature, args):
        numbers, sums = (array_of(context, builder, signature, args, i) for i in range(2))
        nothing, ones = _constant(0.0), _constant(1.0)
        factors = []
        for start in (0, LANES):
            total = builder.load(vector_at(builder, sums.data, INDEX(start)), align=4)
            none = builder.fcmp_ordered("==", total, nothing)
            factors.append(builder.select(none, nothing, builder.fdiv(ones, total)))
        with cgutils.for_range(builder, cgutils.unpack_tuple(builder, numbers.shape)[0]) as loop:
            for i, factor in enumerate(factors):
                row = builder.mul(loop.index, INDEX(COLUMNS))
                place = vector_at(builder, numbers.data, row, INDEX(i * LANES))
                builder.store(builder.fmul(builder.load(place, align=4), factor), place, align=4)
        return context.get_dummy_value()

    return signature, generate


def _power_of_two(builder, exponents):
    """2 to the power of each, none of which is above 0."""
    whole = called(builder, f"llvm.rint.v{LANES}f32", VECTOR, exponents)
    rest = builder.fsub(exponents, whole)
    terms = [_constant(term) for term in reversed(SERIES)]
    power = functools.reduce(lambda total, term: multiply_floats(builder, term, total, rest), terms)
    biased = builder.add(builder.fptosi(whole, INTEGERS), ir.Constant(INTEGERS, [127] * LANES))
    scale = builder.bitcast(builder.shl(biased, ir.Constant(INTEGERS, [23] * LANES)), VECTOR)
    small = builder.fcmp_ordered("<", exponents, _constant(LEAST))
    return builder.select(small, _constant(0.0), builder.fmul(power, scale))
