"""Which pruned layers are worth converting on this machine: `plan` measures, `apply` converts what won."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sdprune.config import SDPruneConfig
from sdprune.deployment.plan_record import DENSE, NARROW, Candidate, LayerPlan, Plan
from sdprune.deployment.sparse_linear import BlockSparseLinear, NarrowLinear, pruned_weight
from sdprune.deployment.timing import Times, device_name, measure
from sdprune.masking.layers import MaskedLinear
from sdprune.masking.linears import is_conv1d, is_linear, matrix
from sdprune.masking.select import select_linears

BLOCK_SHAPES = ((16, 16), (32, 32), (64, 32), (64, 64), (128, 32), (128, 128))

Model = TypeVar("Model", bound=nn.Module)
SparseLayer = BlockSparseLinear | NarrowLinear


def plan(
    model: nn.Module,
    sample_input: Mapping[str, Any],
    *,
    block_shapes: Sequence[tuple[int, int]] = BLOCK_SHAPES,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    repeats: int = 7,
) -> Plan:
    """Time every pruned layer of a model in every form that its zeros allow, and choose what wins.

    A layer is pruned if its weight holds exact zeros. It is timed on the input that it gets when the model runs on
    `sample_input`, on the device and in the dtype at hand: dense; without its empty rows and columns, if it has any;
    and in blocks of each shape that leaves blocks empty. A form wins if 80 % of its times lie below 80 % of those of
    the dense layer; of several winners the one with the least median is chosen, and without one the layer stays
    dense. Then the whole model is timed with the choices, and nothing is converted if it does not get faster.
    The model itself stays as it is; `apply` converts it.

    The choice depends on the number of tokens: plan with the batch and the length that the model will see.

    Args:
        model: with zeros in its `nn.Linear` or `Conv1D` layers, or in masked layers, on the device where it will run.
        sample_input: keyword arguments of the model; tensors are moved to its device.
        block_shapes: (out, in) of the blocks to try.
        target_modules: regular expressions over whole names of layers; None: every linear layer whose weight
            belongs to it alone.
        exclude_modules: regular expressions of layers to leave as they are.
        repeats: of each timing.

    Returns:
        The plan.

    Raises:
        ValueError: no linear layer is chosen, a block shape is malformed, or fewer than 3 repeats.
        TypeError: `sample_input` is no mapping.
    """
    if not isinstance(sample_input, Mapping):
        raise TypeError(f"sample_input must be a mapping of model inputs, got {type(sample_input).__name__}")
    if repeats < 3:
        raise ValueError(f"repeats must be at least 3, got {repeats!r}")
    shapes = {shape_name(shape): shape for shape in block_shapes}
    names = _candidate_names(model, target_modules, exclude_modules)
    weight = model.get_parameter(f"{names[0]}.weight")
    device = weight.device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in sample_input.items()}
    with _evaluating(model), torch.inference_mode():
        layers = _plan_layers(model, inputs, names, shapes, repeats)
        found = Plan(
            layers=layers,
            device=device_name(device),
            dtype=str(weight.dtype).removeprefix("torch."),
            threads=torch.get_num_threads() if device.type == "cpu" else None,
            torch=torch.__version__,
            dense=Times(0.0, 0.0, 0.0, 0),
            converted=None,
        )
        calls: dict[str, Callable[[], Any]] = {DENSE: lambda: model(**inputs)}
        if found.choices:
            converted = apply(sharing_copy(model), found)
            calls["converted"] = lambda: converted(**inputs)
        times = measure(calls, device, repeats)
    found = replace(found, dense=times[DENSE], converted=times.get("converted"))
    if found.converted is not None and found.converted.median >= found.dense.median:
        dense_layers = tuple(replace(layer, choice=DENSE) for layer in layers)
        return replace(found, layers=dense_layers, converted=None)
    return found


def apply(model: Model, plan: Plan) -> Model:
    """Convert the layers that a plan converts, in place; all others stay the same objects.

    Logits stay equal up to rounding. Give it a `copy.deepcopy` of a model that is still needed as it was.

    Returns:
        The model.

    Raises:
        ValueError: a layer is absent, has another shape, or fewer zeros than when the plan was made. Nothing is
            converted then.
    """
    made: dict[str, SparseLayer] = {}
    for layer in plan.layers:
        if layer.choice == DENSE:
            continue
        made[layer.name] = convert(_linear_named(model, layer), layer.choice)
        density = made[layer.name].density
        if density > layer.density + 1e-6:
            raise ValueError(
                f"plan: layer {layer.name!r} keeps {density:.1%} of its weight as {layer.choice}, "
                f"but {layer.density:.1%} when the plan was made: it is of another model"
            )
    for name, form in made.items():
        model.set_submodule(name, form)
    return model


def convert(linear: nn.Module, choice: str) -> SparseLayer:
    """Return the form of a layer that a choice such as "narrow" or "32x32" names.

    Raises:
        ValueError: it names none.
    """
    if choice == NARROW:
        return NarrowLinear.from_linear(linear)
    sides = re.fullmatch(r"(\d+)x(\d+)", choice)
    if sides is None:
        raise ValueError(f"choice must be 'narrow' or a block shape such as '32x32', got {choice!r}")
    return BlockSparseLinear.from_linear(linear, (int(sides[1]), int(sides[2])))


def shape_name(block_shape: tuple[int, int]) -> str:
    """Return "32x32" for (32, 32).

    Raises:
        ValueError: not two whole numbers above 0.
    """
    whole = isinstance(block_shape, tuple | list) and len(block_shape) == 2
    if not whole or not all(isinstance(side, int) and side > 0 for side in block_shape):
        raise ValueError(f"block_shapes must hold pairs of whole numbers of at least 1, got {block_shape!r}")
    return f"{block_shape[0]}x{block_shape[1]}"


def sharing_copy(model: Model) -> Model:
    """Return a copy of the modules around the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _candidate_names(
    model: nn.Module, target_modules: str | Sequence[str] | None, exclude_modules: str | Sequence[str] | None
) -> list[str]:
    if target_modules is None:
        owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        eligible = [
            name
            for name, module in model.named_modules()
            if name and is_plain_linear(module) and owners[id(module.weight)] == 1
        ]
        if not eligible:
            raise ValueError(f"model {type(model).__name__} has no linear layer to plan for")
        target_modules = [re.escape(name) for name in eligible]
    patterns = {
        option: tuple(value) if isinstance(value, list) else value
        for option, value in (("target_modules", target_modules), ("exclude_modules", exclude_modules))
    }
    names = select_linears(model, SDPruneConfig(**patterns))  # type: ignore[arg-type]
    return [name for name in names if is_plain_linear(model.get_submodule(name))]


