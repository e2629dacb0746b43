"""`MaskedLinear`: a linear layer whose pruned weights are zero and stay so."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdp_kernels import BitMask, masked_linear, zero_


class _MaskGradient(torch.autograd.Function):
    """The weight, unchanged; pruned values receive a zero gradient (before anything clips or averages it)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, words: Tensor) -> Tensor:
        ctx.save_for_backward(words)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (words,) = ctx.saved_tensors
        kept = BitMask(words, (grad.shape[0], grad.shape[1])).to_bool()
        return torch.where(kept, grad, torch.zeros((), dtype=grad.dtype, device=grad.device)), None


class MaskedLinear(nn.Linear):
    """A linear layer with a mask of one bit a weight. It computes `input @ (mask * weight).T + bias`.

    By default the zeros stand in `weight` itself (`zero_()` after every optimizer step), so that the product is an
    ordinary dense one and only the gradient is masked. With `keep_pruned_values=True` the pruned values survive in
    `weight` and the product masks them, for criteria that may bring them back.

    Zeros alone do not make a dense product faster.

    Args:
        in_features: size of an input row.
        out_features: size of an output row.
        bias: whether there is an additive bias.
        keep_pruned_values: whether `weight` keeps the values under the zeros of the mask.
        device: where the tensors live.
        dtype: float type of weight and bias.

    Attributes:
        weight: (out_features, in_features), named and shaped as in `nn.Linear`.
        mask: (out_features, ceil(in_features / 32)) int32, the words of a `sdp_kernels.BitMask`; saved with the
            model.
    """

    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        keep_pruned_values: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.keep_pruned_values = keep_pruned_values
        everything = torch.ones(out_features, in_features, dtype=torch.bool)
        self.register_buffer("mask", BitMask.from_bool(everything).words.to(self.weight.device))

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, keep_pruned_values: bool = False) -> Self:
        """Return a masked layer that shares the parameters of `linear`, with nothing pruned yet."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            keep_pruned_values=keep_pruned_values,
            device="meta",
        )
        everything = torch.ones(linear.weight.shape, dtype=torch.bool)
        layer.mask = BitMask.from_bool(everything).words.to(linear.weight.device)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """Return an `nn.Linear` that shares the parameters, with the pruned values set to zero in place."""
        self.zero_()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    @property
    def bit_mask(self) -> BitMask:
        """The mask; 1 = kept."""
        return BitMask(self.mask, (self.out_features, self.in_features))

    @property
    def sparsity(self) -> float:
        """The fraction of weights that the mask prunes."""
        return self.bit_mask.sparsity

    def set_mask(self, mask: BitMask) -> None:
        """Copy `mask` into the buffer (in place, so that nothing recompiles) and apply it."""
        self.mask.copy_(mask.words)
        if not self.keep_pruned_values:
            self.zero_()

    def zero_(self) -> None:
        """Set the pruned values to zero in place."""
        zero_(self.weight, self.bit_mask)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to rows in the last dimension of `input`."""
        if self.keep_pruned_values:
            return masked_linear(input, self.weight, self.bit_mask, self.bias)
        weight: Tensor = _MaskGradient.apply(self.weight, self.mask)  # type: ignore[no-untyped-call]
        return functional.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        """Describe the layer for `print`."""
        return f"{super().extra_repr()}, sparsity={self.sparsity:.4f}"
