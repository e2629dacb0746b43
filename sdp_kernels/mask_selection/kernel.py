"""Radix select over many tensors on a GPU, and masks written as words.

A float is turned into an integer of the same order and read as digits of `BITS` bits, the highest first. For each
digit, one kernel counts its values among the scores that agree with the digits found so far, and another finds the
value in which the wanted rank falls. The state stays on the device: the host never waits in between. Counts are
integers, so the order in which programs add theirs does not change the result.

In float32 a sample guesses the threshold, and the first reading also counts the values of the first two digits in a
window around the guess. Where the wanted rank falls into it, which these counts tell for certain, the reading for the
second digit is not needed: its programs leave at once.

The last digit is counted while the mask is written, with all scores kept that agree with the threshold in the digits
before. In float32 only one score in thousands does, so few programs have to read theirs again and decide by all digits.
They keep all scores equal to the threshold and note how many these are; those that have one too many read once more.
So every score is read twice in float32 if the guess was right, otherwise three times, and so in half precision, where
most programs decide twice.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdp_kernels.dispatch import on_its_device
from sdp_kernels.masks import words_shape
from sdp_kernels.spec import TRITON_NAMES, KernelConfig

BITS = 11
BLOCK_WORDS = 32
TILES = 8  # a program counts
TILE_WARPS = 4
SAMPLE, SAMPLE_STRIDE = 2**16, 127  # scores of a group at most; one in so many at most, odd to visit all columns
# The digits that tell scores apart. A score in half precision becomes a float32 with zeros in its last 12 bits or more.
DIGITS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}


@on_its_device
def keep_highest(
    units: Sequence[Tensor], groups: Sequence[Sequence[int]], pruned: Sequence[int]
) -> tuple[list[Tensor], list[bool]]:
    """The words of the masks, and which of the matrices hold NaN: the only answers that the host waits for.

    Args:
        units: matrices of scores on one device.
        groups: the matrices that are ranked together.
        pruned: how many to prune of each group.
    """
    device = units[0].device
    units = [each.detach().contiguous() for each in units]
    digits = max(DIGITS[each.dtype] for each in units)
    state = torch.tensor([[0, number, 0, 0] for number in pruned], dtype=torch.int64).to(device)
    nans = torch.zeros(len(units), dtype=torch.int32, device=device)
    guesses = [_guess([units[i] for i in group], k) for group, k in zip(groups, pruned, strict=True) if digits == 3]
    guess = torch.stack(guesses) if guesses else torch.empty(len(groups), device=device)
    for digit in range(digits - 1):
        guessed = digits == 3 and digit == 0
        counts = torch.zeros((len(groups), 2**BITS), dtype=torch.int64, device=device)
        window = torch.zeros((len(groups), 2**BITS + 1), dtype=torch.int64, device=device) if guessed else counts
        for number, group in enumerate(groups):
            for index in group:
                words = math.prod(words_shape(units[index].shape))
                _count_kernel[(triton.cdiv(words, BLOCK_WORDS * TILES),)](
                    units[index],
                    state[number],
                    counts[number],
                    nans[index:],
                    guess[number],
                    window[number],
                    words,
                    units[index].shape[1],
                    DIGIT=digit,
                    GUESSED=guessed,
                    BITS=BITS,
                    BLOCK_WORDS=BLOCK_WORDS,
                    TILES=TILES,
                    num_warps=TILE_WARPS,
                )
        _digit_kernel[(len(groups),)](state, counts, guess, window, DIGIT=digit, GUESSED=guessed, BITS=BITS)
    packed = [unit.new_empty(words_shape(unit.shape), dtype=torch.int32) for unit in units]
    programs = [triton.cdiv(words.numel(), BLOCK_WORDS) for words in packed]
    ties = [torch.empty(number, dtype=torch.int32, device=device) for number in programs]
    counts = torch.zeros((len(groups), 2**BITS), dtype=torch.int64, device=device)
    for decided in (digits - 1, digits):
        for number, group in enumerate(groups):
            for index in group:
                _pack_kernel[(programs[index],)](
                    units[index],
                    state[number],
                    packed[index],
                    ties[index],
                    counts[number],
                    packed[index].numel(),
                    units[index].shape[1],
                    DECIDED=decided,
                    DIGITS=digits,
                    BITS=BITS,
                    BLOCK_WORDS=BLOCK_WORDS,
                    num_warps=TILE_WARPS,
                )
        if decided < digits:
            _digit_kernel[(len(groups),)](state, counts, guess, counts, DIGIT=decided, GUESSED=False, BITS=BITS)
    for number, group in enumerate(groups):
        own_units, own_words, own_ties = ([each[index] for index in group] for each in (units, packed, ties))
        _drop_ties(own_units, own_words, own_ties, state[number], digits)
    return packed, (nans != 0).tolist()


def _guess(units: Sequence[Tensor], pruned: int) -> Tensor:
    """About the `pruned`-th lowest score."""
    number = sum(unit.numel() for unit in units)
    stride = max(SAMPLE_STRIDE, number // SAMPLE | 1)
    sample = torch.cat([unit.view(-1)[::stride].float() for unit in units])
    return sample.sort().values[max(0, pruned - 1) * sample.numel() // number]


def _drop_ties(
    units: Sequence[Tensor], packed: Sequence[Tensor], ties: Sequence[Tensor], state: Tensor, digits: int
) -> None:
    """Prune the last of the scores equal to the threshold, of which all were kept."""
    together = torch.cat(list(ties))
    before = torch.split(together.cumsum(0, dtype=torch.int64) - together, [own.numel() for own in ties])
    options = {"DIGITS": digits, "BITS": BITS, "BLOCK_WORDS": BLOCK_WORDS, "num_warps": TILE_WARPS}
    for unit, words, own, first in zip(units, packed, ties, before, strict=True):
        _drop_ties_kernel[(own.numel(),)](unit, state, words, own, first, words.numel(), unit.shape[1], **options)


@on_its_device
def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """As packing.keep_n_of_m."""
    scores = scores.detach().contiguous()
    words = scores.new_empty(words_shape(scores.shape), dtype=torch.int32)
    _n_of_m_kernel[(triton.cdiv(words.numel(), BLOCK_WORDS),)](
        scores, words, words.numel(), scores.shape[1], n, m, BLOCK_WORDS=BLOCK_WORDS, num_warps=TILE_WARPS
    )
    return words


@triton.jit
def _places(first, words, columns, BLOCK_WORDS: tl.constexpr):
    """(words, 32): the place of the scores of some words in memory, their column, and whether there is one."""
    word = first + tl.arange(0, BLOCK_WORDS)
    row_words = tl.cdiv(columns, 32)
    column = (word % row_words * 32)[:, None] + tl.arange(0, 32)[None, :]
    place = (word // row_words).to(tl.int64)[:, None] * columns + column
    return place, column, (word < words)[:, None] & (column < columns)


@triton.jit
def _key(x):
    """An integer without sign, of the order of the floats; the same for both zeros."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) == 0, 0, bits)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.constexpr_function
