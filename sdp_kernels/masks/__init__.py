"""Masks, below all ops: bitmask.py is the packed mask, blocks.py lists its kept blocks, masking.py writes its zeros."""

from sdp_kernels.masks.bitmask import BitMask, as_bool, as_tensor, block_grid, check_mask
from sdp_kernels.masks.bits import WORD_BITS, pack_bits, unpack_bits, words_shape
from sdp_kernels.masks.blocks import ActiveBlocks, Walk
from sdp_kernels.masks.masking import keeps_everything, mask_, masked

__all__ = [
    "WORD_BITS",
    "ActiveBlocks",
    "BitMask",
    "Walk",
    "as_bool",
    "as_tensor",
    "block_grid",
    "check_mask",
    "keeps_everything",
    "mask_",
    "masked",
    "pack_bits",
    "unpack_bits",
    "words_shape",
]
