"""The exact k-th smallest value among many tensors, by counting digits instead of sorting.

The bits of a float, read as sign and magnitude, are an integer that orders like the float. Its digits are
found from the highest to the lowest: count how often each value of the digit occurs among the numbers that
agree in the digits found so far, and see in which the k-th falls. Memory stays that of one chunk.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

DIGIT_BITS = 11
CHUNK_ELEMENTS = 2**20


def kth_smallest(tensors: Sequence[Tensor], k: int) -> float:
    """The k-th smallest (from 1) of all elements; float dtypes only, no NaN, 1 <= k <= their number."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    bits = 64 if wide else 32
    prefix, known = -(1 << (DIGIT_BITS - 1)), 0  # the digits found, as one signed number; how many bits
    while known < bits:
        width = min(DIGIT_BITS, bits - known)
        shift = bits - known - width
        first = prefix if known == 0 else prefix << width
        counts = sum(_digit_counts(keys, shift, first, width) for keys in _ordered_keys(tensors, wide))
        assert isinstance(counts, Tensor)
        cumulative = counts.cumsum(0)
        digit = int((cumulative < k).sum())
        k -= int(cumulative[digit] - counts[digit])
        prefix, known = first + digit, known + width
    return _float_of(prefix, wide)


def _digit_counts(keys: Tensor, shift: int, first: int, width: int) -> Tensor:
    """How many of the keys, shifted right, are first, first + 1, ..., first + 2^width - 1."""
    digits = (keys >> shift) - first
    digits = digits[(digits >= 0) & (digits < 1 << width)]
    return torch.bincount(digits, minlength=1 << width).cpu()


def _ordered_keys(tensors: Sequence[Tensor], wide: bool) -> Iterator[Tensor]:
    """Chunks of int64 that order like the floats; -0.0 and 0.0 become the same."""
    dtype, integer = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    magnitude_bits = torch.iinfo(integer).max
    for tensor in tensors:
        for chunk in torch.split(tensor.detach().flatten(), CHUNK_ELEMENTS):
            bits = chunk.to(dtype).view(integer).long()
            yield torch.where(bits < 0, -(bits & magnitude_bits), bits)


def _float_of(key: int, wide: bool) -> float:
    """The float whose key this is."""
    dtype, integer = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    magnitude = torch.tensor(abs(key), dtype=integer).view(dtype).item()
    return -magnitude if key < 0 else magnitude
