"""The softmax over rows of numbers, lane by lane: nothing has to be added up across the lanes of a vector."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,call-arg,attr-defined,misc"
# mypy: disable-error-code="import-untyped,import-not-found"

import functools
import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sdp_kernels.cpu_engine.register_tile import (
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
SERIES = [math.log(2) ** power / math.factorial(power) for power in range(8)]


@intrinsic
def soften(typing_context, scores, scale, sums):
    """scores[k] = 2 to the power of scale * (scores[k] - the largest of the column), and sums = what these add up to.

    A column of which every score is minus infinity comes to 0, and its sum is 0.

    Args:
        scores: (rows, COLUMNS) contiguous, at least one row.
        scale: above 0.
        sums: (COLUMNS,).
    """
    signature = types.void(scores, types.float32, sums)

    def generate(context, builder, signature, args):
        scores, sums = (array_of(context, builder, signature, args, i) for i in (0, 2))
        rows, scale = cgutils.unpack_tuple(builder, scores.shape)[0], spread(builder, args[1])
        for start in (0, LANES):
            top, total = (cgutils.alloca_once(builder, VECTOR) for _ in range(2))
            builder.store(ir.Constant(VECTOR, [-math.inf] * LANES), top)
            builder.store(ir.Constant(VECTOR, None), total)
            with cgutils.for_range(builder, rows) as loop:
                place = vector_at(builder, scores.data, builder.mul(loop.index, INDEX(COLUMNS)), INDEX(start))
                score, most = builder.load(place, align=4), builder.load(top)
                builder.store(builder.select(builder.fcmp_ordered(">", score, most), score, most), top)
            most = builder.load(top)
            nothing = builder.fcmp_ordered("==", most, ir.Constant(VECTOR, [-math.inf] * LANES))
            most = builder.select(nothing, ir.Constant(VECTOR, None), most)
            with cgutils.for_range(builder, rows) as loop:
                place = vector_at(builder, scores.data, builder.mul(loop.index, INDEX(COLUMNS)), INDEX(start))
                power = _power_of_two(
                    builder, builder.fmul(scale, builder.fsub(builder.load(place, align=4), most))
                )
                builder.store(power, place, align=4)
                builder.store(builder.fadd(builder.load(total), power), total)
            builder.store(builder.load(total), vector_at(builder, sums.data, INDEX(start)), align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def divide(typing_context, numbers, sums):
    """numbers[k] /= sums, column by column; what is divided by 0 comes to 0.

    Args:
        numbers: (rows, COLUMNS) contiguous.
        sums: (COLUMNS,).
    """
    signature = types.void(numbers, sums)

    def generate(context, builder, signature, args):
        numbers, sums = (array_of(context, builder, signature, args, i) for i in range(2))
        nothing, ones = ir.Constant(VECTOR, None), ir.Constant(VECTOR, [1.0] * LANES)
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
    terms = [ir.Constant(VECTOR, [term] * LANES) for term in reversed(SERIES)]
    power = functools.reduce(lambda total, term: multiply_floats(builder, term, total, rest), terms)
    biased = builder.add(builder.fptosi(whole, INTEGERS), ir.Constant(INTEGERS, [127] * LANES))
    scale = builder.bitcast(builder.shl(biased, ir.Constant(INTEGERS, [23] * LANES)), VECTOR)
    least = ir.Constant(VECTOR, [LEAST] * LANES)
    small = builder.fcmp_ordered("<", exponents, least)
    return builder.select(small, ir.Constant(VECTOR, None), builder.fmul(power, scale))
