"""The dense student that a pruned teacher asks for: its widths from the teacher's densities, and its first weights."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdprune.config_base import check_choice
from sdprune.recipe import INITIALIZATIONS

HEAD_SIZE_MULTIPLE = 8
_HEAD_SIZE_NAMES = ("head_dim", "d_kv")


@dataclass(frozen=True)
class Anatomy:
    """Which pruned layers of an encoder make its feed-forward network, and how its configuration says how wide that is.

    Args:
        width_name: field of the configuration that holds the feed-forward width.
        width: its value.
        feed_forward: names of the linear layers whose size follows that field.
        attention: names of the other pruned layers.
    """

    width_name: str
    width: int
    feed_forward: tuple[str, ...]
    attention: tuple[str, ...]


def anatomy(model: Any, names: Iterable[str]) -> Anatomy:
    """Tell the feed-forward layers of a model from its attention layers, whatever its configuration calls them.

    Every whole number of the configuration that is the size of a pruned layer is doubled in turn, and the model is
    built anew without memory for its weights. The feed-forward width is the one that changes pruned layers alone.

    Args:
        model: a transformers model with one feed-forward width for all layers.
        names: its pruned linear layers.

    Raises:
        ValueError: no field does that, or several do.
    """
    names = tuple(names)
    shapes = _shapes(model)
    own = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    sizes = {size for name in names for size in shapes[f"{name}.weight"]}
    fields = {key: value for key, value in model.config.to_dict().items() if type(value) is int and value in sizes}
    found = {}
    for key, value in fields.items():
        try:
            wider = _skeleton(model, {key: 2 * value})
        except (ValueError, RuntimeError, AssertionError):  # no such model: not a width of its own
            continue
        changed = {name for name, shape in _shapes(wider).items() if shapes.get(name) != shape}
        if changed and changed <= own:
            found[key] = tuple(name for name in names if f"{name}.weight" in changed)
    if len(found) != 1:
        raise ValueError(
            f"no student of {type(model).__name__} can be derived: its configuration must have one field for the "
            f"width of all feed-forward layers, found {', '.join(found) or 'none'} among "
            f"{', '.join(fields) or 'no field that is a size of a pruned layer'}"
        )
    ((key, layers),) = found.items()
    return Anatomy(key, fields[key], layers, tuple(name for name in names if name not in layers))


def student_config(teacher: Any, parts: Anatomy, *, width_multiple: int = 64) -> Any:
    """Return the configuration of a dense student with as many weights a layer as the pruned teacher kept.

    Feed-forward width: the teacher's times the density of its feed-forward matrices, rounded to `width_multiple`.
    Heads: the teacher's times the density of its attention matrices. Where the configuration holds a head size of
    its own (`head_dim`, `d_kv`) that is kept, and the attention matrices become smaller. Elsewhere (BERT, RoBERTa,
    DistilBERT, ModernBERT) the heads of a stock model always make up the hidden size: the nearest number is taken
    that divides it into heads of a multiple of 8, and the attention matrices keep their size.

    After Park and No 2021 (https://arxiv.org/abs/2109.14960), who match convolution widths layer by layer; one width
    for all layers, and heads, are a reconstruction for Transformers.

    Args:
        teacher: the pruned model, with its zeros in its weights.
        parts: of the teacher.
        width_multiple: of the feed-forward width, at most the teacher's.
    """
    config = copy.deepcopy(teacher.config)
    width = round(parts.width * _density(teacher, parts.feed_forward) / width_multiple) * width_multiple
    setattr(config, parts.width_name, min(max(width, width_multiple), parts.width))
    if parts.attention:
        heads, key_value_heads = _heads(config, _density(teacher, parts.attention))
        config.num_attention_heads = heads
        if getattr(config, "num_key_value_heads", None) is not None:
            config.num_key_value_heads = key_value_heads
    return config


def make_student(teacher: Any, parts: Anatomy, config: Any, *, initialization: str = "random") -> Any:
    """Build the student.

    Args:
        teacher: the pruned model.
        parts: of the teacher.
        config: of the student, from `student_config`.
        initialization: "random" weights, or the "largest": every tensor of the teacher's shape is copied, and of the
            feed-forward neurons (and of the heads, where their size is kept) those with the largest L1 norm over
            all coupled matrices, in their order.

    Raises:
        ValueError: an unknown initialization; or heads that share keys and values, of which none can be chosen alone.
    """
    check_choice("initialization", initialization, INITIALIZATIONS)
    student = type(teacher)(copy.deepcopy(config))
    if initialization == "largest":
        _copy_largest(teacher, student, parts)
    return student


def _heads(config: Any, density: float) -> tuple[int, int]:
    """Return the numbers of heads and of key-value heads."""
    heads = config.num_attention_heads
    wanted = density * heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if _head_size(config) is not None:
        step = 1 if groups == heads else groups
        chosen = max(step, round(wanted / step) * step)
        return chosen, chosen if groups == heads else groups
    hidden = config.hidden_size
    allowed = [
        count
        for count in range(1, heads + 1)
        if hidden % count == 0 and (hidden // count % HEAD_SIZE_MULTIPLE == 0 or count == heads)
    ]
    chosen = min(allowed, key=lambda count: (abs(count - wanted), -count))
    return chosen, chosen


def _head_size(config: Any) -> int | None:
    values = config.to_dict()
    return next((values[name] for name in _HEAD_SIZE_NAMES if values.get(name)), None)


def _density(model: nn.Module, names: Iterable[str]) -> float:
    weights = [model.get_parameter(f"{name}.weight") for name in names]
    return sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)


def _skeleton(model: Any, changes: Mapping[str, Any]) -> nn.Module:
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        skeleton: nn.Module = type(model)(config)
    return skeleton


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@torch.no_grad()
def _copy_largest(teacher: Any, student: Any, parts: Anatomy) -> None:
    old, new = dict(teacher.named_parameters()), dict(student.named_parameters())
    for name, parameter in new.items():
        if parameter.shape == old[name].shape:
            parameter.copy_(old[name])
    size = _head_size(teacher.config) or 1
    heads = teacher.config.num_attention_heads
    resized = [name for name in parts.attention if new[f"{name}.weight"].shape != old[f"{name}.weight"].shape]
    if resized and (getattr(teacher.config, "num_key_value_heads", None) or heads) != heads:
        raise ValueError(
            "initialization='largest' cannot choose among heads that share keys and values "
            f"(num_key_value_heads={teacher.config.num_key_value_heads}); use 'random'"
        )
    for names, units, unit_size in ((parts.feed_forward, parts.width, 1), (tuple(resized), heads, size)):
        for coupled in _by_block(names):
            _copy_units(old, new, coupled, units, unit_size)


def _by_block(names: Iterable[str]) -> list[list[str]]:
    """Group layers by the block of the stack that they stand in: their name up to its last number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        found = re.match(r"(.*\.\d+)\.", name)
        groups.setdefault(found[1] if found else name, []).append(name)
    return list(groups.values())


def _copy_units(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], layers: list[str], units: int, unit_size: int
) -> None:
    """Copy the largest units of coupled layers: rows of those that lead into them, columns of those that lead out.

    A layer may hold several values of every unit one after the other, as fused gates do.
    """
    axes = {
        f"{layer}.{kind}": axis
        for layer in layers
        for kind in ("weight", "bias")
        if f"{layer}.{kind}" in new
        for axis in range(new[f"{layer}.{kind}"].dim())
        if new[f"{layer}.{kind}"].shape[axis] != old[f"{layer}.{kind}"].shape[axis]
    }
    if not axes:  # the teacher's own width
        return
    norms = torch.zeros(units)
    for name, axis in axes.items():
        if name.endswith(".weight"):
            norms += old[name].abs().sum(1 - axis).cpu().view(-1, units, unit_size).sum((0, 2))
    for name, axis in axes.items():
        folds = old[name].shape[axis] // (units * unit_size)
        count = new[name].shape[axis] // (folds * unit_size)
        kept = norms.topk(count).indices.sort().values
        rows = torch.arange(folds * units * unit_size).view(folds, units, unit_size)[:, kept].flatten()
        new[name].copy_(old[name].index_select(axis, rows.to(old[name].device)))
