"""The exact k-th smallest value among many tensors, by counting digits instead of sorting.

A float is read as digits of 16 bits. Count how often each value of the highest digit occurs, see in which of
them the k-th number falls, and go on with the next digit among the numbers that agree so far. Memory stays
that of one chunk and the counts; every number is read once a digit, and only the first reading does work.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DIGIT_VALUES = 2**16
CHUNK_ELEMENTS = 2**20


class Cut(NamedTuple):
    """Where the elements to prune end: all those below the threshold and, of those equal to it, the last ones."""

    threshold: float
    kept_ties: int


def kth_smallest(tensors: Sequence[Tensor], k: int) -> Cut:
    """The k-th smallest (from 1) of all elements; float dtypes only, no NaN, 1 <= k <= their number."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    found: list[int] = []  # digits of the k-th smallest, the highest first
    ties = 0
    for _ in range(dtype.itemsize // 2):
        counts = torch.zeros(DIGIT_VALUES, dtype=torch.int64)
        for digits in _digits(tensors, dtype):
            counts += torch.bincount(_next_digits(digits, found), minlength=DIGIT_VALUES).cpu()
        order = _ascending(found)
        cumulative = counts[order].cumsum(0)
        position = int((cumulative < k).sum())
        if position:
            k -= int(cumulative[position - 1])
        found.append(int(order[position]))
        ties = int(counts[found[-1]])
    bits = torch.tensor(found[::-1], dtype=torch.int32).to(torch.int16)
    return Cut(float(bits.view(dtype)), ties - k)


def _digits(tensors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Chunks of the elements as (elements, digits) int16, the lowest digit first."""
    for tensor in tensors:
        for chunk in torch.split(tensor.detach().flatten(), CHUNK_ELEMENTS):
            positive_zero = chunk.to(dtype) + 0.0  # -0.0 + 0.0 is 0.0: both zeros must count as equal
            yield positive_zero.view(torch.int16).view(-1, dtype.itemsize // 2)


def _next_digits(digits: Tensor, found: list[int]) -> Tensor:
    """The digit after those found, of the elements that agree with them, as 0 ... 65535."""
    for level, digit in enumerate(found):
        signed = digit - DIGIT_VALUES if digit >= DIGIT_VALUES // 2 else digit
        digits = digits[digits[:, -1 - level] == signed]
    return digits[:, -1 - len(found)].int().bitwise_and_(DIGIT_VALUES - 1)


def _ascending(found: list[int]) -> Tensor:
    """All values of the next digit, in the order of the floats that have them.

    Negative floats have the sign bit, the highest, and are the smaller the larger the rest of their bits.
    """
    values = torch.arange(DIGIT_VALUES)
    half = DIGIT_VALUES // 2
    if not found:
        return torch.cat((values[half:].flip(0), values[:half]))
    return values.flip(0) if found[0] >= half else values