def is_plain_linear(module: nn.Module) -> bool:
    """Tell whether it is a linear layer, dense or masked; of other subclasses what they compute is not known."""
    return type(module) in (nn.Linear, MaskedLinear) or is_conv1d(module)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _plan_layers(
    model: nn.Module,
    inputs: Mapping[str, Any],
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, int]],
    repeats: int,
) -> tuple[LayerPlan, ...]:
    """Run the model once and time each pruned layer when its input comes by, so that no input has to be kept."""
    plans: dict[str, LayerPlan] = {}
    handles = []
    for name in names:
        layer: Any = model.get_submodule(name)
        weight = pruned_weight(layer)
        sparsity = 1.0 - int(weight.count_nonzero()) / weight.numel()
        if sparsity == 0.0:
            continue
        plans[name] = LayerPlan(name, (weight.shape[0], weight.shape[1]), sparsity, 0, 0, DENSE, {})

        def time_it(module: Any, arguments: tuple[Any, ...], name: str = name) -> None:
            known = plans[name]
            if known.calls == 0:
                rows = arguments[0]
                candidates = _time_forms(module, rows, shapes, repeats)
                known = replace(
                    known, tokens=rows.numel() // rows.shape[-1], candidates=candidates, choice=_winner(candidates)
                )
            plans[name] = replace(known, calls=known.calls + 1)

        handles.append(layer.register_forward_pre_hook(time_it))
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(plans.values())


def _time_forms(
    linear: nn.Module, rows: Tensor, shapes: Mapping[str, tuple[int, int]], repeats: int
) -> dict[str, Candidate]:
    forms: dict[str, Any] = {}
    for choice in (NARROW, *shapes):
        form = convert(linear, choice)
        if form.density < 1.0:
            forms[choice] = form
    if not forms:
        return {}
    # Their forward methods: the hook that calls this would be called again.
    calls: dict[str, Callable[[], Any]] = {DENSE: partial(linear.forward, rows)}
    calls |= {choice: partial(form.forward, rows) for choice, form in forms.items()}
    times = measure(calls, rows.device, repeats)
    return {
        choice: Candidate(forms[choice].density if choice in forms else 1.0, found) for choice, found in times.items()
    }


def _winner(candidates: Mapping[str, Candidate]) -> str:
    """The fastest form whose times lie apart from those of the dense layer."""
    winners = {
        choice: form.times.median
        for choice, form in candidates.items()
        if choice != DENSE and form.times.p80 < candidates[DENSE].times.p20
    }
    return min(winners, key=lambda choice: winners[choice]) if winners else DENSE


def _linear_named(model: nn.Module, layer: LayerPlan) -> nn.Module:
    try:
        found = model.get_submodule(layer.name)
    except AttributeError:
        raise ValueError(f"plan: the model has no layer {layer.name!r}") from None
    got = tuple(matrix(found).shape) if is_linear(found) else type(found).__name__
    if got != tuple(layer.shape):
        raise ValueError(
            f"plan: layer {layer.name!r} must be a linear layer with an (out, in) weight of {layer.shape}, got {got}"
        )
    return found
