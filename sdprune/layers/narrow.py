"""Linear layers without their empty rows and columns: `NarrowLinear`; `RemovedLinear` where all neighbours agree.

In int8 their product is that of blocks of which all are kept, as of every int8 layer.
"""

from collections.abc import Mapping
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdp_kernels import BlockSparseMatrix, block_sparse_linear
from sdprune.formats.form import NARROW, Form
from sdprune.formats.pack import pack, quantize_grid
from sdprune.layers.block_sparse import BlockSparseLinear
from sdprune.layers.dense import pruned_weight
from sdprune.layers.pruned import PrunedLinear
from sdprune.masking.linears import is_conv1d, matrix


class Smaller(PrunedLinear):
    """A matrix without some of its rows and columns."""

    rows: Tensor | None
    columns: Tensor | None

    def _hold(self, weight: Any) -> None:
        """Register the kept rows and columns."""
        self.weight = weight

    def _part(self) -> Tensor:
        """(kept rows, kept columns) of the weight, detached."""
        part: Tensor = self.weight.detach()
        return part

    def _multiply(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """(..., kept columns) -> (..., kept rows)."""
        return functional.linear(input, self.weight, bias)

    def _kept(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows, as a column, and the columns that are kept."""
        sides = zip((self.rows, self.columns), self.shape, strict=True)
        rows, columns = (torch.arange(size) if kept is None else kept.long() for kept, size in sides)
        return rows.to(device)[:, None], columns.to(device)

    def dense_weight(self) -> Tensor:
        """Return the weight (out, in) with its zeros, detached."""
        part = self._part()
        dense = part.new_zeros(self.shape)
        dense[self._kept(dense.device)] = part
        return dense

    def part_of(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor] | None:
        """Return what the state of this layer holds of a dense weight (out, in); None if it has fewer zeros."""
        part = weight[self._kept(weight.device)]
        return {"weight": part} if int(part.count_nonzero()) == int(weight.count_nonzero()) else None


class NarrowLinear(Smaller):
    """A dense linear layer without the rows and columns of its weight that are all zero; the result stays the same.

    Inputs that no weight reads are dropped before the product; outputs that no weight writes are their bias.

    Args:
        weight: (kept out, kept in), without its empty rows and columns.
        bias: (out_features,) of all outputs, or None.
        columns: (kept in,) int64, the inputs that are read; None: all.
        rows: (kept out,) int64, the outputs that are written; None: all.
        in_features: size of an input row.
        out_features: size of an output row.
    """

    def __init__(
        self,
        weight: Any,
        bias: nn.Parameter | None,
        columns: Tensor | None,
        rows: Tensor | None,
        in_features: int,
        out_features: int,
    ) -> None:
        super().__init__()
        self.transposed, self.shape = False, (out_features, in_features)
        self._hold(weight)
        self.bias = bias
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("columns", columns)
        self.register_buffer("rows", rows)

    @classmethod
    def from_linear(cls, linear: nn.Module) -> Self:
        """Drop the rows and columns of a dense layer that are all zero; the bias is shared."""
        weight = pruned_weight(linear)
        tensors = pack(weight, Form(NARROW))
        narrow = nn.Parameter(tensors["weight"].contiguous(), requires_grad=matrix(linear).requires_grad)
        layer = cls.from_parts(narrow, linear.bias, tensors, (weight.shape[0], weight.shape[1]))  # type: ignore[arg-type]
        layer.transposed = is_conv1d(linear)
        return layer.train(linear.training)

    @classmethod
    def from_parts(
        cls, weight: Any, bias: nn.Parameter | None, indices: Mapping[str, Tensor], shape: tuple[int, int]
    ) -> Self:
        """Return a layer around a weight and a bias.

        Args:
            weight: (kept out, kept in).
            bias: (out,) or None.
            indices: "rows" and "columns" that are kept, of any whole type.
            shape: (out, in) of the dense weight.
        """
        rows, columns = (
            indices[name].long() if len(indices[name]) < size else None
            for name, size in zip(("rows", "columns"), shape, strict=True)
        )
        return cls(weight, bias, columns, rows, shape[1], shape[0])

    def quantize(self) -> "NarrowLinear":
        """Return a layer with the same weight in int8, its bias shared, by the rule of `BlockSparseMatrix.quantize`.

        A layer of which nothing is kept is returned as it is.

        Raises:
            ValueError: a value is not finite, or they are int8 already.
        """
        if not self.weight.numel():
            return self
        sizes = self.in_features, self.out_features
        layer = NarrowInt8Linear(quantize_grid(self.weight), self.bias, self.columns, self.rows, *sizes)
        layer.transposed = self.transposed
        return layer.train(self.training)

    def part_of(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor] | None:
        """Return what the state of this layer holds of a dense weight (out, in); None if it has fewer zeros."""
        part = super().part_of(weight, bias)
        if part is None:
            return None
        indices = {"rows": self.rows, "columns": self.columns}
        return part | {name: index for name, index in indices.items() if index is not None}

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to rows in the last dimension of `input`."""
        if self.columns is not None:
            input = input.index_select(-1, self.columns)
        if self.rows is None:
            return self._multiply(input, self.bias)
        written = self._multiply(input, None if self.bias is None else self.bias[self.rows])
        shape = (*input.shape[:-1], self.out_features)
        output = written.new_zeros(shape) if self.bias is None else self.bias.to(written.dtype).expand(shape)
        return output.index_copy(-1, self.rows, written)

    def extra_repr(self) -> str:
        """Describe the layer for `print`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kept={tuple(self._part().shape)}, density={self.density:.4f}"
        )


class Removed(Smaller):
    """A smaller layer that takes and returns rows without what it lost."""

    full_bias: Tensor | None
    rows: Tensor
    columns: Tensor

    def _remember(
        self, weight: Any, bias: nn.Parameter | None, rows: Tensor, columns: Tensor, shape: tuple[int, int]
    ) -> None:
        self.out_features, self.in_features = len(rows), len(columns)
        self._hold(weight)
        self.shape, self.transposed = shape, False
        self.bias = None if bias is None else nn.Parameter(bias.detach()[rows.long()], requires_grad=bias.requires_grad)
        self.register_buffer("full_bias", None if bias is None else bias.detach().clone(), persistent=False)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def dense_bias(self) -> nn.Parameter | None:
        """Return the bias of all outputs, those that are lost as they were."""
        if self.full_bias is None:
            return None
        bias = self.full_bias.clone()
        bias[self._kept(bias.device)[0][:, 0]] = self.bias.detach()
        return nn.Parameter(bias, requires_grad=self.bias.requires_grad)

    def part_of(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor] | None:
        """Return what the state of this layer holds of a dense weight and bias; None if it has fewer zeros."""
        part = super().part_of(weight, bias)
        if part is not None and self.full_bias is not None and bias is not None:
            self.full_bias.copy_(bias)
            part["bias"] = bias[self._kept(bias.device)[0][:, 0]]
        return part


class RemovedLinear(Removed, nn.Linear):
    """An ordinary, smaller `nn.Linear` that remembers which rows or columns it lost, to be saved in full again.

    Args:
        weight: (kept rows, kept columns).
        bias: (out,), also of the lost rows, or None.
        rows: (kept rows,) int32, out of all outputs.
        columns: (kept columns,) int32, out of all inputs.
        shape: (out, in) of the weight before.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, rows: Tensor, columns: Tensor, shape: tuple[int, int]
    ) -> None:
        nn.Linear.__init__(self, 1, 1, bias is not None, device="meta")  # torch warns of layers without in- or outputs
        self._remember(weight, bias, rows, columns, shape)

    def quantize(self) -> Removed:
        """Return a layer with the same weight in int8; see `NarrowLinear.quantize`."""
        if not self.weight.numel():
            return self
        layer = RemovedInt8Linear(quantize_grid(self.weight), self.dense_bias(), self.rows, self.columns, self.shape)
        layer.transposed = self.transposed
        return layer.train(self.training)


class SmallerInt8(Smaller):
    """A matrix without some of its rows and columns, the rest in int8; it does not train.

    Attributes:
        blocks: the kept rows and columns as a layer of blocks, without a bias.
    """

    blocks: BlockSparseLinear

    @property
    def weight(self) -> Tensor:
        """The int8 values, because models ask a linear layer's weight for its dtype and device."""
        return self.blocks.values

    def quantize(self) -> NoReturn:
        """Refuse: it is quantized.

        Raises:
            ValueError: always.
        """
        raise ValueError("weight must be floating-point to be quantized, got torch.int8")

    def dequantize(self) -> NarrowLinear | RemovedLinear:
        """Return the same layer with a float32 weight, which trains; the bias is shared."""
        raise NotImplementedError

    @property
    def density(self) -> float:
        """The fraction of the weight that is kept."""
        rows, columns = self.blocks.shape
        return rows * columns / (self.shape[0] * self.shape[1])

    def part_of(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor] | None:
        """Return what the state of this layer holds of a dense weight (out, in); None if it has fewer zeros."""
        part = super().part_of(weight, bias)
        if part is None:
            return None
        blocks = BlockSparseLinear.from_matrix(quantize_grid(part.pop("weight")), None)
        return part | {f"blocks.{name}": value for name, value in blocks.state_dict().items()}

    def _hold(self, weight: BlockSparseMatrix) -> None:
        self.blocks = BlockSparseLinear.from_matrix(weight, None)

    def _part(self) -> Tensor:
        return self.blocks.dense_weight()

    def _multiply(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return block_sparse_linear(input, self.blocks.matrix, bias)


class NarrowInt8Linear(SmallerInt8, NarrowLinear):
    """A `NarrowLinear` in int8, made by its `quantize`.

    Args:
        weight: int8 matrix (kept out, kept in).
        bias: (out_features,) of all outputs, or None.
        columns: (kept in,) int64, the inputs that are read; None: all.
        rows: (kept out,) int64, the outputs that are written; None: all.
        in_features: size of an input row.
        out_features: size of an output row.
    """

    def dequantize(self) -> NarrowLinear:
        """Return the same layer with a float32 weight, which trains; the bias is shared."""
        weight, sizes = nn.Parameter(self._part()), (self.in_features, self.out_features)
        layer = NarrowLinear(weight, self.bias, self.columns, self.rows, *sizes)
        layer.transposed = self.transposed
        return layer.train(self.training)


class RemovedInt8Linear(SmallerInt8, Removed):
    """A `RemovedLinear` in int8, made by its `quantize`: it takes and returns rows without what was removed.

    Args:
        weight: int8 matrix (kept rows, kept columns).
        bias: (out,), also of the lost rows, or None.
        rows: (kept rows,) int32, out of all outputs.
        columns: (kept columns,) int32, out of all inputs.
        shape: (out, in) of the weight before.
    """

    def __init__(
        self,
        weight: BlockSparseMatrix,
        bias: nn.Parameter | None,
        rows: Tensor,
        columns: Tensor,
        shape: tuple[int, int],
    ) -> None:
        super().__init__()
        self._remember(weight, bias, rows, columns, shape)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to rows in the last dimension of `input`."""
        return self._multiply(input, self.bias)

    def dequantize(self) -> RemovedLinear:
        """Return the same layer with a float32 weight, which trains; the bias is shared."""
        layer = RemovedLinear(nn.Parameter(self._part()), self.dense_bias(), self.rows, self.columns, self.shape)
        layer.transposed = self.transposed
        return layer.train(self.training)