def _length(digit, bits):
    """Bits of a digit: the last of three is shorter."""
    return min(bits, 32 - digit * bits)


@triton.jit
def _leading_digits(x, DIGITS: tl.constexpr, BITS: tl.constexpr):
    """The first digits of the key; the last one is a bit short if they are all."""
    key = _key(x)
    if DIGITS * BITS < 32:
        key = key >> (32 - DIGITS * BITS)
    return key.to(tl.int64)


@triton.jit
def _word(keep):
    """(words, 32) bool -> (words,) int32."""
    return tl.sum(keep.to(tl.int32) << tl.arange(0, 32)[None, :], 1)


@triton.jit
def _window_start(guess, BITS: tl.constexpr):
    """The first two digits of the least scores in the window around a guess."""
    return _leading_digits(tl.load(guess), 2, BITS) - 2 ** (BITS - 1)


@triton.jit
def _histogram(value, chosen, BITS: tl.constexpr):
    """How often each number of `BITS` bits occurs among those chosen."""
    size: tl.constexpr = value.shape[0] * value.shape[1]
    return tl.histogram(tl.reshape(value.to(tl.int32), (size,)), 2**BITS, mask=tl.reshape(chosen, (size,)))


# Slices of one tensor: where they begin differs in alignment, which nothing is gained from.
@triton.jit(do_not_specialize=["words"], do_not_specialize_on_alignment=["state", "nans", "guess", "window"])
def _count_kernel(
    scores,  # (rows, columns)
    state,  # (4,) int64: digits found, rank among scores that begin with them, how many these are, 1 if two at once
    counts,  # (2**BITS,) int64, added to
    nans,  # one int32, added to
    guess,  # one float32, read if GUESSED
    window,  # (2**BITS + 1,) int64, added to if GUESSED: scores in the window, all below it
    words,  # of the mask
    columns,
    DIGIT: tl.constexpr,
    GUESSED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    TILES: tl.constexpr,
):
    if DIGIT == 1 and tl.load(state + 3) == 1:  # the window has told this digit too
        return
    found = tl.load(state)
    counted = tl.zeros((2**BITS,), tl.int32)
    strange = tl.zeros((BLOCK_WORDS,), tl.int32)
    if GUESSED:
        start = _window_start(guess, BITS)
        in_window = tl.zeros((2**BITS,), tl.int32)
        below = tl.zeros((BLOCK_WORDS,), tl.int32)
    for tile in range(0, TILES):
        first = (tl.program_id(0) * TILES + tile) * BLOCK_WORDS
        place, _column, inside = _places(first, words, columns, BLOCK_WORDS)
        x = tl.load(scores + place, mask=inside, other=0.0).to(tl.float32)
        if DIGIT == 0:
            strange += tl.sum((x != x).to(tl.int32), 1)
        last: tl.constexpr = _length(DIGIT, BITS)
        leading = _leading_digits(x, DIGIT + 1, BITS)
        chosen = inside & ((leading >> last) == found)
        counted += _histogram(leading & (2**last - 1), chosen, BITS)
        if GUESSED:
            distance = _leading_digits(x, 2, BITS) - start
            chosen = inside & (distance >= 0) & (distance < 2**BITS)
            in_window += _histogram(tl.where(chosen, distance, 0), chosen, BITS)
            below += tl.sum((inside & (distance < 0)).to(tl.int32), 1)
    value = tl.arange(0, 2**BITS)
    tl.atomic_add(counts + value, counted.to(tl.int64), mask=counted > 0)
    if DIGIT == 0:
        total = tl.sum(strange)
        tl.atomic_add(nans, total, mask=total > 0)
    if GUESSED:
        tl.atomic_add(window + value, in_window.to(tl.int64), mask=in_window > 0)
        tl.atomic_add(window + 2**BITS, tl.sum(below).to(tl.int64))


