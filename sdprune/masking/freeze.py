"""`freeze_sparsity`: fine-tune any model that has zeros, and keep them."""

import re
import weakref
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from sdp_kernels import BitMask, zero_
from sdprune.masking.bare import check_loaded


class FrozenSparsity:
    """What `freeze_sparsity` keeps; `remove()` lets the zeros train again.

    Attributes:
        masks: the kept weights of every parameter that is held, by name; a parameter of more than two dimensions
            is seen as a matrix (first dimension, all others).
    """

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        self.masks = {name: _kept(value) for name, value in parameters.items()}
        self._model = weakref.ref(model)
        self._parameters = {name: weakref.ref(value) for name, value in parameters.items()}
        self._handles: list[RemovableHandle] = []
        for name, value in parameters.items():
            if value.requires_grad:
                handle: RemovableHandle = value.register_hook(self._masked_gradient(name))  # type: ignore[no-untyped-call]
                self._handles.append(handle)
        held = {id(value): self.masks[name] for name, value in parameters.items()}
        self._adapters, handles = _freeze_adapters(model, held)
        # last: an error above must leave nothing behind in torch
        self._handles += [*handles, register_optimizer_step_post_hook(self._after_step)]

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the parameters that are held."""
        total = sum(mask.shape[0] * mask.shape[1] for mask in self.masks.values())
        return sum(mask.sparsity * mask.shape[0] * mask.shape[1] for mask in self.masks.values()) / total

    @torch.no_grad()
    def zero_(self) -> None:
        """Put the zeros back now; needed only after something other than an optimizer wrote into the weights."""
        weights, masks = [], []
        for name, value in self._alive().items():
            weights.append(value.detach().view(value.shape[0], -1))
            masks.append(self._mask(name, value.device))
        if weights:
            zero_(weights, masks)

    def remove(self) -> None:
        """Stop holding the zeros; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for layer in filter(None, (reference() for reference in self._adapters)):
            del layer.get_delta_weight, layer.frozen_mask
        self._adapters = []

    def _masked_gradient(self, name: str) -> Any:
        def hook(gradient: Tensor) -> Tensor:
            kept = self._mask(name, gradient.device).to_bool().view(gradient.shape)
            return torch.where(kept, gradient, torch.zeros((), dtype=gradient.dtype, device=gradient.device))

        return hook

    def _mask(self, name: str, device: torch.device) -> BitMask:
        if self.masks[name].words.device != device:
            self.masks[name] = self.masks[name].to(device)
        return self.masks[name]

    def _alive(self) -> dict[str, nn.Parameter]:
        """The parameters; an error if they were exchanged under a model that is still in use."""
        found = {name: reference() for name, reference in self._parameters.items()}
        gone = [name for name, value in found.items() if value is None]
        if gone and self._model() is not None:
            raise RuntimeError(
                f"parameter {gone[0]!r} was replaced after freeze_sparsity (by sharding, for one), so its zeros are "
                "no longer held; call freeze_sparsity again, on the model as it is trained"
            )
        return {name: value for name, value in found.items() if value is not None}

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        alive = self._alive()
        if not alive:  # the model is gone; torch calls this from a loop over its hooks, so none can be removed here
            self.masks.clear()
        stepped = {id(value) for group in optimizer.param_groups for value in group["params"]}
        if any(id(value) in stepped for value in alive.values()):
            self.zero_()


def freeze_sparsity(model: nn.Module, *, exclude_modules: str | Sequence[str] | None = None) -> FrozenSparsity:
    """Hold every zero of a model's weight matrices while it is trained further, in any training loop.

    The zeros that stand in the weights now are the mask, so a pruned model of any origin will do. Their gradients
    are zero before anything clips, averages or logs them, and they are put back after every step of any
    `torch.optim` optimizer, whatever its momentum or weight decay. Nothing about the model changes: parameters,
    names, modules and `state_dict` stay as they are; averages of its weights (EMA, SWA) keep the zeros too.

    Held are the parameters with zeros that have two or more dimensions, but for embeddings; of a weight that is
    computed from others (weight_norm, torch.nn.utils.prune) the one that it is computed from. Under DDP or
    torch.compile call it before or after wrapping. With PEFT's LoRA call it after `get_peft_model`: the low-rank
    update then leaves pruned weights out, in training as in merging, so that `merge_and_unload` gives a model with
    the same zeros and outputs (the part of an update that falls on pruned weights is computed and subtracted,
    without the LoRA dropout: one more dense product a layer).

    Args:
        model: any module whose pruned weights are exact zeros.
        exclude_modules: regular expression or several; the weights of a module whose whole dotted name matches one
            may change freely.

    Returns:
        A handle; it need not be kept.

    Raises:
        ValueError: no weight matrix has a zero, a pattern matches no module, a weight is sharded, not contiguous or
            without values, or an adapter on a pruned layer is no plain LoRA.
        TypeError: the model is no module.
    """
    check_loaded(model)
    patterns = (exclude_modules,) if isinstance(exclude_modules, str) else tuple(exclude_modules or ())
    excluded = _excluded(model, patterns)
    parameters: dict[str, nn.Parameter] = {}
    for name, value in _matrices(model):
        if name.rpartition(".")[0] in excluded or int(value.count_nonzero()) == value.numel():
            continue
        if hasattr(value, "device_mesh") or not value.is_contiguous():
            reason = "sharded" if hasattr(value, "device_mesh") else "not contiguous"
            raise ValueError(f"freeze_sparsity cannot hold the zeros of {name!r}: the parameter is {reason}")
        parameters[name] = value
    if not parameters:
        raise ValueError(
            "the model has no weight matrix with exact zeros to keep; prune it first (zeros of torch.nn.utils.prune "
            "stand in the weights after its prune.remove)"
        )
    return FrozenSparsity(model, parameters)


