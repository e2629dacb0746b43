"""What is wrapped around a model: it must be off before layers are exchanged, as it changes their names."""

from typing import Any

import torch
from torch import nn

PARALLEL = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}


def check_bare(model: Any, what: str = "model") -> None:
    """Raise an error that says what to pass instead, if a model is wrapped, compiled or traced, or has no values.

    `model.compile()`, which leaves the model what it is, is none of these.

    Args:
        model: what was given.
        what: how it is called there.

    Raises:
        TypeError: it is no module.
        ValueError: it, or a module in it, is wrapped by torch.compile or for parallel training; it is a scripted or
            traced program; or it is on the meta device.
    """
    check_loaded(model, what)
    kinds = _class_names(model)
    program = next((kind for kind in ("ScriptModule", "GraphModule") if kind in kinds), None)
    if program is not None:  # its own name is that of the module that it was made from
        raise ValueError(
            f"{what} is a scripted or traced program ({program}), whose layers cannot be exchanged; pass the module "
            "that it was made from"
        )
    for name, module in model.named_modules():
        inside = _inside(module)
        if inside is None:
            continue
        if not name:
            raise ValueError(
                f"{what} is wrapped ({type(module).__name__}); pass the module itself, {what}.{inside}, and wrap it "
                "afterwards: a Trainer does so on its own, and compiles with torch_compile=True in its arguments"
            )
        raise ValueError(
            f"{what}: its module {name!r} is wrapped ({type(module).__name__}); put the module itself there, "
            f"{what}.set_submodule({name!r}, {what}.get_submodule({name!r}).{inside}), or compile it in place"
        )


def check_loaded(model: Any, what: str = "model") -> None:
    """Raise TypeError if it is no module, ValueError if a parameter of it has no values; the parameter is named."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what} must be a torch.nn.Module, got {type(model).__name__}")
    empty = next((name for name, value in model.named_parameters() if value.is_meta), None)
    if empty is not None:
        raise ValueError(
            f"{what}: its parameter {empty!r} is on the meta device: it was never loaded, or is offloaded; load the "
            "model in full"
        )


def check_float(model: nn.Module, what: str = "model") -> None:
    """Raise ValueError if a layer has int8 values, as those of a checkpoint in int8, which nothing can train."""
    for name, module in model.named_modules():
        values = module.parameters(recurse=False)
        if not isinstance(module, nn.Linear) and any(value.dtype == torch.int8 for value in values):
            raise ValueError(
                f"{what}: layer {name.removesuffix('.blocks')!r} is int8, which cannot be trained; pass the model with "
                f"dense layers instead, sdprune.layers.forms.plain_copy({what})"
            )


def _inside(module: nn.Module) -> str | None:
    """The attribute in which a wrapper holds what it wraps; None: it is no wrapper."""
    # By form and name: to import the classes takes longer than to import this package.
    if "_orig_mod" in dict(module.named_children()):
        return "_orig_mod"
    return "module" if _class_names(module) & PARALLEL else None


def _class_names(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}


def adapted(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules to which PEFT has added adapters, each with a dot behind it."""
    # PEFT's own list of what such a module adds
    return tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "adapter_layer_names"))