@triton.jit
def _store_found(state, counts, found, rank, BITS: tl.constexpr):
    """Of digits that begin with `found`, those of the score of this rank; from how many scores have each."""
    value = tl.arange(0, 2**BITS)
    counted = tl.load(counts + value)
    below = tl.cumsum(counted, 0) < rank
    digit = tl.sum(below.to(tl.int64))
    tl.store(state, found + digit)
    tl.store(state + 1, rank - tl.sum(tl.where(below, counted, 0)))
    tl.store(state + 2, tl.sum(tl.where(value == digit, counted, 0)))


@triton.jit
def _digit_kernel(
    state,  # (groups, 4) int64
    counts,  # (groups, 2**BITS) int64
    guess,  # (groups,) float32, read if GUESSED
    window,  # (groups, 2**BITS + 1) int64, read if GUESSED
    DIGIT: tl.constexpr,
    GUESSED: tl.constexpr,
    BITS: tl.constexpr,
):
    group = tl.program_id(0)
    state += 4 * group
    if DIGIT == 1 and tl.load(state + 3) == 1:  # the window has told this digit too
        return
    found = tl.load(state) << _length(DIGIT, BITS)
    rank = tl.load(state + 1)
    if GUESSED:
        window += group * (2**BITS + 1)
        below = tl.load(window + 2**BITS)
        number = tl.sum(tl.load(window + tl.arange(0, 2**BITS)))
        if (rank > below) & (rank <= below + number):
            _store_found(state, window, _window_start(guess + group, BITS), rank - below, BITS)
            tl.store(state + 3, 1)
            return
    _store_found(state, counts + group * 2**BITS, found, rank, BITS)


