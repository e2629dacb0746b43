"""Linear layers without their empty rows and columns: `NarrowLinear`; `RemovedLinear` where all neighbours agree."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdprune.formats.form import NARROW, Form
from sdprune.formats.pack import pack
from sdprune.layers.dense import pruned_weight
from sdprune.layers.pruned import PrunedLinear
from sdprune.masking.linears import is_conv1d, matrix


class _Smaller(PrunedLinear):
    """A matrix without some of its rows and columns."""

    rows: Tensor | None
    columns: Tensor | None

    def _kept(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows, as a column, and the columns that are kept."""
        sides = zip((self.rows, self.columns), self.shape, strict=True)
        rows, columns = (torch.arange(size) if kept is None else kept.long() for kept, size in sides)
        return rows.to(device)[:, None], columns.to(device)

    def dense_weight(self) -> Tensor:
        """Return the weight (out, in) with its zeros, detached."""
        dense: Tensor = self.weight.new_zeros(self.shape)
        dense[self._kept(dense.device)] = self.weight.detach()
        return dense

    def part_of(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor] | None:
        """Return what the state of this layer holds of a dense weight (out, in); None if it has fewer zeros."""
        part = weight[self._kept(weight.device)]
        return {"weight": part} if int(part.count_nonzero()) == int(weight.count_nonzero()) else None


class NarrowLinear(_Smaller):
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
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        columns: Tensor | None,
        rows: Tensor | None,
        in_features: int,
        out_features: int,
    ) -> None:
        super().__init__()
        self.transposed, self.shape = False, (out_features, in_features)
        self.weight, self.bias = weight, bias
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
        cls, weight: nn.Parameter, bias: nn.Parameter | None, indices: Mapping[str, Tensor], shape: tuple[int, int]
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


class RemovedLinear(_Smaller, nn.Linear):
    """An ordinary, smaller `nn.Linear` that remembers which rows or columns it lost, to be saved in full again.

    Args:
        weight: (kept rows, kept columns).
        bias: (out,), also of the lost rows, or None.
        rows: (kept rows,) int32, out of all outputs.
        columns: (kept columns,) int32, out of all inputs.
        shape: (out, in) of the weight before.
    """

    full_bias: Tensor | None

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, rows: Tensor, columns: Tensor, shape: tuple[int, int]
    ) -> None:
        nn.Linear.__init__(self, 1, 1, bias is not None, device="meta")  # torch warns of layers without in- or outputs
        self.out_features, self.in_features = weight.shape
        self.weight = weight
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
