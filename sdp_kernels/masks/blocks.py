"""The kept blocks of a mask as lists, in the order of their rows and in that of their columns."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_SIDE = 16  # of blocks worth a list: smaller ones would make the lists larger than the words

# Density of blocks, by their smaller side, up to which walking along them is faster on a GPU than a dense product with
# many tokens. An estimate: an input element that is loaded feeds as many multiplications as the block has outputs.
MOST_DENSE = {16: 0.1, 32: 0.2, 64: 0.3, 128: 0.5}


@dataclass(frozen=True, eq=False)
class ActiveBlocks:
    """Which blocks are kept, as int32 lists with room for all blocks, so that they can change in place.

    Attributes:
        crow_indices: (block rows + 1,) where each row of blocks begins in `col_indices`.
        col_indices: (blocks,) the block columns of the kept blocks, row by row, and then anything.
        ccol_indices: (block columns + 1,) where each column of blocks begins in `row_indices`.
        row_indices: (blocks,) the block rows of the kept blocks, column by column, and then anything.
    """

    crow_indices: Tensor
    col_indices: Tensor
    ccol_indices: Tensor
    row_indices: Tensor

    @classmethod
    def from_grid(cls, keep: Tensor) -> "ActiveBlocks":
        """The lists of a boolean grid, made on its device without waiting for it."""
        return cls(*_compressed(keep), *_compressed(keep.T))

    def copy_(self, other: "ActiveBlocks") -> None:
        """Take over the lists of another mask of the same grid, in place."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))

    def to(self, device: torch.device | str) -> "ActiveBlocks":
        """The lists on another device."""
        return ActiveBlocks(*(getattr(self, field.name).to(device) for field in fields(self)))

    @property
    def nbytes(self) -> int:
        """Memory of the lists."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))


torch.export.register_dataclass(ActiveBlocks, serialized_type_name="sdp_kernels.ActiveBlocks")


class Walk(NamedTuple):
    """Where the blocks of a matrix stand, in the order in which a product meets them."""

    offsets: Tensor  # (rows of blocks + 1,) where each begins in the lists below
    neighbours: Tensor  # (blocks,) the block column of each block
    positions: Tensor | None = None  # (blocks,) its place among the values, or None where that is the order already


def exceeds_lists(density: float, block_shape: tuple[int, int]) -> bool:
    """Whether a GPU multiplies faster with all blocks than along the lists of the kept ones."""
    return density > max((most for side, most in MOST_DENSE.items() if side <= min(block_shape)), default=0.0)


def _compressed(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets of the rows, and the columns kept in each, followed by those that are not."""
    offsets = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).int()
    places = torch.argsort((~keep).flatten().byte(), stable=True)
    return offsets, (places % keep.shape[1]).int()
