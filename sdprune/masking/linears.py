"""What counts as a linear layer: `nn.Linear`, and the `Conv1D` of GPT-2, which stores its weight transposed."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# of a layer under one of these, `weight` is computed from other parameters before every call
_UNDO = {
    "weight_g": "torch.nn.utils.remove_weight_norm(layer)",
    "weight_u": "torch.nn.utils.remove_spectral_norm(layer)",
}
_CALLS = ("forward", "__call__", "_wrapped_call_impl", "_call_impl")
HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether the module is a linear layer with a weight of shape (in, out), as transformers' `Conv1D`."""
    weight = getattr(module, "weight", None)
    return (
        any(map(_names_conv1d, type(module).__mro__))
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and getattr(module, "nf", None) == weight.shape[1]
    )


def _names_conv1d(kind: type) -> bool:
    # By name, because this folder works without transformers; a class of the same name elsewhere may compute anything.
    home = kind.__module__.partition(".")[0]
    return (home, kind.__name__) in (("transformers", "Conv1D"), ("sdprune", "MaskedConv1D"))


def is_linear(module: nn.Module) -> bool:
    """Tell whether the module maps the last dimension of its input by a weight matrix."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def matrix(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer as (out, in), a view of what is stored."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if is_conv1d(module) else weight


def more_than_linear(layer: nn.Module) -> str | None:
    """Return what keeps another layer from standing in the place of a linear one, and what to do; None: nothing does.

    That is a weight which is computed from other tensors before every call, a forward of its own, or tensors and
    modules beside weight and bias. Hooks are nothing of the kind: `put_layer` takes them along.
    """
    named = dict(layer.named_parameters(recurse=False))
    buffers = dict(layer.named_buffers(recurse=False))
    parametrized = next(iter(getattr(layer, "parametrizations", ())), None)
    if parametrized is not None:
        undo = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {parametrized!r})"
        return f"its {parametrized} is parametrized; call {undo} first"
    pruned = next((name[:-5] for name in buffers if name.endswith("_mask") and f"{name[:-5]}_orig" in named), None)
    if pruned is not None:
        return f"its {pruned} is under torch.nn.utils.prune; call torch.nn.utils.prune.remove(layer, {pruned!r}) first"
    for name, undo in _UNDO.items():
        if name in named or name in buffers:
            return f"its weight is computed from {name!r} and others; call {undo} first"
    base = next(kind for kind in type(layer).__mro__ if kind is nn.Linear or _names_conv1d(kind))
    if any(getattr(type(layer), name) is not getattr(base, name) for name in _CALLS):
        return (
            "its class has a forward of its own, which would no longer be called; name the layer in exclude_modules, "
            f"or put {'an nn.Linear' if base is nn.Linear else 'a Conv1D'} in its place"
        )
    if "forward" in vars(layer):
        return (
            "a function was assigned to its forward, which would no longer be called; delete it first (where "
            "accelerate put it: accelerate.hooks.remove_hook_from_submodules(model)), or use a hook"
        )
    others = [name for name in (*named, *buffers, *dict(layer.named_children())) if name not in ("weight", "bias")]
    if others or named.get("weight") is not layer.weight:
        held = f"it holds {', '.join(map(repr, others))} beside" if others else "what it calls weight is not"
        return f"{held} its own weight and bias; name the layer in exclude_modules, or put an nn.Linear in its place"
    return None


def not_trainable(layer: nn.Module) -> str | None:
    """Return why the weight of a linear layer cannot be trained and pruned, and what to do; None: it can."""
    weight: Any = layer.weight
    if weight.is_meta:
        return "its weight is on the meta device: it was never loaded, or is offloaded; load the model in full"
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided or not weight.is_floating_point():
        kind = type(weight).__name__ if type(weight) is not nn.Parameter else f"{weight.layout} of {weight.dtype}"
        return (
            f"its weight is no dense matrix of floating-point numbers ({kind}); load the model neither quantized nor "
            "sharded, or name the layer in exclude_modules"
        )
    if weight.is_inference():
        return "its weight was made under torch.inference_mode, so nothing can train it; build the model outside of it"
    return None


def put_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the named module, in place.

    All hooks of the module go on with the layer, and the handles that its owner holds still remove them.
    """
    hooks = {key: value for key, value in vars(model.get_submodule(name)).items() if key in HOOKS}
    vars(layer).update(hooks)  # the very dictionaries, which the handles know
    for hook in hooks.get("_load_state_dict_pre_hooks", {}).values():
        if getattr(hook, "with_module", False):  # torch has bound it to the module that leaves
            hook.module = weakref.ref(layer)
    model.set_submodule(name, layer)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode inside the block, and every module in its own mode again behind it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
