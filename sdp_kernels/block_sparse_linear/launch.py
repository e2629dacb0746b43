"""What the block-sparse product adds to the shared choice of tiles: programs that share a row, and tuned launches."""

from typing import NamedTuple, Self

import torch

from sdp_kernels.tiles.launch import Launch, power_above

SPLITS = 16  # at most


class ProductClass(NamedTuple):
    """What a tuned launch is for."""

    tokens: int  # the next power of two
    shape: tuple[int, int]  # (out, in)
    block_shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, tokens: int, shape: tuple[int, int], block_shape: tuple[int, int], dtype: torch.dtype) -> Self:
        """The class of a product with at least one token."""
        return cls(power_above(tokens), shape, block_shape, dtype)


class TunedLaunch(NamedTuple):
    """A launch, and how many programs share a row of blocks."""

    launch: Launch
    splits: int


TUNED: dict[ProductClass, TunedLaunch] = {}  # empty until tuning.py loads a table; comes before the choices below


def choose_splits(programs: int, steps: float, multiprocessors: int) -> int:
    """How many programs share a row of blocks that takes `steps` on average: enough to fill the device twice."""
    splits = 1
    while splits < SPLITS and programs * splits < 2 * multiprocessors and splits * 4 <= steps:
        splits *= 2
    return splits
