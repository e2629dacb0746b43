"""`speed_up`: the fastest copy of a model for inference on this machine, measured and compared with the model."""

import copy
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdp_kernels.cpu_engine import availability
from sdprune.formats.form import BLOCK_SHAPES
from sdprune.formats.pack import count_blocks
from sdprune.layers.dense import Model, dense_layer, dense_names, pruned_weight, sharing_copy
from sdprune.layers.forms import dense_copy, int8_names
from sdprune.layers.narrow import RemovedLinear
from sdprune.layers.pruned import PrunedLinear
from sdprune.masking.bare import check_bare
from sdprune.masking.linears import is_linear, put_layer
from sdprune.masking.select import matching
from sdprune.speed.attention import with_blocked_attention
from sdprune.speed.compare import FLOORS, Outputs, describe_move, largest_error, output_tensors
from sdprune.speed.fuse import Fusions, agree, find_fusions, fuse, unread_between
from sdprune.speed.plan import apply, candidate_names, choose_forms, forms_to_try, on_device
from sdprune.speed.plan_record import Plan
from sdprune.speed.timing import Times, measure

PRECISIONS = ("float32", "int8", "bfloat16")
MOST_MOVED = 0.1  # of the largest magnitude of an output, by int8: more is a fault and no rounding
REPEATS = 7
LITTLE_MORE = 1.3  # times the weights: on a CPU the shape of a block changes the speed of a weight by less

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpeedUp:
    """What `speed_up` did to a model, kept as `model.sped_up`; `print` shows it.

    Args:
        precision: as it was asked for.
        plan: the form of every layer, with its times; None where no layer was there to plan.
        fusions: what is computed in one step.
        before: milliseconds of a forward pass of the model given.
        after: of the model returned.
        moved: how far the outputs moved, in words.
    """

    precision: str
    plan: Plan | None
    fusions: Fusions
    before: Times
    after: Times
    moved: str

    @property
    def speedup(self) -> float:
        """Time of the model given over that of the model returned."""
        return self.before.median / self.after.median

    def __str__(self) -> str:
        forms = sorted((self.plan.choices if self.plan else {}).values())
        counts = ", ".join(f"{forms.count(form)} {form}" for form in dict.fromkeys(forms)) or "none"
        return (
            f"{self.speedup:.2f} times as fast ({self.before.median:.2f} -> {self.after.median:.2f} ms); "
            f"layers converted: {counts}; {self.fusions}; {self.precision}: {self.moved}"
        )


