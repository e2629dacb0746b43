"""BlockSparseMatrix: a weight of which only some blocks are kept."""

from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

from sdp_kernels.checks import check_dims, check_floating
from sdp_kernels.masks import BitMask, as_bool, check_mask


@dataclass(frozen=True, eq=False)
class BlockLists:
    """The blocks in the orders in which products walk them; all int32, derived from the indices of a matrix.

    Attributes:
        block_rows: (blocks,) block row of each block.
        row_order: (block rows,) block rows, the fullest first.
        ccol_indices: (block columns + 1,) where each block column begins in the two lists below.
        row_indices: (blocks,) block rows, one block column after the other.
        positions: (blocks,) the place in `values` of these blocks.
        column_order: (block columns,) block columns, the fullest first.
    """

    block_rows: Tensor
    row_order: Tensor
    ccol_indices: Tensor
    row_indices: Tensor
    positions: Tensor
    column_order: Tensor

    @classmethod
    def from_indices(cls, crow_indices: Tensor, col_indices: Tensor, block_columns: int) -> "BlockLists":
        """The lists of checked indices, by one stable sort of the blocks."""
        row_counts = crow_indices.diff()
        column_counts = torch.bincount(col_indices, minlength=block_columns)
        rows = torch.arange(row_counts.numel(), dtype=torch.int32, device=crow_indices.device)
        block_rows = rows.repeat_interleave(row_counts)
        positions = torch.argsort(col_indices, stable=True)
        return cls(
            block_rows,
            torch.argsort(row_counts, descending=True, stable=True).int(),
            torch.nn.functional.pad(column_counts.cumsum(0), (1, 0)).int(),
            block_rows[positions],
            positions.int(),
            torch.argsort(column_counts, descending=True, stable=True).int(),
        )

    def to(self, device: torch.device) -> "BlockLists":
        """The lists on another device."""
        return BlockLists(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True, eq=False)
