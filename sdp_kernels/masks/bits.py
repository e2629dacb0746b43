"""Masks as bits: 32 weights a word, packed and unpacked eight at a time."""

import functools
import sys

import torch
from torch import Tensor

from sdp_kernels.dispatch import is_captured

WORD_BITS = 32
_GATHER_BITS = 0x0102040810204080  # times eight 0/1 bytes: their bits, in order, in the top byte


def words_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the words of a mask of this shape."""
    return shape[0], -(-shape[1] // WORD_BITS)


def pack_bits(mask: Tensor) -> Tensor:
    """(rows, columns) bool -> (rows, ceil(columns / 32)) int32."""
    rows, columns = mask.shape
    words = words_shape((rows, columns))[1]
    padded = torch.nn.functional.pad(mask, (0, words * WORD_BITS - columns)).contiguous()
    _require_little_endian()
    octets = padded.flatten().view(torch.int64)  # eight weights each
    octets = (octets * _GATHER_BITS).bitwise_right_shift_(56).to(torch.uint8)
    return octets.view(torch.int32).view(rows, words)


def unpack_bits(words: Tensor, columns: int) -> Tensor:
    """(rows, ceil(columns / 32)) int32 -> (rows, columns) bool.

    Looks every byte up among the 256 patterns of eight weights, which is far faster than shifting bits out.
    """
    _require_little_endian()
    octets = words.contiguous().flatten().view(torch.uint8)
    # What is made inside of a capture holds nothing yet: it belongs to the graph and must not be kept for others.
    make = _make_patterns if is_captured(words) else _patterns
    patterns = make(words.device).index_select(0, octets.int())
    mask = patterns.view(torch.bool).view(words.shape[0], words.shape[1] * WORD_BITS)
    return mask[:, :columns].contiguous()


def unpack_fields(words: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """(rows, ceil(columns / 32)) int32 on a CPU -> (rows, columns) integers with all bits set, or none."""
    _require_little_endian()
    octets = words.contiguous().flatten().view(torch.uint8)
    fields = _fields(dtype).index_select(0, octets.int())
    return fields.view(words.shape[0], words.shape[1] * WORD_BITS)[:, :columns]


@functools.cache
def _fields(dtype: torch.dtype) -> Tensor:
    """(256, 8) integers, -1 for every bit of their index that is set, the lowest first."""
    return _make_patterns(torch.device("cpu"))[:, None].view(torch.uint8).to(dtype).neg_()


@torch.library.custom_op("sdp_kernels::unpack_bits", mutates_args=())
def unpack_bits_op(words: Tensor, columns: int) -> Tensor:
    """`unpack_bits` as one node for torch.compile."""
    return unpack_bits(words, columns)


@unpack_bits_op.register_fake
def _(words: Tensor, columns: int) -> Tensor:
    return words.new_empty((words.shape[0], columns), dtype=torch.bool)


def _make_patterns(device: torch.device) -> Tensor:
    """(256,) int64 whose eight bytes are the bits of their index, the lowest first."""
    index = torch.arange(256, device=device)[:, None]
    bits = (index >> torch.arange(8, device=device)) & 1
    return bits.to(torch.uint8).view(torch.int64).flatten()


_patterns = functools.cache(_make_patterns)


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise NotImplementedError("BitMask reads words as bytes and needs a little-endian machine")
