"""`MaskedLinear`: a linear layer whose pruned weights are zero and stay so; `MaskedConv1D`: the same for GPT-2's."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdp_kernels import BitMask, masked_linear, zero_
from sdp_kernels.masked_linear.cpu import worthwhile
from sdp_kernels.masks import ActiveBlocks, masked
from sdprune.masking.linears import is_linear, matrix, more_than_linear
from sdprune.methods.criteria import expected_gate, sampled_gate

LISTS = ("crow_indices", "col_indices", "ccol_indices", "row_indices")
# Density up to which a product that walks along the kept blocks is faster than the dense one with its zeros on a GPU.
MOST_DENSE = 0.25
WALKING_DTYPES = {"cpu": (torch.float32, torch.float64)}
SMALLEST_GATE = 0.01  # what is kept stays different from zero, so that the sparsity is exact


class _Gated(torch.autograd.Function):
    """The masked weight; pruned values receive a zero gradient (before anything clips or averages it).

    The gate, a factor of 1 on every weight, receives gradient * weight of all of them, pruned ones included.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, words: Tensor, gate: Tensor | None, zeros_in_place: bool) -> Tensor:
        ctx.save_for_backward(words, weight if gate is not None else None)
        if zeros_in_place:
            return weight.view_as(weight)
        return masked(weight, _kept(words, weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        words, weight = ctx.saved_tensors
        # in half precision the product of two small numbers would be 0
        sensitivity = None if weight is None else grad.float() * weight.float()
        return masked(grad, _kept(words, grad)), None, sensitivity, None


def _kept(words: Tensor, weight: Tensor) -> Tensor:
    return BitMask(words, (weight.shape[0], weight.shape[1])).to_bool()


class MaskedLinear(nn.Linear):
    """A linear layer with a mask of one bit a weight. It computes `input @ (mask * weight).T + bias`.

    By default the zeros stand in `weight` itself (`zero_()` after every optimizer step), so that the product is an
    ordinary dense one and only the gradient is masked. With `keep_pruned_values=True` the pruned values survive in
    `weight` and the product masks them, for criteria that may bring them back.

    Zeros alone do not make a dense product faster. With `block_shape`, once the density is low enough, the product
    and its gradients visit the kept blocks only.

    Args:
        in_features: size of an input row.
        out_features: size of an output row.
        bias: whether there is an additive bias.
        keep_pruned_values: whether `weight` keeps the values under the zeros of the mask.
        block_shape: (out, in) of the blocks that the masks keep or prune as a whole; None: any mask.
        device: where the tensors live.
        dtype: float type of weight and bias.

    Attributes:
        weight: (out_features, in_features), named and shaped as in `nn.Linear`.
        mask: (out_features, ceil(in_features / 32)) int32, the words of a `sdp_kernels.BitMask`; saved with the
            model. Bits, no numbers: an average of models (EMA, SWA) must leave buffers out (`use_buffers=False`), and
            begin after the last pruning step to have all zeros.
        score: one float32 for each weight or block, what a criterion that needs gradients has gathered so far, and
            `score_steps`, over how many steps; saved with the model. None without `gather_scores`.
        gathering: whether training passes measure how much the loss depends on each weight or block.
        mask_missing: whether the state loaded last held no mask of this layer.
    """

    dense_class: type[nn.Module] = nn.Linear
    mask: Tensor
    score: Tensor | None
    score_steps: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        keep_pruned_values: bool = False,
        block_shape: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.keep_pruned_values = keep_pruned_values
        self.block_shape = block_shape
        self.gathering = self.hard_concrete = self.mask_missing = False
        self._gate: Tensor | None = None
        self.register_buffer("score", None)
        self.register_buffer("score_steps", None)
        self._keep_everything(self.weight.device)

    def _keep_everything(self, device: torch.device) -> None:
        everything = torch.ones(self.out_features, self.in_features, dtype=torch.bool)
        mask = BitMask.from_bool(everything, block_shape=self.block_shape)
        self.register_buffer("mask", mask.words.to(device))
        for name in LISTS if mask.lists is not None else ():
            self.register_buffer(name, getattr(mask.lists, name).to(device), persistent=False)
        self.has_lists = mask.lists is not None
        self._few_blocks = False

    @classmethod
    def from_dense(
        cls, linear: Any, *, keep_pruned_values: bool = False, block_shape: tuple[int, int] | None = None
    ) -> Self:
        """Return a masked layer that shares the parameters of a dense one, with nothing pruned yet.

        Raises:
            TypeError: `linear` is no linear layer.
            ValueError: it is more than that, so that a masked layer would not compute what it does.
        """
        if not is_linear(linear):
            raise TypeError(f"linear must be a linear layer, got {type(linear).__name__}")
        fault = more_than_linear(linear)
        if fault is not None:
            raise ValueError(f"linear ({type(linear).__name__}) cannot be masked: {fault}")
        out_features, in_features = matrix(linear).shape
        options: dict[str, Any] = {"keep_pruned_values": keep_pruned_values, "block_shape": block_shape}
        layer = cls(in_features, out_features, linear.bias is not None, device="meta", **options)
        layer._keep_everything(linear.weight.device)
        layer.weight, layer.bias, layer.dense_class = linear.weight, linear.bias, type(linear)
        return layer.train(linear.training)

    def to_dense(self) -> nn.Module:
        """Return the dense layer that shares the parameters, with the pruned values set to zero in place."""
        self.settle()
        self.zero_()
        with torch.device("meta"):
            dense = self._new_dense()
        dense.weight, dense.bias = self.weight, self.bias
        return dense.train(self.training)

    def _new_dense(self) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None)

    @property
    def matrix(self) -> Tensor:
        """The weight as (out_features, in_features)."""
        return self.weight

    @property
    def bit_mask(self) -> BitMask:
        """The mask; 1 = kept."""
        lists = ActiveBlocks(*(getattr(self, name) for name in LISTS)) if self.has_lists else None
        return BitMask(self.mask, (self.out_features, self.in_features), self.block_shape, lists)

    @property
    def sparsity(self) -> float:
        """The fraction of weights that the mask prunes."""
        return self.bit_mask.sparsity

    def set_mask(self, mask: BitMask) -> None:
        """Copy `mask` into the buffers (in place, so that nothing recompiles) and apply it."""
        if mask.block_shape != self.block_shape:
            mask = BitMask.from_bool(mask.to_bool(), block_shape=self.block_shape)
        self.bit_mask.copy_(mask)
        self._choose_product()
        if not self.keep_pruned_values:
            self.zero_()

    def zero_(self) -> None:
        """Set the pruned values to zero in place."""
        zero_(self.weight, self.bit_mask)

    def gather_scores(self, start: float = 0.0, *, hard_concrete: bool = False) -> None:
        """Make room for the scores of a criterion that needs gradients, one for each weight or block.

        Args:
            start: what the scores begin with.
            hard_concrete: whether the scores are the log alpha of random gates that multiply the weights.
        """
        height, width = self.block_shape or (1, 1)
        shape = (self.out_features // height, self.in_features // width)
        self.score = torch.full(shape, start, dtype=torch.float32, device=self.weight.device)
        self.score_steps = torch.zeros((), dtype=torch.int64, device=self.weight.device)
        self.gathering, self.hard_concrete = True, hard_concrete

    def take_sensitivity(self) -> Tensor | None:
        """Return the gradient of the loss for a factor on each weight or block, and begin anew.

        That is the sum of gradient * weight of the backward passes since the last call, not clipped, without the
        gradient that other processes found; for hard concrete gates the gradient for log alpha. None without any.
        """
        gate, self._gate = self._gate, None
        return None if gate is None else gate.grad

    @torch.no_grad()
    def settle(self) -> None:
        """Stop gathering; hard concrete gates become part of the weights that they multiply."""
        trained = self.score_steps is not None and bool(self.score_steps)
        if self.gathering and self.hard_concrete and self.score is not None and trained:
            self.matrix.mul_(self._spread(expected_gate(self.score).clamp(min=SMALLEST_GATE)))
            self.score.fill_(torch.inf)  # open from now on, also when a later checkpoint is loaded
        self.gathering, self._gate = False, None

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to rows in the last dimension of `input`."""
        gate = None
        if self.gathering:
            if self.hard_concrete:
                return self._randomly_gated(input)
            if self.training and torch.is_grad_enabled():
                gate = self._leaf(None)
        if self._walks_blocks(input) or (gate is not None and self.block_shape is not None):
            return masked_linear(input, self.matrix, self.bit_mask, self.bias, block_gate=gate)
        if self.keep_pruned_values and gate is None:
            return masked_linear(input, self.matrix, self.bit_mask, self.bias)
        return functional.linear(input, self._masked(self.matrix, gate), self.bias)

    def _masked(self, weight: Tensor, gate: Tensor | None) -> Tensor:
        masked: Tensor = _Gated.apply(weight, self.mask, gate, not self.keep_pruned_values)  # type: ignore[no-untyped-call]
        return masked

    def _walks_blocks(self, input: Tensor) -> bool:
        if not self._few_blocks:
            return False
        kind = input.device.type
        return kind not in WALKING_DTYPES or (
            input.dtype in WALKING_DTYPES[kind] and not torch.is_autocast_enabled(kind)
        )

    def _leaf(self, values: Tensor | None) -> Tensor:
        """The tensor whose gradient is the sensitivity; no parameter, so that nothing trains, clips or saves it."""
        if self._gate is None:
            assert self.score is not None
            # only the gradient takes memory: nobody reads the ones
            ones = torch.ones((), device=self.score.device).expand_as(self.score)
            self._gate = (ones if values is None else values.clone()).requires_grad_()
        return self._gate

    def _randomly_gated(self, input: Tensor) -> Tensor:
        assert self.score is not None
        # also without gradients: gradient checkpointing runs a training pass so, and again for its backward
        gate = sampled_gate(self._leaf(self.score)) if self.training else expected_gate(self.score)
        weight = self._masked(self.matrix, None) * self._spread(gate).to(self.weight.dtype)
        return functional.linear(input, weight, self.bias)

    def _spread(self, values: Tensor) -> Tensor:
        """One value for each weight from one for each weight or block."""
        height, width = self.block_shape or (1, 1)
        return values.repeat_interleave(height, 0).repeat_interleave(width, 1)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.mask_missing = f"{prefix}mask" not in state_dict
        mask = BitMask(self.mask, (self.out_features, self.in_features))
        if self.has_lists:  # they follow from the mask and are not saved
            kept = BitMask.from_bool(mask.to_bool(), block_shape=self.block_shape)
            self.bit_mask.copy_(kept)
        self._choose_product()

    def _choose_product(self) -> None:
        # A bool, not the density: compiled code depends on it, and a pruning step must not compile anew.
        kind = self.mask.device.type
        if kind == "cpu":
            self._few_blocks = worthwhile(self.weight.dtype, self.bit_mask)
        else:
            self._few_blocks = self.has_lists and kind == "cuda" and 1.0 - self.sparsity <= MOST_DENSE

    def extra_repr(self) -> str:
        """Describe the layer for `print`."""
        return f"{super().extra_repr()}, sparsity={self.sparsity:.4f}"


class MaskedConv1D(MaskedLinear):
    """A `MaskedLinear` whose weight is stored as (in, out), in the place of transformers' `Conv1D`.

    Mask, blocks and scores are those of `matrix`, the weight as (out, in).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight = nn.Parameter(self.weight.detach().T.contiguous())

    @property
    def nx(self) -> int:
        """Size of an input row, as `Conv1D` names it."""
        return self.in_features

    @property
    def nf(self) -> int:
        """Size of an output row, as `Conv1D` names it."""
        return self.out_features

    @property
    def matrix(self) -> Tensor:
        """The weight as (out_features, in_features), a view."""
        return self.weight.T

    def _new_dense(self) -> nn.Module:
        return self.dense_class(self.out_features, self.in_features)

    @torch.no_grad()
    def zero_(self) -> None:
        """Set the pruned values to zero in place."""
        self.weight.masked_fill_(~self.bit_mask.to_bool().T, 0.0)
