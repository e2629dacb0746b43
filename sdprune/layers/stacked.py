"""Layers that get the same input, multiplied at once: `StackedLinear` computes for all, each `StackedPart` for one."""

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from sdp_kernels import BlockSparseMatrix, block_sparse_linear
from sdp_kernels.block_sparse_linear.matrix import BlockLists
from sdp_kernels.dispatch import autocast_dtype
from sdprune.layers.block_sparse import BlockSparseLinear
from sdprune.masking.linears import put_layer


class _Pending(NamedTuple):
    """What is still to be taken of one product: only by calls with the very same input, in the same state."""

    input: weakref.ref[Tensor]
    state: tuple[Any, ...]
    parts: dict[int, Tensor]


class StackedLinear(nn.Module):
    """One product for several block-sparse layers: their rows are those of one matrix, one below the other.

    The first layer that is called computes the rows of all; the others take theirs when they are called with the same
    tensor object, unchanged since. Each takes its rows once; whoever finds none computes them all anew, so that a layer
    may be called alone, again or out of turn. What is pending belongs to the thread that computed it, and goes when
    its input does. While a graph is traced every layer computes its own rows.

    An input made under `torch.inference_mode` has no count of its changes: one that the model changes in place between
    the calls of two layers is not noticed there.

    Args:
        layers: at least two of one `stacking_form`, in the order of their rows. They are copied.

    Attributes:
        product: the layer of all rows.
        bounds: where the rows of each layer begin, and at the end their number.
        blocks: where its blocks begin, and at the end their number.
    """

    bounds: tuple[int, ...]
    blocks: tuple[int, ...]

    def __init__(self, layers: Sequence[BlockSparseLinear]) -> None:
        super().__init__()
        bounds = [0]
        for layer in layers:
            bounds.append(bounds[-1] + layer.out_features)
        self.bounds = tuple(bounds)
        self.product = BlockSparseLinear.from_matrix(_stack([layer.matrix for layer in layers]), _stack_biases(layers))
        self.product.requires_grad_(False).eval().pack()
        self._slot = threading.local()
        _find_blocks(self)
        self.register_load_state_dict_post_hook(_find_blocks)  # type: ignore[no-untyped-call]

    def part(self, index: int, input: Tensor) -> Tensor:
        """(..., in) -> (..., out of one layer), a view of the rows of all."""
        if torch.compiler.is_compiling():
            return self._apart(index, input)
        state = self._state(input)
        pending: _Pending | None = getattr(self._slot, "pending", None)
        # The same object, not an equal one; it is alive while this call holds it.
        fits = pending is not None and pending.input() is input and pending.state == state
        if pending is None or not fits or index not in pending.parts:
            pending = self._compute(input, state)
        part = pending.parts.pop(index)
        self._slot.pending = pending if pending.parts else None
        return part

    def _apart(self, index: int, input: Tensor) -> Tensor:
        """The rows of one layer by a product of their own."""
        if torch.is_grad_enabled() and input.requires_grad:  # the lists of its backward are those of all rows
            return self._rows(self.product(input), index)
        whole, (start, end) = self.product.matrix, self.bounds[index : index + 2]
        height, (first, last) = whole.block_shape[0], self.blocks[index : index + 2]
        crow = whole.crow_indices[start // height : end // height + 1] - first
        order = torch.arange(len(crow) - 1, dtype=torch.int32, device=crow.device)
        none = order[:0]
        part = BlockSparseMatrix(
            whole.values[first:last],
            crow,
            whole.col_indices[first:last],
            (end - start, whole.shape[1]),
            whole.block_shape,
            BlockLists(none, order, none, none, none, none),  # the others are for the backward
            None if whole.scales is None else whole.scales[start:end],
        )
        return block_sparse_linear(input, part, None if self.product.bias is None else self.product.bias[start:end])

    def _compute(self, input: Tensor, state: tuple[Any, ...]) -> _Pending:
        output = self.product(input)
        parts = {index: self._rows(output, index) for index in range(len(self.bounds) - 1)}
        return _Pending(weakref.ref(input, lambda _: parts.clear()), state, parts)

    def _rows(self, output: Tensor, index: int) -> Tensor:
        return output.narrow(-1, self.bounds[index], self.bounds[index + 1] - self.bounds[index])

    def _state(self, input: Tensor) -> tuple[Any, ...]:
        """What a result depends on beside the identity of its input."""
        versions = tuple(None if tensor.is_inference() else tensor._version for tensor in (input, self.product.values))
        return *versions, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_dtype(input)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._slot = threading.local()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _load_from_state_dict(self, *args: Any) -> None:
        self._slot = threading.local()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy in memory or in a file takes along: nothing that is pending."""
        return {name: value for name, value in vars(self).items() if name != "_slot"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._slot = threading.local()


def _find_blocks(stack: StackedLinear, *loaded: Any) -> None:
    """Note where the blocks of each layer begin: as numbers, which a graph can be traced with."""
    rows = torch.tensor(stack.bounds) // stack.product.block_shape[0]
    stack.blocks = tuple(stack.product.crow_indices.cpu()[rows].tolist())


class StackedPart(nn.Module):
    """One of several layers whose product is made at once; it stands at the name of the layer, for inference only.

    The state dict of a model holds the stack once, below the name of its first layer.

    Args:
        stack: of all the layers; the first one owns it as a submodule.
        index: which of them this one is.

    Attributes:
        in_features: size of an input row.
        out_features: size of an output row.
    """

    stack: StackedLinear

    def __init__(self, stack: StackedLinear, index: int) -> None:
        super().__init__()
        self.in_features = stack.product.in_features
        self.out_features = stack.bounds[index + 1] - stack.bounds[index]
        self.index = index
        if index == 0:
            self.stack = stack
        else:
            vars(self)["stack"] = stack  # not as a submodule: it has one name

    @property
    def weight(self) -> Tensor:
        """The kept blocks of all layers, because models ask a linear layer's weight for its dtype and device."""
        return self.stack.product.values

    @property
    def bias(self) -> Tensor | None:
        """(out_features,), of this layer alone, or None."""
        bias: Tensor | None = self.stack.product.bias
        return None if bias is None else bias[self.stack.bounds[self.index] : self.stack.bounds[self.index + 1]]

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to rows in the last dimension of `input`."""
        return self.stack.part(self.index, input)

    def extra_repr(self) -> str:
        """Describe the layer for `print`."""
        layers = len(self.stack.bounds) - 1
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.index + 1} of {layers} layers"


def stacking_form(layer: nn.Module) -> tuple[Any, ...] | None:
    """Return what layers must have in common to stand in one stack; None of a layer that can stand in none.

    They are block-sparse, their blocks divide their rows, and no activation is joined to them.
    """
    if not isinstance(layer, BlockSparseLinear) or layer.activation is not None:
        return None
    if layer.out_features % layer.block_shape[0]:
        return None
    return layer.block_shape, layer.in_features, layer.values.dtype, layer.values.device


def stack_layers(model: nn.Module, names: Sequence[str]) -> None:
    """Put one product in the place of the named layers, in place; each keeps its name and its hooks."""
    layers: list[Any] = [model.get_submodule(name) for name in names]
    stack = StackedLinear(layers)
    for index, name in enumerate(names):
        put_layer(model, name, StackedPart(stack, index).train(layers[index].training))


def _stack(matrices: Sequence[BlockSparseMatrix]) -> BlockSparseMatrix:
    """The rows of matrices one below the other, their blocks side by side in the same form."""
    first, starts, crow = matrices[0], 0, [matrices[0].crow_indices[:1]]
    for matrix in matrices:
        crow.append(matrix.crow_indices[1:] + starts)
        starts += len(matrix.values)
    return BlockSparseMatrix(
        torch.cat([matrix.values.detach() for matrix in matrices]),
        torch.cat(crow).int(),
        torch.cat([matrix.col_indices for matrix in matrices]),
        (sum(matrix.shape[0] for matrix in matrices), first.shape[1]),
        first.block_shape,
        scales=None if first.scales is None else torch.cat([matrix.scales for matrix in matrices]),  # type: ignore[misc]
    )


def _stack_biases(layers: Sequence[BlockSparseLinear]) -> nn.Parameter | None:
    """(out of all,), or None where no layer has one; a missing one is 0."""
    known = next((layer.bias for layer in layers if layer.bias is not None), None)
    if known is None:
        return None
    biases = [known.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers]
    return nn.Parameter(torch.cat(biases), requires_grad=False)
