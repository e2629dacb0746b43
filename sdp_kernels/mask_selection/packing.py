"""Masks written as bits, a few rows at a time: no bool tensor of the scores' size is ever made."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sdp_kernels.mask_selection.threshold import CHUNK_ELEMENTS, kth_smallest
from sdp_kernels.masks import pack_bits, words_shape


def keep_highest(units: Sequence[Tensor], pruned: int) -> list[Tensor]:
    """The words of masks that prune exactly `pruned` of all the units: the lowest and, of equal ones, the last."""
    if pruned == 0:
        return [pack_bits(each.new_ones(1, dtype=torch.bool).expand(each.shape)) for each in units]
    threshold, room = kth_smallest(units, pruned)
    words = []
    for each in units:
        parts = []
        for chunk in row_chunks(each):
            keep, room = _keep_above(chunk, threshold, room)
            parts.append(pack_bits(keep))
        words.append(torch.cat(parts))
    return words


def _keep_above(chunk: Tensor, threshold: float, room: int) -> tuple[Tensor, int]:
    """Which entries are above the threshold or among the first `room` equal to it, and the room that is left."""
    if room == 0:
        return chunk > threshold, 0
    tied = chunk == threshold
    ties = int(tied.count_nonzero())
    if ties <= room:
        return chunk >= threshold, room - ties
    keep = (chunk > threshold).contiguous()
    keep.view(-1)[tied.flatten().nonzero()[:room, 0]] = True
    return keep, 0


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """The words of a mask that keeps the n highest of every m neighbours in a row, of equal ones the first."""
    parts = [scores.new_empty(words_shape((0, scores.shape[1])), dtype=torch.int32)]
    for chunk in row_chunks(scores):
        groups = chunk.reshape(-1, m)
        best = groups.sort(dim=1, descending=True, stable=True).indices[:, :n]
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
        parts.append(pack_bits(keep.view(chunk.shape)))
    return torch.cat(parts)


def holds_nan(matrix: Tensor) -> bool:
    """Whether any entry is NaN, which the least and the greatest entry tell without a mask of its size."""
    return bool(matrix.aminmax().min.isnan())


def row_chunks(matrix: Tensor) -> Iterator[Tensor]:
    """Rows of the matrix, together about `CHUNK_ELEMENTS` entries."""
    yield from torch.split(matrix.detach(), max(1, CHUNK_ELEMENTS // matrix.shape[1]))