class BlockSparseMatrix:
    """A matrix stored as its kept blocks, block row by block row, as torch's BSR layout does; compare with `equal`.

    Every field is checked when a matrix is built, so that no product reads outside of its tensors. The class
    holds no state of its own: a module keeps the tensors (`values` as a parameter) and builds the matrix
    around them. `dataclasses.replace(matrix, values=...)` keeps the checked indices.

    Attributes:
        values: (blocks, block rows, block columns), any float dtype. Entries of the last blocks that lie outside
            of `shape` are not part of the matrix; they must be finite.
        crow_indices: int32, where each row of blocks begins in `values`, and at the end their number.
        col_indices: (blocks,) int32, the block column of each block, ascending in each row of blocks.
        shape: (out, in).
        block_shape: (out, in) of one block. It need not divide `shape`.
        lists: derived from the indices when left out. Pass those of a matrix with the same indices to save
            the work, and the checks of their values.

    Raises:
        ValueError: a field of a wrong shape, dtype or device; indices out of range or not sorted.

    Example:
        >>> matrix = BlockSparseMatrix.from_dense(torch.tensor([[0.0, 0.0, 5.0, 6.0]]), (1, 2))
        >>> matrix.col_indices, matrix.density
        (tensor([1], dtype=torch.int32), 0.5)
    """

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    shape: tuple[int, int]
    block_shape: tuple[int, int]
    lists: BlockLists = None  # type: ignore[assignment]  # filled below

    def __post_init__(self) -> None:
        checked = cast(BlockLists | None, self.lists) is not None
        if checked and isinstance(self.shape, tuple) and not any(isinstance(size, int) for size in self.shape):
            return  # torch.export rebuilds a checked matrix around stand-ins for its sizes
        _check_fields(self)
        if cast(BlockLists | None, self.lists) is None:
            _check_indices(self.crow_indices, self.col_indices, self.grid[1])
            lists = BlockLists.from_indices(self.crow_indices, self.col_indices, self.grid[1])
            object.__setattr__(self, "lists", lists)

    @classmethod
    def from_dense(
        cls, weight: Tensor, block_shape: tuple[int, int], mask: Tensor | BitMask | None = None
    ) -> "BlockSparseMatrix":
        """The kept blocks of a dense weight, copied.

        Args:
            weight: (out, in), any float dtype.
            block_shape: (out, in) of one block. A side that it does not divide is padded with zeros.
            mask: weight-shaped bool, True where kept, or a `BitMask`: blocks with any kept weight are kept, and
                pruned weights in them become 0. Without it, every block that is not all zeros is kept.

        Raises:
            ValueError: not a matrix, an unfit mask, or NaN among the kept weights.
            TypeError: the weight is not floating-point, or the mask neither bool nor `BitMask`.
        """
        check_floating("weight", weight)
        check_dims("weight", weight, 2)
        _check_sizes("block_shape", block_shape)
        weight = weight.detach()
        shape, sides = (weight.shape[0], weight.shape[1]), (int(block_shape[0]), int(block_shape[1]))
        if mask is not None:
            check_mask("mask", mask, weight)
            mask = as_bool(mask)
            weight = torch.where(mask, weight, 0)
        if weight.isnan().any():
            raise ValueError("weight must not hold NaN")
        blocks = _split_blocks(weight, sides)
        chosen = blocks != 0 if mask is None else _split_blocks(mask, sides)
        keep = chosen.any(3).any(2)
        crow = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).int()
        return cls(blocks[keep], crow, keep.nonzero()[:, 1].int(), shape, sides)

    @classmethod
    def from_torch_bsr(cls, matrix: Tensor) -> "BlockSparseMatrix":
        """From a two-dimensional tensor of layout `torch.sparse_bsr`, with indices of either width.

        Raises:
            ValueError: another layout, or more dimensions.
        """
        if not isinstance(matrix, Tensor) or matrix.layout != torch.sparse_bsr or matrix.dim() != 2:
            got = f"{matrix.layout} of shape {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix)
            raise ValueError(f"matrix must be a two-dimensional torch.sparse_bsr tensor, got {got}")
        values = matrix.values().detach()
        return cls(
            values,
            matrix.crow_indices().int(),
            matrix.col_indices().int(),
            (matrix.shape[0], matrix.shape[1]),
            (values.shape[1], values.shape[2]),
        )

    def to_torch_bsr(self) -> Tensor:
        """As a tensor of layout `torch.sparse_bsr`, sharing memory.

        Raises:
            ValueError: the blocks do not divide the shape, which that layout cannot express.
        """
        if any(size % side for size, side in zip(self.shape, self.block_shape, strict=True)):
            raise ValueError(f"block_shape {self.block_shape} must divide the shape {self.shape}")
        return torch.sparse_bsr_tensor(
            self.crow_indices, self.col_indices, self.values, self.shape, check_invariants=True
        )

    def to_dense(self) -> Tensor:
        """(out, in), zero where no block is kept; differentiable by `values`."""
        rows, columns = self.grid
        height, width = self.block_shape
        dense = self.values.new_zeros(rows * height, columns * width)
        blocks = dense.view(rows, height, columns, width).transpose(1, 2)
        blocks[self.lists.block_rows.long(), self.col_indices.long()] = self.values
        return dense[: self.shape[0], : self.shape[1]]

    @property
    def grid(self) -> tuple[int, int]:
        """Number of blocks down and across, kept or not."""
        return -(-self.shape[0] // self.block_shape[0]), -(-self.shape[1] // self.block_shape[1])

    @property
    def density(self) -> float:
        """The fraction of blocks kept."""
        return self.values.shape[0] / (self.grid[0] * self.grid[1])

    def equal(self, other: "BlockSparseMatrix") -> bool:
        """Whether both keep the same blocks with the same values, in one dtype and on one device."""
        mine, theirs = (
            (each.shape, each.block_shape, each.values.shape, each.values.dtype, each.values.device)
            for each in (self, other)
        )
        return mine == theirs and all(
            torch.equal(getattr(self, name), getattr(other, name)) for name in ("values", "crow_indices", "col_indices")
        )

    def to(self, *args: Any, **kwargs: Any) -> "BlockSparseMatrix":
        """The matrix on another device or with values of another dtype; arguments as of `torch.Tensor.to`."""
        values = self.values.to(*args, **kwargs)
        if not values.is_floating_point():
            raise ValueError(f"dtype must be a floating-point dtype, got {values.dtype}")
        crow, col = self.crow_indices.to(values.device), self.col_indices.to(values.device)
        return BlockSparseMatrix(values, crow, col, self.shape, self.block_shape, self.lists.to(values.device))


torch.export.register_dataclass(BlockLists, serialized_type_name="sdp_kernels.BlockLists")
torch.export.register_dataclass(BlockSparseMatrix, serialized_type_name="sdp_kernels.BlockSparseMatrix")


def _split_blocks(matrix: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """(out, in) -> (rows, columns, block rows, block columns), padded with zeros."""
    height, width = block_shape
    down, right = -matrix.shape[0] % height, -matrix.shape[1] % width
    if down or right:
        matrix = torch.nn.functional.pad(matrix, (0, right, 0, down))
    rows, columns = matrix.shape[0] // height, matrix.shape[1] // width
    return matrix.reshape(rows, height, columns, width).transpose(1, 2)


def _check_sizes(name: str, sizes: object) -> None:
    whole = isinstance(sizes, tuple | list) and len(sizes) == 2 and all(isinstance(size, int) for size in sizes)
    if not whole or min(sizes) < 1:  # type: ignore[call-overload]
        raise ValueError(f"{name} must be two whole numbers of at least 1, got {sizes!r}")


def _check_fields(matrix: BlockSparseMatrix) -> None:
    """What shows without reading the indices, which would wait for a GPU and break a graph."""
    _check_sizes("shape", matrix.shape)
    _check_sizes("block_shape", matrix.block_shape)
    tensors = {name: getattr(matrix, name) for name in ("values", "crow_indices", "col_indices")}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    values = matrix.values
    if not values.is_floating_point():
        raise ValueError(f"values must be a floating-point tensor, got {values.dtype}")
    if values.dim() != 3 or tuple(values.shape[1:]) != tuple(matrix.block_shape):
        raise ValueError(f"values must have shape (blocks, *{tuple(matrix.block_shape)}), got {tuple(values.shape)}")
    for name, length in (("crow_indices", matrix.grid[0] + 1), ("col_indices", values.shape[0])):
        indices = tensors[name]
        if indices.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {indices.dtype}")
        if tuple(indices.shape) != (length,):
            raise ValueError(f"{name} must have shape {(length,)}, got {tuple(indices.shape)}")
        if indices.device != values.device:
            raise ValueError(f"{name} must be on the device of values, {values.device}, got {indices.device}")


def _check_indices(crow_indices: Tensor, col_indices: Tensor, columns: int) -> None:
    blocks = col_indices.numel()
    first, last = int(crow_indices[0]), int(crow_indices[-1])
    if first != 0:
        raise ValueError(f"crow_indices must begin with 0, got {first}")
    if last != blocks:
        raise ValueError(f"crow_indices must end with the number of blocks, {blocks}, got {last}")
    if (crow_indices.diff() < 0).any():
        raise ValueError("crow_indices must not decrease")
    if blocks == 0:
        return
    low, high = (int(bound) for bound in col_indices.aminmax())
    if low < 0 or high >= columns:
        raise ValueError(f"col_indices must be from 0 to {columns - 1}, got {low if low < 0 else high}")
    rises = col_indices.diff() > 0
    starts = crow_indices[1:-1].long()  # a new row of blocks may begin with any column
    rises[starts[(starts > 0) & (starts < blocks)] - 1] = True
    if not rises.all():
        raise ValueError("col_indices must rise within each row of blocks, without repeating a column")
