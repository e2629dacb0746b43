"""Linear layers that do no work for what was pruned: `BlockSparseLinear` and `NarrowLinear`."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdp_kernels import BitMask, BlockSparseMatrix, block_sparse_linear
from sdp_kernels.block_sparse_linear.matrix import BlockLists
from sdprune.masking.layers import MaskedLinear
from sdprune.masking.linears import is_conv1d, matrix

_LISTS = tuple(field.name for field in fields(BlockLists))
_STORED = ("values", "crow_indices", "col_indices")


class BlockSparseLinear(nn.Module):
    """A linear layer that stores and multiplies only the kept blocks of its weight: `input @ weight.T + bias`.

    The result is that of the dense layer with zeros, up to rounding; it trains as well: gradients go to the input, the
    kept values and the bias. To step through plain PyTorch when something looks wrong, call the model inside
    `with sdp_kernels.use_backend("reference"):`; nothing has to be converted back for it.

    Where so many blocks are kept that a dense product of the same tokens is estimated to be faster, a call makes the
    dense weight, multiplies with it and throws it away (sdp_kernels/block_sparse_linear/break_even.py).

    The state dict holds three plain tensors and the bias. A layer that is built from its sizes loads it with
    `strict=True`; indices that do not fit are refused before anything is copied.

    Args:
        in_features: size of an input row.
        out_features: size of an output row.
        block_shape: (out, in) of one block; it need not divide the sizes.
        blocks: how many are kept. A new layer keeps the first ones of its grid, with all values 0.
        bias: whether there is an additive bias.
        device: where the tensors live.
        dtype: float type of values and bias.

    Attributes:
        values: (blocks, out, in of a block), the kept blocks, row of blocks by row of blocks.
        crow_indices: int32, where each row of blocks begins in `values`, and at the end their number.
        col_indices: (blocks,) int32, the block column of each block.
        bias: (out_features,) or None.
        transposed: whether it stands for a layer that stores its weight as (in, out), as the `Conv1D` of transformers.

    Raises:
        ValueError: more blocks than the weight has, or a block shape that is not two whole numbers above 0.
    """

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_shape: tuple[int, int],
        blocks: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.transposed = False
        self.in_features, self.out_features = in_features, out_features
        self.block_shape = _checked_shape(block_shape)
        rows, columns = -(-out_features // self.block_shape[0]), -(-in_features // self.block_shape[1])
        if not 0 <= blocks <= rows * columns:
            raise ValueError(f"blocks must be from 0 to {rows * columns}, the blocks of the weight, got {blocks}")
        values = torch.zeros(blocks, *self.block_shape, device=device, dtype=dtype)
        self.values = nn.Parameter(values)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        # On the CPU even where the default device is "meta": what is derived from the indices must be real.
        crow = (torch.arange(rows + 1, dtype=torch.int32, device="cpu") * columns).clamp_max(blocks)
        col = torch.arange(blocks, dtype=torch.int32, device="cpu") % columns
        self.register_buffer("crow_indices", crow.to(values.device))
        self.register_buffer("col_indices", col.to(values.device))
        self._set_lists(BlockLists.from_indices(crow, col, columns).to(values.device))

    @classmethod
    def from_linear(cls, linear: nn.Module, block_shape: tuple[int, int], mask: Tensor | BitMask | None = None) -> Self:
        """Pack the kept blocks of a dense layer; the bias is shared, the blocks are copied.

        Args:
            linear: an `nn.Linear`, or the `Conv1D` of transformers; a `MaskedLinear` brings its own mask.
            block_shape: (out, in) of one block.
            mask: weight-shaped bool, True where kept, or a `BitMask`: blocks with a kept weight are kept, pruned
                weights in them become 0. None: every block that is not all zeros is kept.

        Raises:
            ValueError: a mask or block shape that does not fit, or NaN among the kept weights.
        """
        if mask is None and isinstance(linear, MaskedLinear):
            mask = linear.bit_mask
        packed = BlockSparseMatrix.from_dense(pruned_weight(linear), _checked_shape(block_shape), mask)
        out_features, in_features = packed.shape
        layer = cls(in_features, out_features, packed.block_shape, packed.values.shape[0], False, device="meta")
        layer.values = nn.Parameter(packed.values, requires_grad=matrix(linear).requires_grad)
        layer.crow_indices, layer.col_indices = packed.crow_indices, packed.col_indices
        layer.bias = linear.bias  # type: ignore[assignment]
        layer._set_lists(packed.lists)
        layer.transposed = is_conv1d(linear)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """Return an `nn.Linear` with the zeros filled in again; the bias is shared."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.matrix.to_dense().detach().contiguous()
        linear.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        linear.bias = self.bias  # type: ignore[assignment]  # None where there is none, as nn.Linear has it
        return linear.train(self.training)

    @property
    def weight(self) -> Tensor:
        """The kept blocks under another name, because models ask a linear layer's weight for its dtype and device."""
        return self.values

    @property
    def matrix(self) -> BlockSparseMatrix:
        """The weight, around the tensors of this layer."""
        lists = BlockLists(
            *(getattr(self, f"_{name}") for name in _LISTS)
        )  # prepared, so that nothing is checked again
        shape = (self.out_features, self.in_features)
        return BlockSparseMatrix(self.values, self.crow_indices, self.col_indices, shape, self.block_shape, lists)

    @property
    def density(self) -> float:
        """The fraction of blocks kept."""
        return self.matrix.density

    def prepare(self) -> None:
        """Check the indices and derive from them what the product walks along.

        Only for loaders that replace the buffers without `load_state_dict`, which does this itself.

        Raises:
            ValueError: indices that are out of range or not sorted.
        """
        shape = (self.out_features, self.in_features)
        checked = BlockSparseMatrix(self.values, self.crow_indices, self.col_indices, shape, self.block_shape)
        self._set_lists(checked.lists)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to rows in the last dimension of `input`."""
        return block_sparse_linear(input, self.matrix, self.bias)

    def extra_repr(self) -> str:
        """Describe the layer for `print`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_shape={self.block_shape}, density={self.density:.4f}"
        )

    def _set_lists(self, lists: BlockLists) -> None:
        for name in _LISTS:  # they follow the module to its device, but are not saved
            self.register_buffer(f"_{name}", getattr(lists, name), persistent=False)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check first: half-loaded indices would let a product read outside of its tensors."""
        found = {name: state_dict.get(prefix + name, getattr(self, name)) for name in _STORED}
        lists = None
        for name, tensor in found.items():
            if tensor.shape != getattr(self, name).shape:
                ours = tuple(getattr(self, name).shape)
                error_msgs.append(f"size mismatch for {prefix}{name}: {tuple(tensor.shape)}, this layer has {ours}")
                return
        if not any(tensor.is_meta for tensor in found.values()):
            device = found["values"].device
            values, crow, col = (tensor.to(device) for tensor in found.values())
            try:
                shape = (self.out_features, self.in_features)
                lists = BlockSparseMatrix(values, crow, col, shape, self.block_shape).lists
            except ValueError as error:
                error_msgs.append(f"{prefix.removesuffix('.') or 'the layer'}: {error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if lists is not None and not self.values.is_meta:
            self._set_lists(lists.to(self.values.device))


class NarrowLinear(nn.Module):
    """A dense linear layer without the rows and columns of its weight that are all zero; the result stays the same.

    Inputs that no weight reads are dropped before the product; outputs that no weight writes are their bias.

    Args:
        weight: (kept out, kept in), without its empty rows and columns.
        bias: (out_features,) of all outputs, or None.
        columns: (kept in,) int64, the inputs that are read; None: all.
        rows: (kept out,) int64, the outputs that are written; None: all.
        in_features: size of an input row.
        out_features: size of an output row.

    Attributes:
        transposed: whether it stands for a layer that stores its weight as (in, out), as the `Conv1D` of transformers.
    """

    columns: Tensor | None
    rows: Tensor | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        columns: Tensor | None,
        rows: Tensor | None,
        in_features: int,
        out_features: int,
    ) -> None:
        super().__init__()
        self.transposed = False
        self.weight, self.bias = weight, bias
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("columns", columns)
        self.register_buffer("rows", rows)

    @classmethod
    def from_linear(cls, linear: nn.Module) -> Self:
        """Drop the rows and columns of a dense layer that are all zero; the bias is shared."""
        weight = pruned_weight(linear)
        out_features, in_features = weight.shape
        kept = weight != 0
        columns, rows = kept.any(0).nonzero()[:, 0], kept.any(1).nonzero()[:, 0]
        narrow = nn.Parameter(weight[rows][:, columns].contiguous(), requires_grad=matrix(linear).requires_grad)
        layer = cls(
            narrow,
            linear.bias,  # type: ignore[arg-type]
            columns if columns.numel() < in_features else None,
            rows if rows.numel() < out_features else None,
            in_features,
            out_features,
        )
        layer.transposed = is_conv1d(linear)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """Return an `nn.Linear` with the empty rows and columns filled in again; the bias is shared."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.weight.detach()
        if self.columns is not None:
            weight = weight.new_zeros(weight.shape[0], self.in_features).index_copy_(1, self.columns, weight)
        if self.rows is not None:
            weight = weight.new_zeros(self.out_features, self.in_features).index_copy_(0, self.rows, weight)
        linear.weight = nn.Parameter(weight.clone(), requires_grad=self.weight.requires_grad)
        linear.bias = self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    @property
    def density(self) -> float:
        """The fraction of the weight that is left."""
        return self.weight.numel() / (self.in_features * self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to rows in the last dimension of `input`."""
        if self.columns is not None:
            input = input.index_select(-1, self.columns)
        if self.rows is None:
            return functional.linear(input, self.weight, self.bias)
        written = functional.linear(input, self.weight, None if self.bias is None else self.bias[self.rows])
        shape = (*input.shape[:-1], self.out_features)
        output = written.new_zeros(shape) if self.bias is None else self.bias.to(written.dtype).expand(shape)
        return output.index_copy(-1, self.rows, written)

    def extra_repr(self) -> str:
        """Describe the layer for `print`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kept={tuple(self.weight.shape)}, density={self.density:.4f}"
        )


def pruned_weight(linear: nn.Module) -> Tensor:
    """Return the weight (out, in) with its zeros, also of a masked layer that keeps the values under them; detached.

    Gates that multiply the weights (`MaskedLinear.settle`) are part of it; the layer stays as it is.
    """
    dense = copy.deepcopy(linear).to_dense() if isinstance(linear, MaskedLinear) else linear
    return matrix(dense).detach()


def _checked_shape(block_shape: Any) -> tuple[int, int]:
    sides = tuple(block_shape) if isinstance(block_shape, tuple | list) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"block_shape must be two whole numbers of at least 1, got {block_shape!r}")
    return sides