def speed_up(
    model: Model,
    sample_input: Mapping[str, Any],
    *,
    precision: Literal["float32", "int8", "bfloat16"] = "float32",
    keep: str | Sequence[str] | None = None,
) -> Model:
    """Return the fastest copy of a model for inference on this machine that its zeros and a precision allow.

    Every linear layer is timed in the forms that its zeros allow (`sdprune.plan`), on the input that it gets when the
    model runs on `sample_input`, and takes the fastest; activations are computed with the product before them, and
    layers that get the same input (query, key and value) as one product. The outputs on the sample are compared with
    those of the model given, and both are timed: if nothing is faster, the copy is one of the model as it is.

    The copy is in evaluation mode and its parameters take no gradient. What was done, how long it takes and how far the
    outputs moved stands in `copy.sped_up` (`SpeedUp`) and is logged. The copy can be pickled and copied; `export` takes
    the model that it was made from. The choice depends on the number of tokens and of threads: give a sample of the
    batch and length that the model will see, with several rows, and as many threads.

    Args:
        model: any module, with zeros in its linear layers, masked, sparse or int8 layers, or without any. It stays as
            it is. Sparse layers are planned anew; those in int8 stay.
        sample_input: keyword arguments of the model; tensors are moved to its device.
        precision: "float32": in the dtype that the model has, equal up to rounding. "int8", on a CPU: layers whose
            product of 8-bit integers is the fastest take it. "bfloat16": weights and activations in bfloat16, inputs
            are converted.
        keep: regular expressions over whole names of layers that stay as they are, in their dtype too.

    Returns:
        The copy.

    Raises:
        ValueError: an unknown precision, or int8 on a GPU; `keep` matches no layer; the model does not take
            `sample_input`, or returns NaN or no floating-point tensor for it; it has no linear layer, is wrapped, or
            comes from `speed_up`; a weight cannot be quantized.
        RuntimeError: the outputs moved further than the precision explains: 1e-4 of their largest magnitude in
            float32, in bfloat16 twice as far as those of the plain model in bfloat16 plus 0.02, and 0.1 in int8.
        TypeError: the model is no module, or `sample_input` no mapping.
    """
    kept, device = _checked(model, sample_input, precision, keep)
    inputs = on_device(sample_input, device)
    # parameters shared, buffers not: a model may change them as it runs
    given = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).eval()
    expected = _first_outputs(given, inputs)
    base = _plannable(given, kept, precision)
    converted, made = _converted(base, inputs, kept, precision)
    found = _outputs(converted, inputs)
    error, floor = largest_error(found, expected), FLOORS[_dtype_name(base)]
    plain = largest_error(_outputs(base, inputs), expected) if precision == "bfloat16" else 0.0
    _check_error(error, MOST_MOVED if precision == "int8" else floor + 2 * plain, precision)
    del base  # dense where the model given may be sparse
    fused, fusions = _fused(converted, inputs, kept, expected, floor + 2 * error)
    models = {"given": given, "converted": converted, "fused": fused}
    attending = _attending(fused, inputs, expected, floor + 2 * error)
    if attending is not None:
        models["attending"] = attending
    with torch.inference_mode():
        times = measure({name: partial(each, **inputs) for name, each in models.items()}, device, REPEATS)
    # what is computed in one step does less: only a clear loss speaks against it, and noise does not
    fastest = "converted" if times["fused"].p20 > times["converted"].p80 else "fused"
    if attending is not None and times["attending"].median < times[fastest].median:
        fastest, fusions = "attending", replace(fusions, attention=True)
    if times[fastest].median >= times["given"].median:
        fastest = "given"
    moved = describe_move(_outputs(models[fastest], inputs), expected)
    if made is not None:
        made = replace(made, dense=times["given"], converted=times["converted"] if made.choices else None)
        made = made.unconverted() if fastest == "given" else made
    fusions = fusions if fastest in ("fused", "attending") else Fusions()
    result: Any = _own_copy(models[fastest], model)
    result.sped_up = SpeedUp(precision, made, fusions, times["given"], times[fastest], moved)
    if fastest == "given":
        logger.warning("nothing is faster than the model given in %s: a copy of it is returned", precision)
    logger.info("%s", result.sped_up)
    return result  # type: ignore[no-any-return]


def _checked(
    model: Any, sample_input: Any, precision: Any, keep: str | Sequence[str] | None
) -> tuple[frozenset[str], torch.device]:
    """The names of the layers to keep, and where the model is."""
    check_bare(model)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not isinstance(sample_input, Mapping):
        raise TypeError(f"sample_input must be a mapping of model inputs, got {type(sample_input).__name__}")
    linears = {
        name: module
        for name, module in model.named_modules()
        if name and (is_linear(module) or isinstance(module, PrunedLinear))
    }
    if not linears:
        raise ValueError(f"model {type(model).__name__} has no linear layer to speed up")
    kept = () if keep is None else matching("keep", keep if isinstance(keep, str) else tuple(keep), list(linears))
    device = next(iter(linears.values())).weight.device
    if precision == "int8" and device.type != "cpu":
        raise ValueError(f"precision 'int8' needs a CPU, the model is on {device}")
    compiled = availability.is_compiled(torch.float32)
    if precision == "int8" and not compiled:
        logger.warning("int8 products are plain torch without numba, and hardly faster: pip install 'sdprune[cpu]'")
    if precision == "bfloat16" and device.type == "cpu" and compiled and not availability.multiplies_bfloat16():
        logger.warning("this CPU has no instructions for bfloat16: products convert it")
    return frozenset(kept), device


def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        return output_tensors(model(**inputs))


