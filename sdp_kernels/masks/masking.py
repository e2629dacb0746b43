"""Zeros in the place of pruned weights, exact whatever the pruned values are."""

import functools

import torch
from torch import Tensor

from sdp_kernels.masks.bits import pack_bits, unpack_bits, unpack_fields

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK_ELEMENTS = 2**19  # of the mask widened at a time: it stays in the cache


def masked(weight: Tensor, keep: Tensor) -> Tensor:
    """A copy of the weight with +0.0 where it is pruned.

    Args:
        weight: a matrix.
        keep: its mask as bools, or as int32 words.
    """
    if weight.device.type != "cpu":
        return torch.where(_bools(keep, weight), weight, 0)
    copy = torch.empty_like(weight)
    _and(weight, keep, copy)
    return copy


def mask_(weight: Tensor, keep: Tensor) -> None:
    """Write +0.0 into the weight where it is pruned; arguments as for `masked`."""
    if weight.device.type != "cpu":
        weight.masked_fill_(~_bools(keep, weight), 0)
        return
    _and(weight, keep, weight)


def keeps_everything(keep: Tensor, weight: Tensor) -> bool:
    """Whether a mask on a CPU, bools or words, prunes nothing of this weight; False on any other device."""
    if keep.device.type != "cpu":
        return False
    if keep.dtype == torch.bool:
        return bool(keep.all())
    if weight.shape[1] % 32 == 0 and keep.numel():
        least, most = keep.aminmax()  # by far the fastest of all ways to ask
        return int(least) == -1 == int(most)
    return torch.equal(keep, _full_row(weight.shape[1]).expand_as(keep))


@functools.cache
def _full_row(columns: int) -> Tensor:
    """The words of one row that keeps everything."""
    return pack_bits(torch.ones(1, columns, dtype=torch.bool))


def _and(weight: Tensor, keep: Tensor, result: Tensor) -> None:
    """A bitwise and with integers that have all bits set where kept.

    That is several times faster than torch.where and masked_fill_, which take one element at a time when the mask is a
    bool tensor.
    """
    integer = INTEGERS[weight.itemsize]
    rows = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    matrices = weight.view(integer), keep, result.view(integer)
    for part, kept, target in zip(*(torch.split(matrix, rows) for matrix in matrices), strict=True):
        fields = kept.to(integer).neg_() if kept.dtype == torch.bool else unpack_fields(kept, weight.shape[1], integer)
        torch.bitwise_and(part, fields, out=target)


def _bools(keep: Tensor, weight: Tensor) -> Tensor:
    """The mask of a weight as bools."""
    return keep if keep.dtype == torch.bool else unpack_bits(keep, weight.shape[1])
