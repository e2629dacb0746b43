"""Which layers of a model may be computed in one step, found by watching it run, and how that is done to it.

An activation joins the product before it: its input is the very tensor that the layer returned, and the outputs stay
the same where the activation is applied at once, so that nothing else reads what the layer alone returns. Layers that
are called one after the other with the very same tensor share one product.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdp_kernels.block_sparse_linear.reference import ACTIVATIONS
from sdprune.formats.form import BLOCK, Form
from sdprune.layers.block_sparse import BlockSparseLinear
from sdprune.layers.dense import Model, sharing_copy
from sdprune.layers.stacked import stack_layers, stacking_form
from sdprune.masking.linears import HOOKS
from sdprune.speed.compare import largest_error, output_tensors
from sdprune.speed.plan_record import Plan

SAME = 1e-6  # of two runs of the same operations: nothing but their order may differ


@dataclass(frozen=True)
class FusedActivation:
    """An activation module and the layers that it follows.

    Args:
        function: as `block_sparse_linear` calls it.
        layers: names of the layers, one for each call of the module.
        places: names of the module in the model.
    """

    function: Any
    layers: tuple[str, ...]
    places: tuple[str, ...]


@dataclass(frozen=True)
class Fusions:
    """What is computed in one step.

    Args:
        activations: each with the layers that it joins.
        stacks: names of the layers that share a product.
        attention: whether the model attends on the compiled engine, in blocks that stay in the cache.
    """

    activations: tuple[FusedActivation, ...] = ()
    stacks: tuple[tuple[str, ...], ...] = ()
    attention: bool = False

    def __str__(self) -> str:
        joined = sum(len(found.layers) for found in self.activations)
        shared = f"{sum(map(len, self.stacks))} layers in {len(self.stacks)} shared products"
        return f"{joined} activations joined, {shared}{', attention in blocks' if self.attention else ''}"


@dataclass
class _Watch:
    """What a run of the model shows, call by call of its innermost modules; only the last call is kept."""

    names: Mapping[int, tuple[str, ...]]
    calls: Counter[int] = field(default_factory=Counter)
    behind: dict[int, list[nn.Module]] = field(default_factory=dict)  # activation -> layers whose output it got
    functions: dict[int, str] = field(default_factory=dict)
    runs: list[list[nn.Module]] = field(default_factory=list)  # called one after the other with one input
    last: tuple[nn.Module, Any, int | None, Any] | None = None  # module, input, its version, output

    def note(self, module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        """Compare a call with the one before."""
        alone = len(arguments) == 1 and not named and isinstance(arguments[0], Tensor)
        input = arguments[0] if alone else None
        before, version = self.last, _version(input)
        self.last = module, input, version, output
        self.calls[id(module)] += 1
        if before is not None and input is not None and input is before[3] and isinstance(before[0], BlockSparseLinear):
            self._note_activation(module, before[0], input, output)
        if before is not None and input is not None and input is before[1] and version == before[2]:
            self.runs[-1].append(module)
        else:
            self.runs.append([module])

    def _note_activation(self, module: nn.Module, layer: nn.Module, input: Tensor, output: Any) -> None:
        if id(module) not in self.functions and isinstance(output, Tensor) and output.shape == input.shape:
            function = activation_of(module, input)
            if function is not None:
                self.functions[id(module)] = function
        if id(module) in self.functions:
            self.behind.setdefault(id(module), []).append(layer)

    def _name(self, module: nn.Module) -> str:
        return self.names[id(module)][0]

    def named_runs(self) -> list[list[str]]:
        """The modules that are called one after the other with the same input, by name."""
        return [list(map(self._name, run)) for run in self.runs]

    def fusions(self) -> Fusions:
        """Keep what is called as often as it seems, and nowhere else."""
        activations = [
            FusedActivation(self.functions[key], tuple(map(self._name, layers)), self.names[key])
            for key, layers in self.behind.items()
            if len(layers) == self.calls[key] >= len(self.names[key]) and all(map(self._once, layers))
        ]
        joined = {name for found in activations for name in found.layers}
        stacks = []
        for run in self.runs:
            by_form: dict[Any, list[str]] = {}
            for layer in run:
                if self._once(layer) and self._name(layer) not in joined:
                    by_form.setdefault(stacking_form(layer), []).append(self._name(layer))
            stacks += [tuple(names) for form, names in by_form.items() if form is not None and len(names) > 1]
        return Fusions(tuple(activations), tuple(stacks))

    def _once(self, layer: nn.Module) -> bool:
        return self.calls[id(layer)] == 1 and len(self.names[id(layer)]) == 1


def _version(tensor: Tensor | None) -> int | None:
    """How often a tensor was changed in place; None where nobody counts."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def activation_of(module: nn.Module, like: Tensor) -> str | None:
    """Return which of the known activations a module without tensors computes, by what it does to a row of numbers.

    Args:
        module: takes one tensor and returns one of its shape.
        like: an input that it takes.
    """
    tensors = next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
    if tensors or isinstance(module, nn.Identity):
        return None
    probe = torch.linspace(-8.0, 8.0, like.numel(), device=like.device).view(like.shape)
    found = module.forward(probe.clone())
    for name, function in ACTIVATIONS.items():
        if name is not None and torch.allclose(found, function(probe), rtol=1e-6, atol=1e-6):
            return name
    return None