def _excluded(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    names = [name for name, _ in model.named_modules()]
    excluded = set()
    for pattern in patterns:
        found = {name for name in names if re.fullmatch(pattern, name)}
        if not found:
            raise ValueError(f"exclude_modules: {pattern!r} matches no module (the whole name must match)")
        excluded |= found
    return excluded


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the floating parameters of two or more dimensions, each once, but embeddings and adapters' own."""
    adapters = {
        id(parameter)
        for module in model.modules()
        for name in getattr(module, "adapter_layer_names", ())  # PEFT's own list: LoRA's B begins as zeros
        for parameter in getattr(module, name, nn.Module()).parameters()
    }
    # also where a head shares them: the row of the padding token is zero and no pruning
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    seen = adapters | {id(module.weight) for module in embeddings}
    for prefix, module in model.named_modules():
        for name, value in module.named_parameters(recurse=False):
            if value.dim() >= 2 and value.is_floating_point() and value.numel() and id(value) not in seen:
                seen.add(id(value))
                yield f"{prefix}.{name}".lstrip("."), value


def _kept(weight: Tensor) -> BitMask:
    return BitMask.from_bool(weight.detach().view(weight.shape[0], -1) != 0)


def _freeze_adapters(
    model: nn.Module, masks: dict[int, BitMask]
) -> tuple[list[weakref.ref[Any]], list[RemovableHandle]]:
    """Keep the updates of LoRA layers off the zeros of the weights they adapt."""
    layers: list[weakref.ref[Any]] = []
    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        layer: Any = module
        if not (hasattr(layer, "base_layer") and hasattr(layer, "get_delta_weight")):
            continue
        mask = masks.get(id(layer.get_base_layer().weight))
        if mask is None:
            continue
        if not hasattr(layer, "lora_A") or layer.lora_variant or layer.get_base_layer().weight.dim() != 2:
            raise ValueError(
                f"freeze_sparsity supports plain LoRA on linear layers, but the adapter of {name!r} is "
                f"{type(layer).__module__}.{type(layer).__name__}; exclude the layer or merge the adapter first"
            )
        layer.frozen_mask = mask
        layer.get_delta_weight = MethodType(_masked_delta, layer)  # bound, so that a deep copy has its own
        layers.append(weakref.ref(layer))
        handles.append(layer.register_forward_hook(_leave_out_update, with_kwargs=True))
    return layers, handles


def _masked_delta(layer: Any, adapter: str) -> Tensor:
    """The update that merging adds to the weight: LoRA's own, zero where the weight is pruned."""
    delta: Tensor = type(layer).get_delta_weight(layer, adapter)
    return delta.masked_fill(~_mask_of(layer, delta.device), 0.0)


def _leave_out_update(layer: Any, arguments: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> Tensor:
    """Subtract what the part of the update that falls on pruned weights added to the output."""
    if layer.disable_adapters or layer.merged:
        return output
    if options.get("adapter_names") is not None:
        raise ValueError("adapter_names: batches of mixed adapters are not supported after freeze_sparsity")
    for name in layer.active_adapters:
        if name in layer.lora_A:
            delta: Tensor = type(layer).get_delta_weight(layer, name)
            surplus = delta.masked_fill(_mask_of(layer, delta.device), 0.0)
            surplus = surplus.T if layer.fan_in_fan_out else surplus
            rows = arguments[0].to(surplus.dtype)
            output = output - functional.linear(rows, surplus).to(output.dtype)
    return output


def _mask_of(layer: Any, device: torch.device) -> Tensor:
    if layer.frozen_mask.words.device != device:
        layer.frozen_mask = layer.frozen_mask.to(device)
    kept: Tensor = layer.frozen_mask.to_bool()
    return kept
