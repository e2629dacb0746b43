"""BitMask: which weights of a matrix are kept, at one bit a weight."""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdp_kernels.dispatch import is_captured
from sdp_kernels.masked_linear.blocks import SMALLEST_SIDE, ActiveBlocks, exceeds_lists

WORD_BITS = 32
_GATHER_BITS = 0x0102040810204080  # times eight 0/1 bytes: their bits, in order, in the top byte


@dataclass(frozen=True, eq=False)
class BitMask:
    """A boolean matrix packed into words; compare with `equal`.

    Bit j of word w is column 32 w + j; 1 means kept; bits past the last column are 0. The class holds no
    state of its own: a module keeps `words` as a buffer and builds the mask around it when it needs one.

    Attributes:
        words: (rows, ceil(columns / 32)) int32.
        shape: (rows, columns) of the weight.
        block_shape: (rows, columns) of the blocks that are kept or pruned as a whole, or None.
        lists: the kept blocks, which products walk along; made with the mask for blocks whose sides are 16 or
            more, otherwise None.
        mostly_kept: whether so many blocks are kept that dense products are faster on a GPU. Set when the mask is
            made, from what the host knows: to ask the device would stall it.

    Raises:
        ValueError: words of another dtype or shape.
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
        mask: Tensor = _unpack_bits(self.words, self.shape[1])
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


def words_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the words of a mask of this shape."""
    return shape[0], -(-shape[1] // WORD_BITS)


def _check_words(words: Tensor, shape: tuple[int, int]) -> None:
    if words.dtype != torch.int32:
        raise ValueError(f"words must be int32, got {words.dtype}")
    if tuple(words.shape) != words_shape(shape):
        text = f"words of a mask of shape {tuple(shape)} must have shape {words_shape(shape)}"
        raise ValueError(f"{text}, got {tuple(words.shape)}")


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
    octets = words.flatten().view(torch.uint8)
    # What is made inside of a capture holds nothing yet: it belongs to the graph and must not be kept for others.
    make = _make_patterns if is_captured(words) else _patterns
    patterns = make(words.device).index_select(0, octets.int())
    mask = patterns.view(torch.bool).view(words.shape[0], words.shape[1] * WORD_BITS)
    return mask[:, :columns].contiguous()


@torch.library.custom_op("sdp_kernels::unpack_bits", mutates_args=())
def _unpack_bits(words: Tensor, columns: int) -> Tensor:
    """`unpack_bits` as one node for torch.compile."""
    return unpack_bits(words, columns)


@_unpack_bits.register_fake
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
