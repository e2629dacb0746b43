"""One pruning step over a model: scores, masks, zeros; and what the masks amount to."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from sdp_kernels import BitMask, select_mask, zero_
from sdprune.config import SDPruneConfig
from sdprune.masking.criteria import CRITERIA
from sdprune.masking.layers import MaskedLinear
from sdprune.masking.select import select_linears
from sdprune.masking.structure import check_structure, selection_arguments
from sdprune.masking.swap import masked_layers, named_weights, swap


def mask_model(model: nn.Module, config: SDPruneConfig) -> None:
    """Swap the layers that `config` chooses for masked ones, in place; logits stay equal to the bit.

    Raises:
        ValueError: the choice matches nothing or a block does not divide a layer.
    """
    names = select_linears(model, config)
    check_structure(named_weights(model, names), config)
    swap(model, names, MaskedLinear.from_dense)


@torch.no_grad()
def prune_step(model: nn.Module, config: SDPruneConfig, sparsity: float) -> None:
    """Raise the sparsity of the masked layers to `sparsity`: exact counts, and what is pruned stays pruned.

    Raises:
        ValueError: a layer would lose all its weights, or its weights are NaN; the layer is named.
    """
    layers = masked_layers(model)
    score = CRITERIA[config.criterion]
    scores = [score(layer.weight).masked_fill_(~layer.bit_mask.to_bool(), -torch.inf) for layer in layers.values()]
    try:
        masks = select_mask(scores, sparsity, **selection_arguments(config))
    except ValueError as error:
        names = list(layers)
        named = re.sub(r"scores\[(\d+)\]", lambda found: f"layer {names[int(found[1])]!r}", str(error))
        raise ValueError(named) from None
    for layer, mask in zip(layers.values(), masks, strict=True):
        layer.set_mask(mask)


@torch.no_grad()
def zero_pruned(model: nn.Module) -> None:
    """Set the pruned values of every layer that holds its zeros in place back to zero."""
    layers = [layer for layer in masked_layers(model).values() if not layer.keep_pruned_values]
    zero_([layer.weight for layer in layers], [layer.bit_mask for layer in layers])


@dataclass(frozen=True)
class Sparsity:
    """How many weights are zero.

    Args:
        layers: fraction of zeros of every pruned layer, by name.
        zeros: zeros in the pruned layers.
        prunable: weights of the pruned layers.
        parameters: parameters of the whole model, embeddings included.
    """

    layers: dict[str, float]
    zeros: int
    prunable: int
    parameters: int

    @property
    def linear(self) -> float:
        """Fraction of zeros in the pruned layers: what `target_sparsity` speaks of."""
        return self.zeros / max(self.prunable, 1)

    @property
    def model(self) -> float:
        """The same zeros as a fraction of all parameters."""
        return self.zeros / max(self.parameters, 1)


def measure_sparsity(model: nn.Module, names: list[str] | None = None) -> Sparsity:
    """Count the zeros that stand in the weights themselves, not those that a mask promises.

    Args:
        model: a model with masked or dense layers.
        names: the layers to count; None: the masked ones.
    """
    weights = named_weights(model, list(masked_layers(model)) if names is None else names)
    zeros = {name: int(weight.numel() - weight.count_nonzero()) for name, weight in weights.items()}
    return Sparsity(
        layers={name: zeros[name] / weight.numel() for name, weight in weights.items()},
        zeros=sum(zeros.values()),
        prunable=sum(weight.numel() for weight in weights.values()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def masked_fraction(model: nn.Module) -> float:
    """Return the fraction of the masked layers' weights that their masks prune."""
    masks: list[BitMask] = [layer.bit_mask for layer in masked_layers(model).values()]
    total = sum(mask.shape[0] * mask.shape[1] for mask in masks)
    return sum(mask.sparsity * mask.shape[0] * mask.shape[1] for mask in masks) / max(total, 1)