@triton.jit(do_not_specialize=["words"], do_not_specialize_on_alignment=["state"])
def _pack_kernel(
    scores,  # (rows, columns)
    state,  # (4,) int64, of the first `DECIDED` digits
    packed,  # (rows, words of a row) int32
    ties,  # (programs,) int32: scores that agree with the threshold so far
    counts,  # (2**BITS,) int64, of the last digit: added to unless all are decided
    words,
    columns,
    DECIDED: tl.constexpr,
    DIGITS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    program = tl.program_id(0)
    if DECIDED == DIGITS and tl.load(ties + program) == 0:  # one digit less has decided already
        return
    place, _column, inside = _places(program * BLOCK_WORDS, words, columns, BLOCK_WORDS)
    x = tl.load(scores + place, mask=inside, other=0.0)
    key = _leading_digits(x, DECIDED, BITS)
    threshold = tl.load(state)
    word = program * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    tl.store(packed + word, _word(inside & (key >= threshold)), mask=word < words)
    tied = inside & (key == threshold)
    number = tl.sum(tied.to(tl.int32))
    tl.store(ties + program, number)
    if DECIDED < DIGITS and number > 0:
        last: tl.constexpr = _length(DECIDED, BITS)
        value = _leading_digits(x, DECIDED + 1, BITS) & (2**last - 1)
        counted = _histogram(value, tied, BITS)
        tl.atomic_add(counts + tl.arange(0, 2**BITS), counted.to(tl.int64), mask=counted > 0)


@triton.jit(do_not_specialize=["words"], do_not_specialize_on_alignment=["state", "before"])
def _drop_ties_kernel(
    scores,  # (rows, columns)
    state,  # (4,) int64
    packed,  # (rows, words of a row) int32
    ties,  # (programs,) int32
    before,  # (programs,) int64: ties of all programs before
    words,
    columns,
    DIGITS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    program = tl.program_id(0)
    room = tl.load(state + 2) - tl.load(state + 1) - tl.load(before + program)
    own = tl.load(ties + program)
    if own == 0 or own <= room:
        return
    place, _column, inside = _places(program * BLOCK_WORDS, words, columns, BLOCK_WORDS)
    key = _leading_digits(tl.load(scores + place, mask=inside, other=0.0), DIGITS, BITS)
    threshold = tl.load(state)
    tied = tl.reshape((inside & (key == threshold)).to(tl.int32), (BLOCK_WORDS * 32,))
    number = tl.reshape(tl.cumsum(tied, 0), (BLOCK_WORDS, 32))  # of the tie, from 1
    keep = inside & ((key > threshold) | ((key == threshold) & (number <= room)))
    word = program * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    tl.store(packed + word, _word(keep), mask=word < words)


@triton.jit(do_not_specialize=["words", "n", "m"])
def _n_of_m_kernel(
    scores,  # (rows, columns)
    packed,  # (rows, words of a row) int32
    words,
    columns,
    n,
    m,
    BLOCK_WORDS: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_WORDS
    place, column, inside = _places(first, words, columns, BLOCK_WORDS)
    own = _key(tl.load(scores + place, mask=inside, other=0.0))
    within = column % m
    better = tl.zeros((BLOCK_WORDS, 32), tl.int32)
    for other in range(0, m):
        key = _key(tl.load(scores + place - within + other, mask=inside, other=0.0))
        better += ((key > own) | ((key == own) & (other < within))).to(tl.int32)
    word = first + tl.arange(0, BLOCK_WORDS)
    tl.store(packed + word, _word(inside & (better < n)), mask=word < words)


def configurations() -> Iterator[KernelConfig]:
    """Every kernel for each dtype of the scores."""
    types = dict.fromkeys(("state", "counts", "window", "before"), "*i64") | dict.fromkeys(
        ("nans", "packed", "ties"), "*i32"
    )
    types |= dict.fromkeys(("words", "columns", "n", "m"), "i32") | {"guess": "*fp32"}
    tile = {"BLOCK_WORDS": BLOCK_WORDS}
    for digit, guessed in ((0, True), (0, False), (1, False), (2, False)):
        yield KernelConfig(_digit_kernel, types, {"DIGIT": digit, "GUESSED": guessed, "BITS": BITS})
    for dtype, name in TRITON_NAMES.items():
        typed = types | {"scores": f"*{name}"}
        digits = DIGITS[dtype]
        for digit in range(digits - 1):
            guessed = digits == 3 and digit == 0
            constants = {"DIGIT": digit, "GUESSED": guessed, "BITS": BITS, "TILES": TILES, **tile}
            yield KernelConfig(_count_kernel, typed, constants, TILE_WARPS)
        for decided in (digits - 1, digits):
            constants = {"DECIDED": decided, "DIGITS": digits, "BITS": BITS, **tile}
            yield KernelConfig(_pack_kernel, typed, constants, TILE_WARPS)
        yield KernelConfig(_drop_ties_kernel, typed, {"DIGITS": digits, "BITS": BITS, **tile}, TILE_WARPS)
        yield KernelConfig(_n_of_m_kernel, typed, tile, TILE_WARPS)
