"""One token of the input as integers of 8 bits, in vector form; `quantize_tokens` of the op's reference defines it."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return,call-arg,attr-defined,misc"
# mypy: disable-error-code="import-untyped,import-not-found,unreachable"

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sdp_kernels.cpu_engine.threads import compiled
from sdp_kernels.cpu_engine.vectors import (
    BYTE,
    INDEX,
    INTEGERS,
    LANE,
    LANES,
    VECTOR,
    array_of,
    called,
    spread,
    vector_at,
)

SMALLEST_SPAN = np.float32(2.0**-100)  # as in the definition
INFINITE = np.int32(0x7F800000)  # the bits of infinity; those of NaN, without the sign, are above


@compiled()
def quantize_token(token, bytes, term):
    """The integers of a token, its zero, as the bits of an integer, and its scale.

    Bytes beyond the last input are the zero: whatever weight meets them counts for nothing.

    Args:
        token: (in,) float32.
        bytes: (in or more,) uint8, written.
        term: (2,) float32, written: zero and scale.
    """
    whole = len(token) // LANES * LANES
    ends = np.zeros(3, np.float32)
    _extremes(token, whole, ends)
    bits, magnitude = token.view(np.int32), ends.view(np.int32)
    for k in range(whole, len(token)):
        ends[0], ends[1] = min(ends[0], token[k]), max(ends[1], token[k])
        magnitude[2] = max(magnitude[2], bits[k] & 0x7FFFFFFF)
    span = max(ends[1] - ends[0], SMALLEST_SPAN)
    if magnitude[2] >= INFINITE or not np.isfinite(span):
        for k in range(len(bytes)):
            bytes[k] = 0
        term[0], term[1] = 0, np.nan
        return
    inverse = np.float32(255) / span
    zero = np.rint(-ends[0] * inverse)
    _integers(token, whole, inverse, zero, bytes)
    for k in range(whole, len(token)):
        bytes[k] = np.uint8(min(max(np.rint(token[k] * inverse) + zero, np.float32(0)), np.float32(255)))
    for k in range(len(token), len(bytes)):
        bytes[k] = np.uint8(zero)
    term.view(np.int32)[0] = np.int32(zero)
    term[1] = span / np.float32(255)


@intrinsic
def _extremes(typing_context, token, whole, ends):
    """ends = the least of 0 and the first `whole` numbers, the largest, and the bits of the largest magnitude."""
    signature = types.void(token, types.intp, ends)

    def generate(context, builder, signature, args):
        token, ends = (array_of(context, builder, signature, args, i) for i in (0, 2))
        found = [cgutils.alloca_once_value(builder, ir.Constant(kind, None)) for kind in (VECTOR, VECTOR, INTEGERS)]
        for place, kind in zip(found, (VECTOR, VECTOR, INTEGERS), strict=True):
            builder.store(ir.Constant(kind, None), place)  # again, where the function is called in a loop
        with cgutils.for_range(builder, builder.sdiv(args[1], INDEX(LANES))) as loop:
            place = vector_at(builder, token.data, builder.mul(loop.index, INDEX(LANES)))
            numbers = builder.load(place, align=4)
            least, largest, magnitude = (builder.load(each) for each in found)
            bits = builder.and_(builder.bitcast(numbers, INTEGERS), ir.Constant(INTEGERS, [0x7FFFFFFF] * LANES))
            lower, higher = (builder.fcmp_ordered(sign, numbers, end) for sign, end in (("<", least), (">", largest)))
            further = builder.icmp_signed(">", bits, magnitude)
            builder.store(builder.select(lower, numbers, least), found[0])
            builder.store(builder.select(higher, numbers, largest), found[1])
            builder.store(builder.select(further, bits, magnitude), found[2])
        for i, (sign, place) in enumerate(zip("<>>", found, strict=True)):
            numbers, half = builder.load(place), LANES // 2
            compare = builder.icmp_signed if i == 2 else builder.fcmp_ordered
            while half:  # the further half of the lanes that are left against the nearer one
                lanes = ir.Constant(INTEGERS, [(lane + half) % LANES for lane in range(LANES)])
                other = builder.shuffle_vector(numbers, numbers, lanes)
                numbers = builder.select(compare(sign, other, numbers), other, numbers)
                half //= 2
            best = builder.extract_element(numbers, LANE(0))
            builder.store(builder.bitcast(best, VECTOR.element), builder.gep(ends.data, [INDEX(i)]))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _integers(typing_context, token, whole, inverse, zero, bytes):
    """bytes = round(token * inverse) + zero within 0 and 255, of the first `whole` numbers."""
    signature = types.void(token, types.intp, types.float32, types.float32, bytes)

    def generate(context, builder, signature, args):
        token, bytes = (array_of(context, builder, signature, args, i) for i in (0, 4))
        inverse, zero = spread(builder, args[2]), spread(builder, builder.fptosi(args[3], LANE))
        least, most = ir.Constant(INTEGERS, None), ir.Constant(INTEGERS, [255] * LANES)
        with cgutils.for_range(builder, builder.sdiv(args[1], INDEX(LANES))) as loop:
            here = builder.mul(loop.index, INDEX(LANES))
            numbers = builder.load(vector_at(builder, token.data, here), align=4)
            rounded = called(builder, f"llvm.rint.v{LANES}f32", VECTOR, builder.fmul(numbers, inverse))
            integers = builder.add(builder.fptosi(rounded, INTEGERS), zero)
            integers = builder.select(builder.icmp_signed(">", integers, least), integers, least)
            integers = builder.select(builder.icmp_signed("<", integers, most), integers, most)
            small = builder.trunc(integers, ir.VectorType(BYTE, LANES))
            place = builder.gep(bytes.data, [here])
            builder.store(small, builder.bitcast(place, small.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return signature, generate
