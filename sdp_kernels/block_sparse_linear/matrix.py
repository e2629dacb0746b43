"""BlockSparseMatrix: a weight of which only some blocks are kept."""

from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from sdp_kernels.checks import check_dims, check_floating
from sdp_kernels.masks import BitMask, as_bool, check_mask

WHOLE_HEIGHT = 16  # a multiple of the lanes of every CPU
MOST_INPUTS = (2**31 - 1) // (255 * 128)  # so that a sum of int8 products fits 32 bits


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

    @classmethod
    def none(cls, device: torch.device) -> "BlockLists":
        """No lists: of an int8 matrix, whose products walk along its rows only."""
        return cls(*(torch.empty(0, dtype=torch.int32, device=device) for _ in fields(cls)))

    def to(self, device: torch.device) -> "BlockLists":
        """The lists on another device."""
        return BlockLists(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True, eq=False)
class BlockSparseMatrix:
    """A matrix stored as its kept blocks, block row by block row, as torch's BSR layout does; compare with `equal`.

    Every field is checked when a matrix is built, so that no product reads outside of its tensors. The class
    holds no state of its own: a module keeps the tensors (`values` as a parameter) and builds the matrix
    around them. `dataclasses.replace(matrix, values=...)` keeps the checked indices.

    `quantize` returns the same matrix with int8 values and a scale for each output row: weight = values * scales.

    Attributes:
        values: (blocks, block rows, block columns), any float dtype, or int8. Entries of the last blocks that lie
            outside of `shape` are not part of the matrix; they must be finite.
        crow_indices: int32, where each row of blocks begins in `values`, and at the end their number.
        col_indices: (blocks,) int32, the block column of each block, ascending in each row of blocks.
        shape: (out, in).
        block_shape: (out, in) of one block. It need not divide `shape`.
        lists: derived from the indices when left out. Pass those of a matrix with the same indices to save
            the work, and the checks of their values.
        scales: (out,) float32 above 0, with int8 values and only with them; otherwise None.

    Raises:
        ValueError: a field of a wrong shape, dtype or device; indices out of range or not sorted; scales that are not
            finite and above 0.

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
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        checked = cast(BlockLists | None, self.lists) is not None
        if checked and isinstance(self.shape, tuple) and not any(isinstance(size, int) for size in self.shape):
            return  # torch.export rebuilds a checked matrix around stand-ins for its sizes
        _check_fields(self)
        if cast(BlockLists | None, self.lists) is None:
            _check_indices(self.crow_indices, self.col_indices, self.grid[1])
            if self.scales is None:
                lists = BlockLists.from_indices(self.crow_indices, self.col_indices, self.grid[1])
            else:
                _check_scales(self.scales)
                lists = BlockLists.none(self.values.device)
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

    def quantize(self) -> "BlockSparseMatrix":
        """The matrix in int8, symmetric for each output row: scale = largest magnitude of the row / 127.

        values = round(values / scale), halves to even, from -127 to 127. The scale of a row without a weight other
        than 0 is 1.

        Raises:
            ValueError: it is quantized already, a value is not finite, or there are more than `MOST_INPUTS` columns.
        """
        if self.scales is not None:
            raise ValueError("values must be floating-point to be quantized, got torch.int8")
        if self.shape[1] > MOST_INPUTS:
            raise ValueError(f"shape must have at most {MOST_INPUTS} columns to be quantized, got {self.shape}")
        values = self.values.detach().float()
        finite = values.isfinite()
        if not finite.all():
            block, row = (int(place) for place in (~finite).any(2).nonzero()[0])
            row += int(self.block_rows[block]) * self.block_shape[0]
            count = int((~finite).sum())
            raise ValueError(f"values must be finite to be quantized, got {count} that are not, the first in row {row}")
        largest = values.new_zeros(self.grid[0], self.block_shape[0])
        for row, (start, end) in enumerate(pairwise(self.crow_indices.tolist())):
            if start < end:
                largest[row] = values[start:end].abs().amax((0, 2))
        scales = torch.where(largest > 0, (largest / 127).clamp_min(torch.finfo(torch.float32).tiny), 1.0)
        quantized = (values / scales[self.block_rows][:, :, None]).round_().char().contiguous()
        scales = scales.flatten()[: self.shape[0]].contiguous()
        return replace(self, values=quantized, scales=scales, lists=BlockLists.none(quantized.device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> "BlockSparseMatrix":
        """The matrix with float values again: values * scales; as it is where it has no scales."""
        if self.scales is None:
            return self
        lists = BlockLists.from_indices(self.crow_indices, self.col_indices, self.grid[1])
        values = self.values.float() * self._block_scales()
        return replace(self, values=values.to(dtype), scales=None, lists=lists)

    def split(self, width: int) -> "BlockSparseMatrix":
        """The same matrix in blocks of this width, which divides that of its blocks.

        Raises:
            ValueError: it does not.
        """
        height, old = self.block_shape
        if width < 1 or old % width:
            raise ValueError(f"width must divide that of the blocks, {old}, got {width}")
        parts = old // width
        values = self.values.view(-1, height, parts, width).transpose(1, 2).reshape(-1, height, width)
        columns = self.col_indices[:, None] * parts + torch.arange(parts, dtype=torch.int32, device=values.device)
        inside = columns.flatten() < -(-self.shape[1] // width)  # blocks at the edge may stick out by whole parts
        rows = self.block_rows.repeat_interleave(parts)[inside]
        crow = torch.nn.functional.pad(torch.bincount(rows, minlength=self.grid[0]).cumsum(0), (1, 0)).int()
        columns = columns.flatten()[inside]
        return BlockSparseMatrix(
            values[inside].contiguous(), crow, columns, self.shape, (height, width), scales=self.scales
        )

    def packed(self) -> "BlockSparseMatrix":
        """The same matrix as the compiled CPU engine reads it, so that its products copy nothing before they begin.

        float32 blocks whose height is a multiple of 16 lie in memory with their output side innermost, the shape of
        `values` unchanged; bfloat16 blocks are split to a width of 2 and int8 ones to 4, where theirs is a multiple of
        that. Other blocks, and those on other devices, are as they were.
        """
        dtype, (height, width) = self.values.dtype, self.block_shape
        if self.values.device.type != "cpu":
            return self
        if dtype == torch.float32:
            innermost = self.values.transpose(1, 2).contiguous().transpose(1, 2)
            return replace(self, values=innermost) if height % WHOLE_HEIGHT == 0 else self
        whole = {torch.bfloat16: 2, torch.int8: 4}.get(dtype, width)
        if width != whole and width % whole == 0:
            return self.split(whole)
        return self if self.values.is_contiguous() else replace(self, values=self.values.contiguous())

    def to_torch_bsr(self) -> Tensor:
        """As a tensor of layout `torch.sparse_bsr`, sharing memory.

        Raises:
            ValueError: the blocks do not divide the shape, which that layout cannot express, or it is quantized.
        """
        if self.scales is not None:
            raise ValueError("values must be floating-point for torch.sparse_bsr, got torch.int8; dequantize() them")
        if any(size % side for size, side in zip(self.shape, self.block_shape, strict=True)):
            raise ValueError(f"block_shape {self.block_shape} must divide the shape {self.shape}")
        return torch.sparse_bsr_tensor(
            self.crow_indices, self.col_indices, self.values, self.shape, check_invariants=True
        )

    def to_dense(self) -> Tensor:
        """(out, in), zero where no block is kept; differentiable by `values`; float32 of int8 values."""
        return join_blocks(self, self.values if self.scales is None else self.values.float() * self._block_scales())

    def _block_scales(self) -> Tensor:
        """(blocks, block rows, 1), the scale of each row of each block; 1 past the last row."""
        assert self.scales is not None
        padded = torch.nn.functional.pad(self.scales, (0, -self.shape[0] % self.block_shape[0]), value=1.0)
        return padded.view(self.grid[0], -1)[self.block_rows][:, :, None]

    @property
    def block_rows(self) -> Tensor:
        """(blocks,) block row of each block."""
        if self.scales is None:
            return self.lists.block_rows
        return torch.repeat_interleave(self.crow_indices.diff(), output_size=len(self.values)).int()

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
        names = ("values", "crow_indices", "col_indices", *(("scales",) if self.scales is not None else ()))
        return mine == theirs and all(torch.equal(getattr(self, name), getattr(other, name)) for name in names)

    def to(self, *args: Any, **kwargs: Any) -> "BlockSparseMatrix":
        """The matrix on another device or with values of another dtype; arguments as of `torch.Tensor.to`.

        Raises:
            ValueError: the dtype is not floating-point, or the matrix is quantized and would not be int8.
        """
        values = self.values.to(*args, **kwargs)
        if self.scales is None and not values.is_floating_point():
            raise ValueError(f"dtype must be a floating-point dtype, got {values.dtype}")
        if self.scales is not None and values.dtype != torch.int8:
            raise ValueError(f"dtype must be torch.int8 of a quantized matrix, got {values.dtype}; dequantize() it")
        device = values.device
        moved = {name: getattr(self, name).to(device) for name in ("crow_indices", "col_indices", "lists")}
        return replace(self, values=values, scales=None if self.scales is None else self.scales.to(device), **moved)


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


def join_blocks(matrix: BlockSparseMatrix, values: Tensor) -> Tensor:
    """(out, in) with these values in the places of the blocks, zero elsewhere."""
    rows, columns = matrix.grid
    height, width = matrix.block_shape
    dense = values.new_zeros(rows * height, columns * width)
    blocks = dense.view(rows, height, columns, width).transpose(1, 2)
    blocks[matrix.block_rows.long(), matrix.col_indices.long()] = values
    return dense[: matrix.shape[0], : matrix.shape[1]]


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
    if matrix.scales is not None:
        _check_quantized(matrix)
    elif not values.is_floating_point():
        raise ValueError(f"values must be a floating-point tensor, got {values.dtype}; int8 needs scales")
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


def _check_quantized(matrix: BlockSparseMatrix) -> None:
    """What shows of int8 values and their scales without reading them."""
    values, scales = matrix.values, matrix.scales
    if values.dtype != torch.int8:
        raise ValueError(f"values must be int8 where there are scales, got {values.dtype}")
    if not isinstance(scales, Tensor) or scales.dtype != torch.float32:
        raise ValueError(f"scales must be a float32 tensor, got {getattr(scales, 'dtype', type(scales).__name__)}")
    if tuple(scales.shape) != (matrix.shape[0],):
        raise ValueError(f"scales must have shape {(matrix.shape[0],)}, got {tuple(scales.shape)}")
    if scales.device != values.device:
        raise ValueError(f"scales must be on the device of values, {values.device}, got {scales.device}")
    if matrix.shape[1] > MOST_INPUTS:
        raise ValueError(f"shape must have at most {MOST_INPUTS} columns with int8 values, got {matrix.shape}")


def _check_scales(scales: Tensor) -> None:
    wrong = ~((scales > 0) & scales.isfinite())
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"scales must be finite and above 0, got {float(scales[row])} for row {row}")


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
