"""A mask as the operators take it, and what decides which product a mask and an input get."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from torch import Tensor

from sdp_kernels.masks import ActiveBlocks, BitMask, as_tensor
from sdp_kernels.tiles.launch import KERNEL_SIDES

# Up to this many tokens the weight is masked in registers, where the product waits for memory and a masked copy would
# triple what is read and written; with more, the copy costs less than a product slower than cuBLAS. By arithmetic on
# published rates the two meet somewhere between 256 and 4096 tokens.
FEW_TOKENS = 256


class MaskArguments(TypedDict):
    """A mask in tensors and numbers, by the names that the operators give them."""

    mask: Tensor  # bool, or int32 words
    lists: list[Tensor]  # of the kept blocks, in the order of `ActiveBlocks`; empty where they are no use
    block_rows: int  # 0 without blocks to walk along
    block_columns: int


def mask_arguments(mask: Tensor | BitMask, backend: str, input: Tensor) -> MaskArguments:
    """The mask for an operator that runs on this backend with this input."""
    lists: list[Tensor] = []
    sides = 0, 0
    if isinstance(mask, BitMask) and mask.block_shape is not None and _walks_blocks(mask, backend, input):
        sides = mask.block_shape
        if mask.lists is not None:
            blocks = mask.lists
            lists = [blocks.crow_indices, blocks.col_indices, blocks.ccol_indices, blocks.row_indices]
    return {"mask": as_tensor(mask), "lists": lists, "block_rows": sides[0], "block_columns": sides[1]}


def _walks_blocks(mask: BitMask, backend: str, input: Tensor) -> bool:
    """Whether a product on this backend may go along the blocks of this mask."""
    if backend == "triton":
        many = input.numel() > FEW_TOKENS * input.shape[-1]  # with few, what counts is how much of the weight is read
        takes = mask.lists is not None and set(mask.block_shape or ()) <= set(KERNEL_SIDES)
        return takes and not (many and mask.mostly_kept)
    return backend == "cpu"


class Masking(NamedTuple):
    """Inside an operator: the mask, and the backend that applies it."""

    mask: Tensor
    lists: Sequence[Tensor]
    block_shape: tuple[int, int]
    backend: str

    @property
    def blocks(self) -> ActiveBlocks:
        """The lists, if there are any."""
        return ActiveBlocks(*self.lists)

    def bit_mask(self, weight: Tensor) -> BitMask | None:
        """The mask of this weight, if it is made of blocks."""
        if 0 in self.block_shape:
            return None
        lists = self.blocks if self.lists else None
        return BitMask(self.mask, (weight.shape[0], weight.shape[1]), self.block_shape, lists)


class Teacher(NamedTuple):
    """Features to compare the output of a product with, column by column."""

    features: Tensor  # (tokens, features), any float dtype
    sample_weight: Tensor | None  # (tokens,) float32
    center: bool


def has_kernel(lists: Sequence[Tensor], tokens: int) -> bool:
    """Whether, on a GPU, a Triton kernel makes the product; otherwise cuBLAS does, with a masked copy."""
    return bool(lists) or tokens <= FEW_TOKENS