def _first_outputs(given: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        expected = _outputs(given, inputs)
    except Exception as error:
        raise ValueError(
            f"sample_input does not fit the model {type(given).__name__}: {type(error).__name__}: {error}"
        ) from error
    if not expected:
        raise ValueError(f"the model {type(given).__name__} returns no floating-point tensor to compare")
    for name, tensor in expected.items():
        if tensor.isnan().any():
            raise ValueError(f"the model {type(given).__name__} returns NaN in {name} on sample_input")
    return expected


def _plannable(given: Model, kept: frozenset[str], precision: str) -> Model:
    """A copy in the dtype of the precision, in which sparse and masked layers are dense again; int8 ones stay."""
    base = dense_copy(given, keep=(RemovedLinear,), keep_names=kept.union(int8_names(given)))
    for name, module in list(base.named_modules()):
        if isinstance(module, RemovedLinear) and name not in kept:  # what it lost nobody asks for in inference
            put_layer(base, name, dense_layer(module.weight.detach(), module.bias, False))
    if precision != "bfloat16":
        return base
    base = copy.deepcopy(base).to(torch.bfloat16)
    base.register_forward_pre_hook(_to_bfloat16, with_kwargs=True)
    for name in kept:
        layer: Any = copy.deepcopy(given.get_submodule(name))
        if not layer.weight.is_floating_point():
            continue
        layer.register_forward_pre_hook(_to_own_dtype)
        layer.register_forward_hook(_back_to_bfloat16)
        base.set_submodule(name, layer)
    return base


def _to_bfloat16(
    module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(map(_cast, arguments)), {name: _cast(value) for name, value in named.items()}


def _cast(value: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _to_own_dtype(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_cast(value, module.weight.dtype) for value in arguments)


def _back_to_bfloat16(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return output.to(torch.bfloat16)


def _converted(
    base: Model, inputs: Mapping[str, Any], kept: frozenset[str], precision: str
) -> tuple[Model, Plan | None]:
    names = [re.escape(name) for name in dense_names(base) if name not in kept]
    if not names:
        return base, None
    # on a copy: what a model keeps of a pass of its own is of no use outside of torch.inference_mode
    forms = forms_to_try(_leanest(base), precision)
    made = choose_forms(sharing_copy(base), inputs, candidate_names(base, names, None), forms, REPEATS)
    made = agree(made, base, inputs)
    return apply(sharing_copy(base), made), made


def _leanest(base: nn.Module) -> tuple[tuple[int, int], ...]:
    """The block shapes that may win: on a CPU those that keep little more than the one that keeps the least."""
    weights = [pruned_weight(base.get_submodule(name)) for name in dense_names(base)]
    if weights and weights[0].device.type != "cpu":
        return BLOCK_SHAPES
    kept = [weight != 0 for weight in weights]
    sizes = {shape: sum(count_blocks(each, shape) * math.prod(shape) for each in kept) for shape in BLOCK_SHAPES}
    return tuple(shape for shape, size in sizes.items() if size <= LITTLE_MORE * min(sizes.values()))


def _dtype_name(model: nn.Module) -> str:
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    dtype = next(dtypes, torch.float32)
    return str(dtype).removeprefix("torch.")


def _check_error(error: float, allowed: float, precision: str) -> None:
    if not error <= allowed:
        raise RuntimeError(
            f"the outputs of the converted model differ by {error:.2g} of their largest magnitude, {precision} allows "
            f"{allowed:.2g}: name sensitive layers in keep, or take another precision"
        )


def _fused(
    model: Model, inputs: Mapping[str, Any], kept: frozenset[str], expected: Outputs, allowed: float
) -> tuple[Model, Fusions]:
    """The model with as much computed in one step as leaves its outputs what they are."""
    found = find_fusions(model, inputs, kept)
    joined = unread_between(model, inputs, found.activations)
    if joined != found.activations:
        logger.info("an activation stays apart, because its input is read elsewhere too")
    for tried in (Fusions(joined, found.stacks), Fusions(joined), Fusions(stacks=found.stacks)):
        if tried == Fusions():
            continue
        fused = fuse(sharing_copy(model), tried)
        try:
            error = largest_error(_outputs(fused, inputs), expected)
        except RuntimeError as problem:  # rows of a shared product are no tensor of their own, which some views need
            logger.info("not computed in one step (%s): %s", tried, problem)
            continue
        if error <= allowed:
            return fused, tried
        logger.warning("not computed in one step (%s): outputs differ by %.2g, %.2g is allowed", tried, error, allowed)
    return model, Fusions()


def _attending(model: Model, inputs: Mapping[str, Any], expected: Outputs, allowed: float) -> Model | None:
    """The model with its attention on the compiled engine, if it has one that leaves its outputs what they are."""
    made = with_blocked_attention(model)
    if made is None:
        return None
    error = largest_error(_outputs(made, inputs), expected)
    if error <= allowed:
        return made
    logger.warning("attention stays torch's: outputs differ by %.2g, %.2g is allowed", error, allowed)
    return None


def _own_copy(made: Model, given: nn.Module) -> Model:
    """A copy that shares no memory with the model given, around the tensors that are its own already."""
    theirs = {tensor.untyped_storage().data_ptr() for tensor in (*given.parameters(), *given.buffers())}
    own = [
        tensor for tensor in (*made.parameters(), *made.buffers()) if tensor.untyped_storage().data_ptr() not in theirs
    ]
    return copy.deepcopy(made, {id(tensor): tensor for tensor in own}).requires_grad_(False)
