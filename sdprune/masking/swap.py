"""Exchange modules of a model and back; nothing else changes the structure of a model."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from sdprune.masking.layers import MaskedConv1D, MaskedLinear
from sdprune.masking.linears import is_conv1d, is_linear, put_layer

Model = TypeVar("Model", bound=nn.Module)


def mask_layer(layer: nn.Module, **options: Any) -> MaskedLinear:
    """Return the masked layer that shares the parameters of a linear one; options and errors as of `MaskedLinear`."""
    return (MaskedConv1D if is_conv1d(layer) else MaskedLinear).from_dense(layer, **options)


def swap(model: Model, names: Iterable[str], make: Callable[[Any], nn.Module] = mask_layer) -> Model:
    """Replace every named linear layer by `make(layer)`, in place; layers already masked stay, as do hooks.

    Returns:
        The model.

    Raises:
        ValueError: a layer is more than linear; those before it are replaced by then (see `select_linears`).
    """
    for name in names:
        layer = model.get_submodule(name)
        if is_linear(layer) and not isinstance(layer, MaskedLinear):
            put_layer(model, name, make(layer))
    return model


def unswap(model: Model) -> Model:
    """Replace every masked layer by the dense layer with its zeros, in place; hooks stay. Returns the model."""
    for name, layer in masked_layers(model).items():
        put_layer(model, name, layer.to_dense())
    return model


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """Return the masked layers of a model by name. Looked up each time: wrappers may replace parameters."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}


def named_weights(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the weights of the named layers."""
    return {name: model.get_parameter(f"{name}.weight") for name in names}
