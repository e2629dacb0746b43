"""The layout in which the compiled engine reads a weight: words of 32 bits, the output features of a block innermost.

A word holds one float32, two bfloat16 or four int8 of inputs next to each other. Blocks of which every word is whole
and every height a number of whole vectors may lie in memory like that already, and then nothing is copied: float32
blocks stored transposed (`BlockSparseMatrix.packed`), bfloat16 blocks of width 2, int8 blocks of width 4.

Where the width of a block is no number of whole words, its words are made of any inputs that its row of blocks keeps,
in their order, and the engine gathers these.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg"
# mypy: disable-error-code="import-untyped,import-not-found"

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.nn import functional as F

from sdp_kernels.cpu_engine.register_tile import BFLOAT16, FLOAT32, INT8, PIECES
from sdp_kernels.cpu_engine.threads import compiled, run_on_threads
from sdp_kernels.cpu_engine.vectors import LANES, transpose_square
from sdp_kernels.masks import Walk

WORDS = (np.float32, np.uint32, np.int32)  # by what they hold
KIND_OF = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8}


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix as `engine.multiply` takes it, in NumPy arrays.

    Args:
        values: (blocks, words across, padded height) of a type in WORDS; (words, 1, padded height) where gathered.
        offsets: (rows of blocks + 1,) int32, where each begins in `values`.
        columns: (blocks,) int32, the block column of each block; where gathered the inputs in the pieces of words.
        height: rows of a block that count.
        words: that the blocks cover.
        gathers: whether words are made of inputs that do not lie next to each other.
    """

    values: Any
    offsets: Any
    columns: Any
    height: int
    words: int
    gathers: bool

    @functools.cached_property
    def longest(self) -> int:
        """The most that a row of blocks has."""
        return int(np.diff(self.offsets).max())

    @functools.cached_property
    def _work(self) -> Any:
        """Blocks before each row of blocks, and a little for the row itself."""
        return self.offsets + np.arange(len(self.offsets))

    @functools.cached_property
    def _bounds(self) -> dict[int, Any]:
        return {}

    def bounds(self, groups: int) -> Any:
        """(groups + 1,) where the rows of blocks are parted into groups of about as much work."""
        known = self._bounds.get(groups)
        if known is None:
            known = np.searchsorted(self._work, self._work[-1] * np.arange(groups + 1) // groups)
            self._bounds[groups] = known
        return known


@dataclass(frozen=True, eq=False)
class _Kept:
    """What was packed without a copy: it is of the values as they are as long as these are where they were."""

    values: Any  # how they lie in memory
    packed: Packed


_kept: "weakref.WeakKeyDictionary[Any, _Kept]" = weakref.WeakKeyDictionary()


def pack_once(values: Tensor, walk: Walk, in_features: int, threads: int, lists: Any) -> Packed:
    """As `pack`, but for blocks that lie in memory as they should, found again by the lists of their matrix.

    Nothing of the values is copied, so nothing can go stale; indices do not change below the lists that were made of
    them.

    Args:
        values: as in `pack`.
        walk: as in `pack`.
        in_features: as in `pack`.
        threads: as in `pack`.
        lists: an object that lives as long as the indices stay the same.
    """
    place = values.data_ptr(), values.dtype, values.shape, values.stride()
    known = _kept.get(lists)
    if known is not None and known.values == place:
        return known.packed
    packed = pack(values, walk, in_features, threads)
    if packed.values.ctypes.data == values.data_ptr():
        _kept[lists] = _Kept(place, packed)
    return packed


def pack(values: Tensor, walk: Walk, in_features: int, threads: int) -> Packed:
    """Lay out blocks, in place where they lie so already.

    Args:
        values: (blocks, out side, in side), float32, bfloat16 or int8; a transposed view for the transposed matrix.
        walk: where the blocks stand.
        in_features: columns of the matrix.
        threads: to copy with.
    """
    kind = KIND_OF[values.dtype]
    _, height, width = values.shape
    pieces = PIECES[kind]
    offsets, columns = walk.offsets, walk.neighbours
    gathers = width % pieces != 0
    if gathers:
        words, offsets, columns = _columns_in_words(values, walk, in_features, pieces)
    elif kind == FLOAT32 and (walk.positions is not None or not _lies_packed(values)):
        words = _float_words(values, walk, threads)
    else:
        ordered = values if walk.positions is None else values[walk.positions]
        words = _in_words(ordered.view(len(ordered), height, width // pieces, pieces).transpose(1, 2))
    across = -(-in_features // width) * width  # inputs that the blocks cover
    arrays = [tensor.numpy() for tensor in (words, offsets, columns)]
    return Packed(arrays[0].view(WORDS[kind]), arrays[1], arrays[2], height, -(-across // pieces), gathers)


def _lies_packed(values: Tensor) -> bool:
    return values.shape[1] % LANES == 0 and values.transpose(1, 2).is_contiguous()


def _in_words(pieces: Tensor) -> Tensor:
    """(blocks, words, height, pieces) -> (blocks, words, padded height) words as float32."""
    pieces = F.pad(pieces, (0, 0, 0, -pieces.shape[2] % LANES)) if pieces.shape[2] % LANES else pieces
    return pieces.contiguous().view(torch.float32).squeeze(3)


def _columns_in_words(values: Tensor, walk: Walk, in_features: int, pieces: int) -> tuple[Tensor, Tensor, Tensor]:
    """Words, offsets, and inputs of the words, column by column of each row of blocks, the last word filled up."""
    blocks, height, width = values.shape
    counts = walk.offsets.diff() * width
    filled = -(-counts // pieces) * pieces
    starts = F.pad(filled.cumsum(0), (1, 0))
    shift = (starts[:-1] - F.pad(counts.cumsum(0), (1, 0))[:-1]).repeat_interleave(counts, output_size=blocks * width)
    places = torch.arange(blocks * width) + shift
    inputs = (walk.neighbours[:, None] * width + torch.arange(width, dtype=torch.int32)).flatten()
    ordered = values if walk.positions is None else values[walk.positions]
    columns = ordered.transpose(1, 2).reshape(blocks * width, height)
    if in_features % width:
        columns = columns.masked_fill((inputs >= in_features)[:, None], 0)
        inputs = inputs.clamp_max(in_features - 1)
    total = int(starts[-1])
    spread = columns.new_zeros(total, height)
    spread[places] = columns
    features = inputs.new_zeros(total)
    features[places] = inputs
    words = _in_words(spread.view(total // pieces, 1, pieces, height).transpose(2, 3))
    return words, (starts // pieces).int(), features


def _float_words(values: Tensor, walk: Walk, threads: int) -> Tensor:
    """Words of float32 blocks, copied by compiled code: in training they are packed for every product."""
    blocks, height, width = len(walk.neighbours), *values.shape[1:]
    transposed = not values.is_contiguous() and values.transpose(1, 2).is_contiguous()
    stored = (values.transpose(1, 2) if transposed else values).contiguous()
    positions = torch.arange(blocks, dtype=torch.int32) if walk.positions is None else walk.positions
    packed = torch.empty(blocks, width, -(-height // LANES) * LANES)
    arrays = (tensor.detach().numpy() for tensor in (stored, positions, packed))
    run_on_threads(threads, _pack_blocks, *arrays, transposed, threads)
    return packed


@compiled(parallel=True)
def _pack_blocks(values, positions, packed, transposed, parts):
    """packed[b, k, h] = values[positions[b], h, k], or values[positions[b], k, h]; zeros up to the padded height."""
    blocks, width, padded_height = packed.shape
    height = values.shape[2] if transposed else values.shape[1]
    whole = not transposed and height % LANES == 0 and width % LANES == 0
    for part in prange(parts):
        for block in range(blocks * part // parts, blocks * (part + 1) // parts):
            source, target = values[positions[block]], packed[block]
            if whole:
                for h in range(0, height, LANES):
                    for k in range(0, width, LANES):
                        transpose_square(source[h:, k:], target[k:, h:])
                continue
            for k in range(width):
                for h in range(height):
                    target[k, h] = source[k, h] if transposed else source[h, k]
                for h in range(height, padded_height):
                    target[k, h] = 0
