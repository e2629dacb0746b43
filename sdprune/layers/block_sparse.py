"""`BlockSparseLinear`: a linear layer that stores and multiplies only the kept blocks of its weight."""

import operator
from dataclasses import fields
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from sdp_kernels import BitMask, BlockSparseMatrix, block_sparse_linear
from sdp_kernels.block_sparse_linear.matrix import BlockLists
from sdprune.formats.form import Form
from sdprune.layers.dense import pruned_weight
from sdprune.layers.pruned import PrunedLinear
from sdprune.masking.layers import MaskedLinear
from sdprune.masking.linears import is_conv1d, matrix

_LISTS = tuple(field.name for field in fields(BlockLists))
_STORED = ("values", "crow_indices", "col_indices", "scales")
_MATRIX_BUFFERS = (*_STORED[1:], *(f"_{name}" for name in _LISTS))


class BlockSparseLinear(PrunedLinear):
    """A linear layer that stores and multiplies only the kept blocks of its weight: `input @ weight.T + bias`.

    The result is that of the dense layer with zeros, up to rounding; it trains as well: gradients go to the input, the
    kept values and the bias. To step through plain PyTorch when something looks wrong, call the model inside
    `with sdp_kernels.use_backend("reference"):`; nothing has to be converted back for it.

    `pack` lays the values out as products on a CPU read them; nothing is copied then before a product, and nothing is
    kept beside the values that could go stale when they change.

    Where so many blocks are kept that a dense product of the same tokens is estimated to be faster, a call makes the
    dense weight, multiplies with it and throws it away (sdp_kernels/block_sparse_linear/break_even.py).

    `quantize` returns the same layer with int8 values, whose products are those of integers; it does not train, but
    gradients pass through it to its input and its bias.

    A layer may apply the activation behind it as well, in the same pass over the result: set `activation`, as
    `sdprune.speed_up` does. It then stands for more than a dense layer, which nothing can make of it.

    The state dict holds three plain tensors, the scales of int8 values, and the bias. A layer that is built from its
    sizes loads it with `strict=True`; indices that do not fit are refused before anything is copied.

    Args:
        in_features: size of an input row.
        out_features: size of an output row.
        block_shape: (out, in) of one block; it need not divide the sizes.
        blocks: how many are kept. A new layer keeps the first ones of its grid, with all values 0.
        bias: whether there is an additive bias.
        device: where the tensors live.
        dtype: float type of values and bias.
        quantized: whether the values are int8, with scales of 1 to begin with.

    Attributes:
        values: (blocks, out, in of a block), the kept blocks, row of blocks by row of blocks.
        crow_indices: int32, where each row of blocks begins in `values`, and at the end their number.
        col_indices: (blocks,) int32, the block column of each block.
        scales: (out_features,) float32 in every dtype of the model, of int8 values; otherwise None.
        bias: (out_features,) or None.
        activation: of `block_sparse_linear`: None, "relu", "gelu", "gelu_tanh" or "silu".

    Raises:
        ValueError: more blocks than the weight has, or a block shape that is not two whole numbers above 0.
    """

    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    scales: Tensor | None
    units = "blocks"

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
        quantized: bool = False,
    ) -> None:
        super().__init__()
        self.transposed, self.shape = False, (out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.activation: Literal["relu", "gelu", "gelu_tanh", "silu"] | None = None
        self.block_shape: tuple[int, int] = _checked_shape(block_shape)
        rows, columns = -(-out_features // self.block_shape[0]), -(-in_features // self.block_shape[1])
        if not 0 <= blocks <= rows * columns:
            raise ValueError(f"blocks must be from 0 to {rows * columns}, the blocks of the weight, got {blocks}")
        values = torch.zeros(blocks, *self.block_shape, device=device, dtype=torch.int8 if quantized else dtype)
        self.values = nn.Parameter(values, requires_grad=not quantized)
        scales = torch.ones(out_features, device=device, dtype=torch.float32) if quantized else None
        self.register_buffer("scales", scales)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        # On the CPU even where the default device is "meta": what is derived from the indices must be real.
        crow = (torch.arange(rows + 1, dtype=torch.int32, device="cpu") * columns).clamp_max(blocks)
        col = torch.arange(blocks, dtype=torch.int32, device="cpu") % columns
        self.register_buffer("crow_indices", crow.to(values.device))
        self.register_buffer("col_indices", col.to(values.device))
        lists = BlockLists.none(values.device) if quantized else BlockLists.from_indices(crow, col, columns)
        self._set_lists(lists.to(values.device))

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
        layer = cls.from_matrix(packed, linear.bias, requires_grad=matrix(linear).requires_grad)  # type: ignore[arg-type]
        layer.transposed = is_conv1d(linear)
        return layer.train(linear.training)

    @classmethod
    def from_matrix(cls, matrix: BlockSparseMatrix, bias: nn.Parameter | None, *, requires_grad: bool = True) -> Self:
        """Return a layer around the tensors of a matrix and a bias, (out_features,) or None."""
        out_features, in_features = matrix.shape
        layer = cls(
            in_features,
            out_features,
            matrix.block_shape,
            len(matrix.values),
            False,
            device="meta",
            quantized=matrix.scales is not None,
        )
        trains = requires_grad and matrix.scales is None
        layer.values, layer.bias = nn.Parameter(matrix.values, requires_grad=trains), bias
        layer.crow_indices, layer.col_indices, layer.scales = matrix.crow_indices, matrix.col_indices, matrix.scales
        layer._set_lists(matrix.lists)
        return layer

    def quantize(self) -> Self:
        """Return a layer with the same weight in int8, its bias shared; see `BlockSparseMatrix.quantize`.

        Raises:
            ValueError: values that are not finite, or are int8 already.
        """
        layer = type(self).from_matrix(self.matrix.quantize(), self.bias)
        layer.transposed, layer.activation = self.transposed, self.activation
        return layer.train(self.training)

    def pack(self) -> Self:
        """Lay the weight out for products on a CPU, in place, for inference; the result stays the same.

        float32 values keep their shape and become strided, bfloat16 and int8 blocks are split to a width of 2 and 4
        where they are wider (`sdp_kernels.BlockSparseMatrix.packed`).
        """
        matrix = self.matrix.packed()
        if matrix.block_shape == self.block_shape:
            self.values.data = matrix.values.detach()
            return self
        self.values = nn.Parameter(matrix.values.detach(), requires_grad=self.values.requires_grad)
        self.crow_indices, self.col_indices, self.block_shape = (
            matrix.crow_indices,
            matrix.col_indices,
            matrix.block_shape,
        )
        self._set_lists(matrix.lists)
        return self

    def dense_weight(self) -> Tensor:
        """Return the weight (out, in) with its zeros, detached; float32 of int8 values."""
        return self.matrix.to_dense().detach().contiguous()

    def part_of(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor] | None:
        """Return what the state of this layer holds of a dense weight (out, in); None if it has fewer empty blocks."""
        kept = torch.ones_like(self.values, dtype=torch.float32)
        indices = self.crow_indices, self.col_indices
        mask = BlockSparseMatrix(kept, *indices, self.shape, self.block_shape).to_dense().to(weight.device) != 0
        if bool(weight[~mask].any()):
            return None
        matrix = BlockSparseMatrix.from_dense(weight, self.block_shape, mask)
        if self.scales is not None:
            matrix = matrix.quantize()
        return {name: getattr(matrix, name) for name in self._stored}

    @property
    def _stored(self) -> tuple[str, ...]:
        """Names of the stored tensors: without scales where there are none."""
        return _STORED if self.scales is not None else _STORED[:3]

    @property
    def weight(self) -> Tensor:
        """The kept blocks under another name, because models ask a linear layer's weight for its dtype and device."""
        return self.values

    @property
    def matrix(self) -> BlockSparseMatrix:
        """The weight, around the tensors of this layer: the same object as long as they are the same ones."""
        tensors = self._parameters["values"], *map(self._buffers.get, _MATRIX_BUFFERS)
        known: tuple[Any, BlockSparseMatrix] | None = vars(self).get("_known")
        if known is not None and all(map(operator.is_, known[0], tensors)) and known[1].block_shape == self.block_shape:
            return known[1]
        values, crow, col, scales, *lists = tensors
        prepared = BlockLists(*lists)  # type: ignore[arg-type]  # so that nothing is checked again
        matrix = BlockSparseMatrix(values, crow, col, self.shape, self.block_shape, prepared, scales)  # type: ignore[arg-type]
        if not torch.compiler.is_compiling():
            vars(self)["_known"] = tensors, matrix
        return matrix

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
        indices = self.crow_indices, self.col_indices
        checked = BlockSparseMatrix(self.values, *indices, self.shape, self.block_shape, scales=self.scales)
        self._set_lists(checked.lists)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to rows in the last dimension of `input`."""
        return block_sparse_linear(input, self.matrix, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        """Describe the layer for `print`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_shape={self.block_shape}, density={self.density:.4f}"
            f"{'' if self.scales is None else ', int8'}"
            f"{'' if self.activation is None else f', activation={self.activation}'}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Keep the scales in float32: other dtypes would round every weight of a row by the same error.

        Values that are packed for a CPU are contiguous again where they come to another device.
        """
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scales is not None and self.scales is not None and self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        if self.values.device.type != "cpu" and not self.values.is_contiguous():
            self.values.data = self.values.data.contiguous()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy in memory or in a file takes along: not the matrix, which it makes of its own tensors."""
        return {name: value for name, value in vars(self).items() if name != "_known"}

    def _set_lists(self, lists: BlockLists) -> None:
        for name in _LISTS:  # they follow the module to its device, but are not saved
            self.register_buffer(f"_{name}", getattr(lists, name), persistent=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Check first: half-loaded indices would let a product read outside of its tensors."""
        error_msgs: list[str] = args[-1]
        found = {name: state_dict.get(prefix + name, getattr(self, name)) for name in self._stored}
        lists = None
        for name, tensor in found.items():
            if tensor.shape != getattr(self, name).shape:
                ours = tuple(getattr(self, name).shape)
                error_msgs.append(f"size mismatch for {prefix}{name}: {tuple(tensor.shape)}, this layer has {ours}")
                return
        if not any(tensor.is_meta for tensor in found.values()):
            device = found["values"].device
            values, crow, col, *scales = (tensor.to(device) for tensor in found.values())
            try:
                lists = BlockSparseMatrix(
                    values, crow, col, self.shape, self.block_shape, scales=scales[0] if scales else None
                ).lists
            except ValueError as error:
                error_msgs.append(f"{prefix.removesuffix('.') or 'the layer'}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if lists is not None and not self.values.is_meta:
            self._set_lists(lists.to(self.values.device))


def _checked_shape(block_shape: Any) -> tuple[int, int]:
    checked = Form.blocks(block_shape).block_shape
    assert checked is not None
    return checked
