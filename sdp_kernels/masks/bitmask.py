"""BitMask: which weights of a matrix are kept, at one bit a weight."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdp_kernels.checks import check_same_device
from sdp_kernels.masks.bits import pack_bits, unpack_bits_op, words_shape
from sdp_kernels.masks.blocks import SMALLEST_SIDE, ActiveBlocks, exceeds_lists


@dataclass(frozen=True, eq=False)
class BitMask:
    """A boolean matrix packed into words; compare with `equal`.

    Bit j of word w is column 32 w + j; 1 means kept; bits past the last column are 0. The class holds no
    state of its own: a module keeps `words` as a buffer and builds the mask around it when it needs one.

    Attributes:
        words: (rows, ceil(columns / 32)) int32.
        shape: (rows, columns) of the weight.
        block_shape: (rows, columns) of the blocks that are kept or pruned as a whole, or None.
        lists: the kept blocks, which products on a GPU and in plain torch walk along; made with the mask for blocks
            whose sides are 16 or more, otherwise None. The compiled engine of a CPU reads the words instead.
        mostly_kept: whether so many blocks are kept that dense products are faster on a GPU. Set when the mask is
            made, from what the host knows: to ask the device would stall it.

    Raises:
        ValueError: words of another dtype or shape.

    Example:
        >>> mask = BitMask.from_bool(torch.tensor([[True, False, True, True]]))
        >>> mask.words, mask.sparsity
        (tensor([[13]], dtype=torch.int32), 0.25)
    """

    words: Tensor
    shape: tuple[int, int]
    block_shape: tuple[int, int] | None = None
    lists: ActiveBlocks | None = None
    mostly_kept: bool = False

    def __post_init__(self) -> None:
        # A pytree is rebuilt around anything, also around what is no tensor.
        if isinstance(self.words, Tensor):
            _check_words(self.words, self.shape)

    @classmethod
    def from_bool(cls, mask: Tensor, *, block_shape: tuple[int, int] | None = None) -> "BitMask":
        """Pack a boolean matrix, True where kept.

        Raises:
            ValueError: not a matrix, or a block of `block_shape` is kept only in part.
            TypeError: not boolean.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.dim() != 2:
            raise ValueError(f"mask must have 2 dimensions, got shape {tuple(mask.shape)}")
        shape = (mask.shape[0], mask.shape[1])
        if block_shape is None:
            return cls(pack_bits(mask), shape)
        rows, columns = block_grid(shape, block_shape)
        blocks = mask.view(rows, block_shape[0], columns, block_shape[1])
        keep = blocks.all(3).all(1)
        if not torch.equal(keep, blocks.any(3).any(1)):
            raise ValueError(f"mask must keep or prune blocks of shape {tuple(block_shape)} as a whole")
        sides = (block_shape[0], block_shape[1])
        share = int(keep.count_nonzero()) / max(1, keep.numel())
        return cls(pack_bits(mask), shape, sides, _lists(keep, sides), exceeds_lists(share, sides))

    @classmethod
    def from_blocks(
        cls, blocks: Tensor, block_shape: tuple[int, int], shape: tuple[int, int], *, density: float = 0.0
    ) -> "BitMask":
        """Pack a boolean grid with one entry a block, True where kept, without waiting for its device.

        Args:
            blocks: (block rows, block columns) bool.
            block_shape: (rows, columns) of a block.
            shape: (rows, columns) of the weight.
            density: about which share of the blocks is kept, if the caller knows: it decides whether products with
                many tokens on a GPU walk along the kept blocks or are dense. The mask itself does not depend on it.

        Raises:
            ValueError: the grid is not that of `shape` in blocks of `block_shape`.
            TypeError: not boolean.
        """
        if not isinstance(blocks, Tensor) or blocks.dtype != torch.bool:
            raise TypeError(f"blocks must be a bool tensor, got {getattr(blocks, 'dtype', type(blocks).__name__)}")
        grid = block_grid(shape, block_shape)
        if tuple(blocks.shape) != grid:
            raise ValueError(f"blocks must have shape {grid}, got {tuple(blocks.shape)}")
        sides = block_shape[0], block_shape[1]
        words = pack_bits(blocks.repeat_interleave(sides[1], 1)).repeat_interleave(sides[0], 0)
        return cls(words, (shape[0], shape[1]), sides, _lists(blocks, sides), exceeds_lists(density, sides))

    def to_bool(self) -> Tensor:
        """The mask as a boolean matrix, True where kept."""
        mask: Tensor = unpack_bits_op(self.words, self.shape[1])
        return mask

    def to_blocks(self) -> Tensor:
        """The mask as a boolean grid with one entry a block.

        Raises:
            ValueError: the mask has no block shape.
        """
        if self.block_shape is None:
            raise ValueError("block_shape is None: this mask is not made of blocks")
        rows, columns = self.block_shape
        return self.to_bool()[::rows, ::columns]

    @property
    def sparsity(self) -> float:
        """The fraction of weights pruned."""
        if 0 in self.shape:
            return 0.0
        return 1 - int(self.to_bool().count_nonzero()) / (self.shape[0] * self.shape[1])

    @property
    def nbytes(self) -> int:
        """Memory of the words and the lists."""
        return self.words.nbytes + (0 if self.lists is None else self.lists.nbytes)

    def equal(self, other: "BitMask") -> bool:
        """Whether both keep the same weights of the same shape; block shapes are not compared."""
        return self.shape == other.shape and torch.equal(self.words, other.words)

    def to(self, device: torch.device | str) -> "BitMask":
        """The mask on another device."""
        lists = None if self.lists is None else self.lists.to(device)
        return BitMask(self.words.to(device), self.shape, self.block_shape, lists, self.mostly_kept)

    def copy_(self, other: "BitMask") -> None:
        """Take over another mask in place, so that compiled code and CUDA graphs go on with the new one.

        They also go on with the same products: `mostly_kept` stays as it is.

        Raises:
            ValueError: shapes or block shapes differ, or only one of the two has lists.
        """
        for name in ("shape", "block_shape"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                raise ValueError(f"other must have {name} {mine}, got {its}")
        if (self.lists is None) != (other.lists is None):
            raise ValueError("other must have lists if and only if this mask has")
        self.words.copy_(other.words)
        if self.lists is not None and other.lists is not None:
            self.lists.copy_(other.lists)


torch.export.register_dataclass(BitMask, serialized_type_name="sdp_kernels.BitMask")


def block_grid(shape: tuple[int, ...], block_shape: tuple[int, int]) -> tuple[int, int]:
    """Number of blocks down and across.

    Raises:
        ValueError: no two whole numbers, or the blocks do not divide the shape.
    """
    sides = tuple(block_shape) if isinstance(block_shape, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise ValueError(f"block_shape must be two whole numbers of at least 1, got {block_shape!r}")
    rows, columns = sides
    if rows < 1 or columns < 1 or shape[0] % rows or shape[1] % columns:
        raise ValueError(f"block_shape {tuple(block_shape)} must divide the shape {tuple(shape)}")
    return shape[0] // rows, shape[1] // columns


def _lists(keep: Tensor, block_shape: tuple[int, int]) -> ActiveBlocks | None:
    return ActiveBlocks.from_grid(keep) if min(block_shape) >= SMALLEST_SIDE else None


def _check_words(words: Tensor, shape: tuple[int, int]) -> None:
    if words.dtype != torch.int32:
        raise ValueError(f"words must be int32, got {words.dtype}")
    if tuple(words.shape) != words_shape(shape):
        text = f"words of a mask of shape {tuple(shape)} must have shape {words_shape(shape)}"
        raise ValueError(f"{text}, got {tuple(words.shape)}")


def as_bool(mask: Tensor | BitMask) -> Tensor:
    """The mask as a boolean matrix, True where kept, whichever of the two it is."""
    return mask.to_bool() if isinstance(mask, BitMask) else mask


def as_tensor(mask: Tensor | BitMask) -> Tensor:
    """The mask as operators and kernels take it: int32 words or bools."""
    return mask.words if isinstance(mask, BitMask) else mask


def check_mask(name: str, mask: Tensor | BitMask, weight: Tensor) -> None:
    """A mask for this weight: of its shape, on its device, bool or packed.

    Raises:
        ValueError: another shape or device.
        TypeError: neither bool nor `BitMask`.
    """
    tensor = as_tensor(mask)
    if not isinstance(tensor, Tensor) or (tensor is mask and tensor.dtype != torch.bool):
        raise TypeError(f"{name} must be a bool tensor or a BitMask, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if tuple(mask.shape) != tuple(weight.shape):
        raise ValueError(f"{name} must have shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
    check_same_device(name, tensor, "its weight", weight)
