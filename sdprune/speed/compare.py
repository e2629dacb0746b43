"""How far the outputs of two models lie apart, and how far they may."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

FLOORS = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3}  # errors add up over the layers
FLOORS["float64"] = FLOORS["float32"]  # some products go through float32

Outputs = Mapping[str, Tensor]


def output_tensors(output: Any) -> dict[str, Tensor]:
    """Return the floating-point tensors of what a model returns by name, such as "logits" or "hidden_states[2]".

    They are found in mappings (as transformers' outputs are), lists and tuples, however deep; one alone is "output".
    Lone numbers, such as a loss, count only where there is nothing else: a small loss moves far by little.
    """
    found = {name or "output": tensor for name, tensor in _walk(output, "") if tensor.is_floating_point()}
    return {name: tensor for name, tensor in found.items() if tensor.dim()} or found


def _walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _walk(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _walk(part, f"{name or 'output'}[{index}]")


def largest_error(found: Outputs, expected: Outputs) -> float:
    """Return the largest difference over all tensors, each relative to the largest finite magnitude expected in it.

    NaN anywhere gives NaN, whether expected or not; other infinite values than expected give infinity, and so do other
    names or shapes.
    """
    if {name: tensor.shape for name, tensor in found.items()} != {
        name: tensor.shape for name, tensor in expected.items()
    }:
        return torch.inf
    errors = [_error(found[name], tensor) for name, tensor in expected.items() if tensor.numel()]
    return next((error for error in errors if error != error), max(errors, default=0.0))


def _error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    if bool(found.isnan().any() | expected.isnan().any()):
        return torch.nan
    magnitude = expected.abs().masked_fill(expected.isinf(), 0).amax()
    return float(_difference(found, expected) / magnitude.clamp_min(1e-30))


def _difference(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).abs().masked_fill(found == expected, 0).amax()  # infinite ones too


def describe_move(found: Outputs, expected: Outputs) -> str:
    """Say how far the logits moved, and in how many rows another class is the largest; else of the first output."""
    name = "logits" if "logits" in expected else next(iter(expected))
    after, before = found[name].double(), expected[name].double()
    if not before.numel():
        return f"{name} is empty"
    share = _error(after, before)
    text = f"{name} moved by at most {float(_difference(after, before)):.2g} ({share:.2%} of the largest)"
    if name != "logits" or before.dim() < 2 or before.shape[-1] < 2:
        return text
    changed = after.argmax(-1) != before.argmax(-1)
    return f"{text}, the largest class changed in {int(changed.sum())} of {changed.numel()} rows"
