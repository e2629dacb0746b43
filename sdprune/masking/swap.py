"""Exchange modules of a model and back; nothing else changes the structure of a model."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from sdprune.masking.layers import MaskedConv1D, MaskedLinear
from sdprune.masking.linears import is_conv1d, is_linear

Model = TypeVar("Model", bound=nn.Module)


def mask_layer(layer: nn.Module, **options: Any) -> MaskedLinear:
    """Return the masked layer that shares the parameters of a linear one; options as of `MaskedLinear`."""
    if is_conv1d(layer):
        return MaskedConv1D.from_dense(layer, **options)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"layer must be a linear layer, got {type(layer).__name__}")
    return MaskedLinear.from_dense(layer, **options)


def swap(model: Model, names: Iterable[str], make: Callable[[Any], nn.Module] = mask_layer) -> Model:
    """Replace every named linear layer by `make(layer)`, in place; layers already masked stay. Returns the model."""
    for name in names:
        layer = model.get_submodule(name)
        if is_linear(layer) and not isinstance(layer, MaskedLinear):
            model.set_submodule(name, make(layer))
    return model


def unswap(model: Model) -> Model:
    """Replace every masked layer by the dense layer with its zeros, in place. Returns the model."""
    for name, layer in masked_layers(model).items():
        model.set_submodule(name, layer.to_dense())
    return model


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """Return the masked layers of a model by name. Looked up each time: wrappers may replace parameters."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}


def named_weights(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the weights of the named layers."""
    return {name: model.get_parameter(f"{name}.weight") for name in names}
