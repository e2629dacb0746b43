"""How the kernels are launched: tile sizes and options as a function of sizes, dtype and device."""

from typing import NamedTuple, Self

import torch

STEP = 64  # input features a step
TOKENS_STEP = 64  # tokens a step of the gradient of the values
SPLITS = 16  # at most

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


class ProductClass(NamedTuple):
    """What a tuned launch is for."""

    tokens: int  # the next power of two
    shape: tuple[int, int]  # (out, in)
    block_shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, tokens: int, shape: tuple[int, int], block_shape: tuple[int, int], dtype: torch.dtype) -> Self:
        """The class of a product with at least one token."""
        return cls(_power_above(tokens), shape, block_shape, dtype)


class TunedLaunch(NamedTuple):
    """A launch, and how many programs share a row of blocks."""

    launch: Launch
    splits: int


TUNED: dict[ProductClass, TunedLaunch] = {}  # empty until tuning.py loads a table; comes before the choices below


def choose_launch(tokens: int, height: int, dtype: torch.dtype, capability: int) -> Launch:
    """How the product is launched for blocks with `height` output features."""
    shared, most_stages = DEVICES[max((known for known in DEVICES if known <= capability), default=86)]
    largest = 64 if dtype == torch.float32 else 128
    block_tokens = min(largest, max(16, _power_above(tokens)))
    num_stages = max(2, min(most_stages, shared // shared_memory(block_tokens, height, dtype, 1)))
    held = 64 * 32 if dtype == torch.float32 else 64 * 64  # a larger tile does not fit into the registers of four warps
    # Nor do the addresses of 128 tokens, four stages ahead, where no tensor core reads from shared memory.
    many = block_tokens * height > held or (capability < 90 and block_tokens == 128)
    return Launch(block_tokens, 8 if many else 4, num_stages)


def shared_memory(block_tokens: int, height: int, dtype: torch.dtype, num_stages: int) -> int:
    """Bytes that a program of the product needs for its stages, at most."""
    return num_stages * (block_tokens + height) * STEP * dtype.itemsize


def choose_splits(programs: int, steps: float, multiprocessors: int) -> int:
    """How many programs share a row of blocks that takes `steps` on average: enough to fill the device twice."""
    splits = 1
    while splits < SPLITS and programs * splits < 2 * multiprocessors and splits * 4 <= steps:
        splits *= 2
    return splits


def values_step(dtype: torch.dtype) -> int:
    """Tokens a step of the gradient of the values."""
    return TOKENS_STEP // 2 if dtype == torch.float32 else TOKENS_STEP


def values_warps(block_shape: tuple[int, int]) -> int:
    return 8 if block_shape == (128, 128) else 4


def _power_above(number: int) -> int:
    return 1 << (number - 1).bit_length()
