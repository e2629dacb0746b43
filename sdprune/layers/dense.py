"""Dense linear layers: which ones of a model they are, their weight with its zeros, a layer around a weight."""

import copy
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sdprune.masking.layers import MaskedConv1D, MaskedLinear
from sdprune.masking.linears import is_conv1d, matrix, more_than_linear

Model = TypeVar("Model", bound=nn.Module)


def is_plain_linear(module: nn.Module) -> bool:
    """Tell whether it is a linear layer, dense or masked, and no more; not a subclass, which others may look into."""
    if type(module) in (MaskedLinear, MaskedConv1D):
        return True
    plain = type(module) is nn.Linear or (is_conv1d(module) and type(module).__name__ == "Conv1D")
    return plain and more_than_linear(module) is None


def dense_names(model: nn.Module) -> list[str]:
    """Return the names of the dense layers whose weight belongs to them alone."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return [
        name
        for name, module in model.named_modules()
        if name and is_plain_linear(module) and owners[id(module.weight)] == 1
    ]


def pruned_weight(linear: nn.Module) -> Tensor:
    """Return the weight (out, in) with its zeros, also of a masked layer that keeps the values under them; detached.

    Gates that multiply the weights (`MaskedLinear.settle`) are part of it; the layer stays as it is.
    """
    dense = copy.deepcopy(linear).to_dense() if isinstance(linear, MaskedLinear) else linear
    return matrix(dense).detach()


def dense_layer(weight: Tensor, bias: nn.Parameter | None, transposed: bool, requires_grad: bool = True) -> nn.Module:
    """Return an `nn.Linear`, or where transposed a Conv1D, around a weight (out, in)."""
    layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    if transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            layer = Conv1D(*weight.shape)  # type: ignore[no-untyped-call]
        weight = weight.T
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=requires_grad)
    layer.bias = bias
    return layer  # type: ignore[no-any-return]


def sharing_copy(model: Model) -> Model:
    """Return a copy of the modules around the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