def find_fusions(model: nn.Module, inputs: Mapping[str, Any], keep: Collection[str] = ()) -> Fusions:
    """Run a model in evaluation mode and return what it may compute in one step.

    Layers and activations with forward hooks are left alone, which may look at what lies between them.

    Args:
        model: with block-sparse layers.
        inputs: keyword arguments of the model.
        keep: names of layers to leave alone too.
    """
    watch = _watch(model, inputs)
    found = watch.fusions()
    hooked = [
        module for module in model.modules() if any(vars(module).get(hook) for hook in HOOKS if "forward" in hook)
    ]
    apart = {*keep, *(name for module in hooked for name in watch.names[id(module)])}
    return Fusions(
        tuple(each for each in found.activations if apart.isdisjoint((*each.layers, *each.places))),
        tuple(layers for layers in found.stacks if apart.isdisjoint(layers)),
    )


def agree(plan: Plan, model: nn.Module, inputs: Mapping[str, Any]) -> Plan:
    """Return a plan in which layers that get the same input take blocks of one form, so that they can share a product.

    They take the form that is the fastest for all of them together, if one of them has chosen blocks and it costs at
    most a tenth more than the choices of each, which often differ by noise alone.

    Args:
        plan: of the model.
        model: as it was planned.
        inputs: keyword arguments of the model.
    """
    layers = {layer.name: layer for layer in plan.layers if layer.candidates}
    choices = {name: layer.choice for name, layer in layers.items()}
    for run in _watch(model, inputs).named_runs():
        members = [layers[name] for name in run if name in layers]
        if len(members) < 2 or not any(_stacks(layer.choice) for layer in members):
            continue
        common = set.intersection(*(set(filter(_stacks, layer.candidates)) for layer in members))
        totals = {form: sum(layer.candidates[form].times.median for layer in members) for form in common}
        best = min(totals, key=lambda form: totals[form], default=None)
        alone = sum(layer.candidates[layer.choice].times.median for layer in members)
        if best is not None and totals[best] <= 1.1 * alone:
            choices |= {layer.name: best for layer in members}
    return replace(
        plan, layers=tuple(replace(layer, choice=choices.get(layer.name, layer.choice)) for layer in plan.layers)
    )


def _stacks(choice: str) -> bool:
    """Whether a layer of a form can share a product with others."""
    return Form.named(choice).stored.structure == BLOCK


def _watch(model: nn.Module, inputs: Mapping[str, Any]) -> _Watch:
    """Run a model with an eye on each of its innermost modules; where changes in place are counted."""
    names: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)] = (*names.get(id(module), ()), name)
    watch = _Watch(names)
    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_hook(watch.note, with_kwargs=True) for module in leaves]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    watch.last = None
    return watch


def unread_between(
    model: nn.Module, inputs: Mapping[str, Any], found: Sequence[FusedActivation]
) -> tuple[FusedActivation, ...]:
    """Return the activations of which nobody else reads the input: outputs stay when it is activated at once.

    All are tried together, and each alone only if that changes something.
    """
    with torch.no_grad():
        expected = output_tensors(model(**inputs))

        def stays(some: Sequence[FusedActivation]) -> bool:
            moved = _activated_at_once(model, some)
            return largest_error(output_tensors(moved(**inputs)), expected) <= SAME

        if not found or stays(found):
            return tuple(found)
        return tuple(each for each in found if stays([each]))


def _activated_at_once(model: Model, found: Sequence[FusedActivation]) -> Model:
    """A copy around the same tensors in which layers return what their activation makes of their output."""
    moved = sharing_copy(model)
    for each in found:
        activation = model.get_submodule(each.places[0])
        for name in each.layers:
            moved.get_submodule(name).register_forward_hook(partial(_activated, activation))
        for place in each.places:
            moved.set_submodule(place, nn.Identity())
    return moved


def _activated(activation: nn.Module, module: nn.Module, arguments: Any, output: Tensor) -> Any:
    return activation.forward(output)


def fuse(model: Model, found: Fusions) -> Model:
    """Compute in one step what was found, in place; the names of all modules stay. Returns the model."""
    for each in found.activations:
        for name in each.layers:
            layer: Any = model.get_submodule(name)
            layer.activation = each.function
        for place in each.places:
            model.set_submodule(place, nn.Identity())
    for names in found.stacks:
        stack_layers(model, names)
    return model
