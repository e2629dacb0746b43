"""Tile sizes of products with blocks of a weight, as a function of sizes, dtype and device."""

from typing import NamedTuple

import torch

STEP = 64  # input features a step
TOKENS_STEP = 64  # tokens a step of the gradient of the values
KERNEL_SIDES = (16, 32, 64, 128)  # of the blocks that the kernels take

# Compute capability -> (bytes of shared memory for a program, most stages). The widest multiprocessors hide a load
# behind three steps; a capability that is not listed uses the last entry before it.
DEVICES = {
    80: (163 * 1024, 4),
    86: (99 * 1024, 3),
    90: (227 * 1024, 4),
    100: (227 * 1024, 4),
    120: (99 * 1024, 3),
}


class Launch(NamedTuple):
    """Tile sizes and options of one launch of the product."""

    block_tokens: int
    num_warps: int
    num_stages: int


def choose_launch(tokens: int, height: int, dtype: torch.dtype, capability: int) -> Launch:
    """How the product is launched for blocks with `height` output features."""
    shared, most_stages = DEVICES[max((known for known in DEVICES if known <= capability), default=86)]
    largest = 64 if dtype == torch.float32 else 128
    block_tokens = min(largest, max(16, power_above(tokens)))
    num_stages = max(2, min(most_stages, shared // shared_memory(block_tokens, height, dtype, 1)))
    held = 64 * 32 if dtype == torch.float32 else 64 * 64  # a larger tile does not fit into the registers of four warps
    # Nor do the addresses of 128 tokens, four stages ahead, where no tensor core reads from shared memory.
    many = block_tokens * height > held or (capability < 90 and block_tokens == 128)
    return Launch(block_tokens, 8 if many else 4, num_stages)


def shared_memory(block_tokens: int, height: int, dtype: torch.dtype, num_stages: int) -> int:
    """Bytes that a program of the product needs for its stages, at most."""
    return num_stages * (block_tokens + height) * STEP * dtype.itemsize


def values_step(dtype: torch.dtype) -> int:
    """Tokens a step of the gradient of the values."""
    return TOKENS_STEP // 2 if dtype == torch.float32 else TOKENS_STEP


def values_warps(block_shape: tuple[int, int]) -> int:
    """Warps of a program that makes the gradient of the values of a block."""
    return 8 if block_shape == (128, 128) else 4


def power_above(number: int) -> int:
    """The least power of two that is not below a number of at least 1."""
    return 1 << (number - 1).bit_length()
