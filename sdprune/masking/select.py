"""Which layers are pruned: a regular expression over names, a module class, or the layer stack by default."""

import re
from collections.abc import Iterable

from torch import nn

from sdprune.config import SDPruneConfig
from sdprune.masking.bare import adapted, check_bare
from sdprune.masking.layers import MaskedLinear
from sdprune.masking.linears import is_linear, more_than_linear


def select_linears(model: nn.Module, config: SDPruneConfig) -> list[str]:
    """Return the dotted names of the linear layers that `config` prunes, in the model's order.

    Without `target_modules` these are the linear layers inside the stack of repeated layers (an `nn.ModuleList`)
    of the base model: attention and feed-forward matrices, and neither embeddings, poolers nor heads.

    Raises:
        ValueError: a pattern is no regular expression or matches no linear layer, or nothing is left (the
            candidates are listed); a chosen weight is shared with another module; a chosen layer computes more than
            the product with its weight, cannot be trained, or has an adapter; or the model is wrapped.
        TypeError: the model is no module.
    """
    check_bare(model)
    candidates = [name for name, module in model.named_modules() if is_linear(module) and name]
    if config.target_modules is None:
        chosen = in_layer_stack(model, candidates)
        if not chosen and adapted(model):
            raise ValueError(_adapter_on(adapted(model)[0].removesuffix(".")))
        if not chosen:
            raise ValueError(
                "target_modules is None, but the model has no stack of layers with linear layers in it. "
                + _listed(candidates)
            )
    else:
        chosen = matching("target_modules", config.target_modules, candidates)
    if config.exclude_modules is not None:
        excluded = set(matching("exclude_modules", config.exclude_modules, candidates))
        chosen = [name for name in chosen if name not in excluded]
        if not chosen:
            raise ValueError("exclude_modules leaves no layer to prune. " + _listed(candidates))
    _check_layers(model, chosen)
    _check_unshared(model, chosen)
    return chosen


def unreached(model: nn.Module) -> dict[str, int]:
    """Return the size of each weight in the stack of layers that no choice of layers can reach, by name.

    These are the floating-point parameters of two or more dimensions that belong to no linear layer, embedding or
    normalisation: experts that are stored as one tensor of matrices, convolutions, matrices of other modules.
    """
    stacks, known = _stacks(model), set()
    for module in model.modules():
        embeds = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        if is_linear(module) or embeds or "Norm" in type(module).__name__:
            known |= {id(parameter) for parameter in module.parameters(recurse=is_linear(module))}
    return {
        name: value.numel()
        for name, value in model.named_parameters()
        if name.startswith(stacks) and value.dim() >= 2 and value.is_floating_point() and id(value) not in known
    }


def in_layer_stack(model: nn.Module, candidates: Iterable[str]) -> list[str]:
    """Return those of the named layers that lie inside the stack of repeated layers of the base model."""
    stacks = _stacks(model)
    return [name for name in candidates if name.startswith(stacks)]


def _stacks(model: nn.Module) -> tuple[str, ...]:
    # transformers names the attribute that holds the body; what lies outside it is a head.
    prefix = getattr(model, "base_model_prefix", "")
    body = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and f"{name}.".startswith(body)
    )


def matching(option: str, patterns: str | tuple[str, ...], candidates: list[str]) -> list[str]:
    """Return the candidates whose whole name matches a pattern.

    Raises:
        ValueError: a pattern is no regular expression or matches none of them; `option` is what the message calls it.
    """
    matched = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        try:
            found = {name for name in candidates if re.fullmatch(pattern, name)}
        except re.error as error:
            raise ValueError(f"{option}: {pattern!r} is not a regular expression ({error})") from None
        if not found:
            raise ValueError(
                f"{option}: {pattern!r} matches no linear layer (the whole name must match). " + _listed(candidates)
            )
        matched |= found
    return [name for name in candidates if name in matched]


def _listed(candidates: Iterable[str], limit: int = 12) -> str:
    names = list(candidates)
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return f"Linear layers of this model: {', '.join(names[:limit]) or 'none'}{more}"


def _check_layers(model: nn.Module, chosen: list[str]) -> None:
    """Refuse what would not be the same layer under a mask."""
    adapters = adapted(model)
    for name in chosen:
        layer: nn.Module = model.get_submodule(name)
        if name.startswith(adapters):
            raise ValueError(_adapter_on(name))
        fault = None if isinstance(layer, MaskedLinear) else more_than_linear(layer)
        if fault is not None:
            raise ValueError(f"layer {name!r} ({type(layer).__name__}) cannot be pruned: {fault}")


def _adapter_on(name: str) -> str:
    return (
        f"layer {name!r} has an adapter of PEFT; merge it first (merge_and_unload() of the PeftModel, then "
        "requires_grad_(True)), or prune the model without it and train the adapter afterwards, under freeze_sparsity"
    )


def _check_unshared(model: nn.Module, chosen: list[str]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in chosen:
        shared = owners[id(model.get_submodule(name).weight)]
        if len(shared) > 1:
            raise ValueError(
                f"target_modules chose {name!r}, whose weight is shared by {', '.join(shared)}; "
                "pruning it would prune them all: name it in exclude_modules"
            )
