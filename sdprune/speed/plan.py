"""Which layers are worth converting on this machine: `plan` measures, `apply` converts what won."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdp_kernels.block_sparse_linear.matrix import MOST_INPUTS
from sdprune.config import SDPruneConfig
from sdprune.formats.form import BLOCK_SHAPES, DENSE, INT8, NARROW, Form
from sdprune.formats.pack import kept_share
from sdprune.layers.dense import Model, dense_names, is_plain_linear, pruned_weight, sharing_copy
from sdprune.layers.forms import in_form
from sdprune.layers.pruned import PrunedLinear
from sdprune.masking.bare import check_bare
from sdprune.masking.layers import MaskedLinear
from sdprune.masking.linears import evaluating, is_linear, matrix, more_than_linear, put_layer
from sdprune.masking.select import select_linears
from sdprune.speed.plan_record import Candidate, LayerPlan, Plan
from sdprune.speed.timing import Times, device_name, measure

SAME_SHARE = 0.02  # of a weight: layers whose forms keep as much to within this cost the same


def plan(
    model: nn.Module,
    sample_input: Mapping[str, Any],
    *,
    block_shapes: Sequence[tuple[int, int]] = BLOCK_SHAPES,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    repeats: int = 7,
    precision: Literal["int8"] | None = None,
) -> Plan:
    """Time every pruned layer of a model in every form that its zeros allow, and choose what wins.

    A layer is pruned if its weight holds exact zeros. It is timed on the input that it gets when the model runs on
    `sample_input`, on the device and in the dtype at hand: dense; without its empty rows and columns, if it has any;
    and in blocks of each shape that leaves blocks empty. With the precision "int8" each of these is timed with int8
    values too, and layers without zeros in "dense-int8", whose results are rounded. A form wins if 80 % of its times
    lie below 80 % of those of the dense layer, one in int8, as that was asked for, if its median does; of several
    winners the one with the least median is chosen, and without one the layer stays dense. Layers of one shape of which
    every form keeps the same share, to a fiftieth, are timed once. Then the whole model is timed with the choices, and
    nothing is converted if it does not get faster. The model itself stays as it is; `apply` converts it.

    The choice depends on the number of tokens: plan with the batch and the length that the model will see.

    Args:
        model: with zeros in its `nn.Linear` or `Conv1D` layers, or in masked layers, on the device where it will run.
        sample_input: keyword arguments of the model; tensors are moved to its device.
        block_shapes: (out, in) of the blocks to try.
        target_modules: regular expressions over whole names of layers; None: every linear layer whose weight
            belongs to it alone.
        exclude_modules: regular expressions of layers to leave as they are.
        repeats: of each timing.
        precision: "int8" to try that too, on a CPU; None: values stay as they are.

    Returns:
        The plan.

    Raises:
        ValueError: no linear layer is chosen, or one that is more than linear; a block shape is malformed, or fewer
            than 3 repeats; an unknown precision, or int8 on a GPU; or the model is wrapped.
        TypeError: `sample_input` is no mapping, or the model no module.
    """
    check_bare(model)
    if not isinstance(sample_input, Mapping):
        raise TypeError(f"sample_input must be a mapping of model inputs, got {type(sample_input).__name__}")
    if repeats < 3:
        raise ValueError(f"repeats must be at least 3, got {repeats!r}")
    if precision not in (None, INT8):
        raise ValueError(f"precision must be '{INT8}' or None, got {precision!r}")
    forms = forms_to_try(block_shapes, precision)
    names = candidate_names(model, target_modules, exclude_modules)
    device = model.get_parameter(f"{names[0]}.weight").device
    if precision == INT8 and device.type != "cpu":
        raise ValueError(f"precision 'int8' needs a CPU, the model is on {device}")
    inputs = on_device(sample_input, device)
    found = choose_forms(model, inputs, names, forms, repeats)
    with evaluating(model), torch.inference_mode():
        calls: dict[str, Callable[[], Any]] = {DENSE: lambda: model(**inputs)}
        if found.choices:
            converted = apply(sharing_copy(model), found)
            calls["converted"] = lambda: converted(**inputs)
        times = measure(calls, device, repeats)
    found = replace(found, dense=times[DENSE], converted=times.get("converted"))
    slower = found.converted is not None and found.converted.median >= found.dense.median
    return found.unconverted() if slower else found


def forms_to_try(block_shapes: Sequence[tuple[int, int]], precision: str | None) -> list[Form]:
    """What a layer may become besides dense, in int8 too if that is the precision."""
    forms = [Form(NARROW), *(Form.blocks(shape, "each of block_shapes") for shape in block_shapes)]
    if precision == INT8:
        forms += [replace(form, precision=INT8) for form in (Form(DENSE), *forms)]
    return forms


def choose_forms(
    model: nn.Module, inputs: Mapping[str, Any], names: Sequence[str], forms: Sequence[Form], repeats: int
) -> Plan:
    """The plan of these layers, before the whole model is timed; `inputs` are on its device."""
    weight = model.get_parameter(f"{names[0]}.weight")
    with evaluating(model), torch.inference_mode():
        layers = _plan_layers(model, inputs, names, forms, repeats)
    return Plan(
        layers=layers,
        device=device_name(weight.device),
        dtype=str(weight.dtype).removeprefix("torch."),
        threads=torch.get_num_threads() if weight.device.type == "cpu" else None,
        torch=torch.__version__,
        dense=Times(0.0, 0.0, 0.0, 0),
        converted=None,
    )


def on_device(sample_input: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the keyword arguments with their tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in sample_input.items()}


def apply(model: Model, plan: Plan) -> Model:
    """Convert the layers that a plan converts, in place, hooks and all; all others stay the same objects.

    Logits stay equal up to rounding, to that of 8 bits where a form says int8. Give it a
    `copy.deepcopy` of a model that is still needed as it was.

    Returns:
        The model.

    Raises:
        ValueError: a layer is absent, more than linear, has another shape, or fewer zeros than when the plan was made;
            or the model is wrapped. Nothing is converted then.
        TypeError: the model is no module.
    """
    check_bare(model)
    made: dict[str, PrunedLinear] = {}
    for layer in plan.layers:
        if layer.choice == DENSE:
            continue
        made[layer.name] = in_form(_linear_named(model, layer), Form.named(layer.choice))
        density = made[layer.name].density
        if density > layer.density + 1e-6:
            raise ValueError(
                f"plan: layer {layer.name!r} keeps {density:.1%} of its weight as {layer.choice}, "
                f"but {layer.density:.1%} when the plan was made: it is of another model"
            )
    for name, form in made.items():
        put_layer(model, name, form)
    return model


def candidate_names(
    model: nn.Module, target_modules: str | Sequence[str] | None, exclude_modules: str | Sequence[str] | None
) -> list[str]:
    """The plain linear layers that the options of `plan` choose."""
    if target_modules is None:
        eligible = dense_names(model)
        if not eligible:
            raise ValueError(f"model {type(model).__name__} has no linear layer to plan for")
        target_modules = [re.escape(name) for name in eligible]
    patterns = {
        option: tuple(value) if isinstance(value, list) else value
        for option, value in (("target_modules", target_modules), ("exclude_modules", exclude_modules))
    }
    names = select_linears(model, SDPruneConfig(**patterns))  # type: ignore[arg-type]
    return [name for name in names if is_plain_linear(model.get_submodule(name))]


def _plan_layers(
    model: nn.Module,
    inputs: Mapping[str, Any],
    names: Sequence[str],
    forms: Sequence[Form],
    repeats: int,
) -> tuple[LayerPlan, ...]:
    """Run the model once and time each pruned layer when its input comes by, so that no input has to be kept."""
    plans: dict[str, LayerPlan] = {}
    timed: dict[Any, dict[str, Times]] = {}
    handles = []
    for name in names:
        layer: Any = model.get_submodule(name)
        weight = pruned_weight(layer)
        sparsity = 1.0 - int(weight.count_nonzero()) / weight.numel()
        possible = [form for form in forms if _is_possible(form, sparsity, weight.shape[1])]
        if not possible:
            continue
        plans[name] = LayerPlan(name, (weight.shape[0], weight.shape[1]), sparsity, 0, 0, DENSE, {})

        def time_it(
            module: Any, arguments: tuple[Any, ...], named: Any, name: str = name, forms: Any = possible
        ) -> None:
            known = plans[name]
            if known.calls == 0:
                rows = arguments[0] if arguments else named["input"]
                candidates = _time_forms(module, rows, forms, repeats, timed)
                known = replace(
                    known, tokens=rows.numel() // rows.shape[-1], candidates=candidates, choice=_winner(candidates)
                )
            plans[name] = replace(known, calls=known.calls + 1)

        handles.append(layer.register_forward_pre_hook(time_it, with_kwargs=True))
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(plans.values())


def _is_possible(form: Form, sparsity: float, in_features: int) -> bool:
    """Whether a layer may take a form at all; whether its zeros leave anything out shows when it is made."""
    if form.precision == INT8 and in_features > MOST_INPUTS:
        return False
    return sparsity > 0.0 or form.structure == DENSE


def _time_forms(
    linear: nn.Module, rows: Tensor, forms: Sequence[Form], repeats: int, timed: dict[Any, dict[str, Times]]
) -> dict[str, Candidate]:
    """What each form costs; `timed` holds the times of layers that cost the same, and gets those that are new."""
    weight = pruned_weight(linear)
    kept = weight != 0
    shares = {form: kept_share(kept, form) for form in forms}
    shares = {form: share for form, share in shares.items() if share < 1.0 or form.structure == DENSE}
    if not shares:
        return {}
    rounded = tuple((form, round(share / SAME_SHARE)) for form, share in shares.items())
    alike = (type(linear), weight.shape, linear.bias is None, rows.shape, rows.stride(), rounded)
    if alike not in timed:
        # Their forward methods: the hook that calls this would be called again.
        calls: dict[str, Callable[[], Any]] = {DENSE: partial(linear.forward, rows)}
        calls |= {str(form): partial(in_form(linear, form).forward, rows) for form in shares}
        timed[alike] = measure(calls, rows.device, repeats)
    named = {DENSE: 1.0} | {str(form): share for form, share in shares.items()}
    return {choice: Candidate(named[choice], times) for choice, times in timed[alike].items()}


def _winner(candidates: Mapping[str, Candidate]) -> str:
    """The fastest form whose times lie apart from those of the dense layer, or below them in an int8 asked for."""
    if not candidates:
        return DENSE
    dense = candidates[DENSE].times
    winners = {
        choice: form.times.median
        for choice, form in candidates.items()
        if form.times.p80 < dense.p20 or (Form.named(choice).precision == INT8 and form.times.median < dense.median)
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
    fault = None if isinstance(found, MaskedLinear) else more_than_linear(found)
    if fault is not None:
        raise ValueError(f"plan: layer {layer.name!r} ({type(found).__name__}) cannot be converted: {fault}")
    return found
