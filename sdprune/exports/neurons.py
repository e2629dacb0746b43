"""Empty neurons and heads leave the matrices, which become smaller and stay dense."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdprune.exports.convert import Records, convert_layers
from sdprune.exports.load import attach
from sdprune.formats.form import INT8, NARROW, Form
from sdprune.formats.pack import dense_bytes, make_record, pack, stored_bytes
from sdprune.formats.record import LayerRecord
from sdprune.formats.tag import SDPruneQuantizationConfig
from sdprune.layers.dense import Model, dense_names, pruned_weight
from sdprune.layers.forms import dense_copy, int8_names
from sdprune.masking.coupling import Coupling, find_couplings
from sdprune.masking.linears import is_conv1d


@torch.no_grad()
def compact(model: Model) -> Model:
    """Remove the empty neurons, heads, rows and columns of a model, in place; its logits stay equal up to rounding.

    A feed-forward neuron or an attention head is empty if no weight reads it: its columns of the next matrix are all
    zero. Empty neurons leave both matrices: two ordinary linear layers that are smaller. Heads, and rows and columns
    on their own, leave the matrix, while what the layer takes and returns keeps its size (`NarrowLinear`). Which rows
    feed which columns is found by probing the model, without names (`sdprune.masking.coupling`).

    `save_pretrained` writes such a model in full, with a tag by which it becomes small again on loading.

    Args:
        model: a transformers model with zeros in dense or masked layers.

    Returns:
        The model.

    Raises:
        ValueError: the model has nothing empty, has int8 layers, or cannot be probed.
    """
    for name in int8_names(model):
        raise ValueError(f"model must be in floating point, got {name!r} in int8; compact(plain_copy(model)) is")
    dense = dense_copy(model)
    couplings = find_couplings(dense)
    for coupling in couplings:
        if set(dense_names(dense)).issuperset(coupling.producers):
            _unfeed(dense, coupling)
    records = remove_neurons(dense, couplings)
    for name in dense_names(dense):
        weight = pruned_weight(dense.get_submodule(name))
        tensors = pack(weight, Form(NARROW))
        if name not in records and tensors["weight"].numel() < weight.numel():
            records[name] = _record(dense, name, tensors, Form(NARROW))
    if not records:
        raise ValueError("model must have empty neurons, heads, rows or columns; none of its linear layers has any")
    convert_layers(model, dense, records)
    attach(model, SDPruneQuantizationConfig.of(records))
    return model


def remove_neurons(
    dense: nn.Module,
    couplings: Sequence[Coupling],
    *,
    block_shapes: Sequence[tuple[int, int]] | None = None,
    int8: Collection[str] = (),
) -> Records:
    """Describe the layers that lose their empty neurons: those that no weight reads and no weight feeds.

    Args:
        dense: a model of dense layers.
        couplings: which of their rows feed which columns.
        block_shapes: neurons stay where blocks of one of these shapes, or a bit mask, store the layers in fewer bytes;
            None: they leave in any case.
        int8: layers that are stored in int8.
    """
    names = set(dense_names(dense))
    feeders = [name for coupling in couplings for name in coupling.producers]
    records: Records = {}
    for coupling in couplings:
        members = [coupling.consumer, *coupling.producers]
        once = names.issuperset(members) and all(feeders.count(name) == 1 for name in coupling.producers)
        if coupling.kind != "neuron" or not once or not _in_order(dense, coupling):
            continue
        empty = _unread(dense, coupling)
        fed = [pruned_weight(dense.get_submodule(name))[empty] for name in coupling.producers]
        if not empty.any() or any(bool(rows.any()) for rows in fed):
            continue
        left = float((~empty).sum()) / empty.numel()
        weights = [(pruned_weight(dense.get_submodule(name)), _precision(name, int8)) for name in members]
        small = left * sum(dense_bytes(*weight) for weight in weights)
        if block_shapes is None or small <= sum(_least_bytes(*weight, block_shapes) for weight in weights):
            records |= _removed(dense, coupling, int8)
    return records


def _unread(dense: nn.Module, coupling: Coupling) -> Tensor:
    """Which units no weight of the consumer reads."""
    weight = pruned_weight(dense.get_submodule(coupling.consumer))
    return ~(weight[:, coupling.columns.to(weight.device)] != 0).any(2).any(0)


def _precision(name: str, int8: Collection[str]) -> str | None:
    return INT8 if name in int8 else None


def _removed(dense: nn.Module, coupling: Coupling, int8: Collection[str]) -> Records:
    consumer = coupling.consumer
    form = Form(NARROW, precision=_precision(consumer, int8))
    tensors = pack(pruned_weight(dense.get_submodule(consumer)), form, removed="columns")
    records = {consumer: _record(dense, consumer, tensors, form, removed="columns")}
    for name in coupling.producers:
        weight, form = pruned_weight(dense.get_submodule(name)), Form(NARROW, precision=_precision(name, int8))
        narrow = pack(weight, form, removed="rows", rows=tensors["columns"])
        records[name] = _record(dense, name, narrow, form, removed="rows", consumer=consumer)
    return records


def _record(dense: nn.Module, name: str, tensors: dict[str, Tensor], form: Form, **removed: str) -> LayerRecord:
    module = dense.get_submodule(name)
    rows, columns = pruned_weight(module).shape
    return make_record(tensors, form, (rows, columns), transposed=is_conv1d(module), **removed)


def _in_order(dense: nn.Module, coupling: Coupling) -> bool:
    """Whether row i of every producer is column i of the consumer, for all of them: then no index is needed."""
    size = coupling.columns.shape[0]
    columns = coupling.columns.flatten().cpu()
    order = torch.arange(size)
    return (
        torch.equal(columns.sort().values, order)
        and pruned_weight(dense.get_submodule(coupling.consumer)).shape[1] == size
        and all(
            rows.shape[1] == 1
            and torch.equal(rows.flatten().cpu(), columns)
            and pruned_weight(dense.get_submodule(name)).shape[0] == size
            for name, rows in coupling.producers.items()
        )
    )


def _unfeed(dense: nn.Module, coupling: Coupling) -> None:
    """Zero the weights that feed units nobody reads. They are exchanged: the tensors are those of another model."""
    unread = _unread(dense, coupling)
    for name, rows in coupling.producers.items():
        module: Any = dense.get_submodule(name)
        weight = pruned_weight(module).clone()
        weight[rows.to(weight.device)[unread].flatten()] = 0
        stored = weight.T.contiguous() if is_conv1d(module) else weight
        module.weight = nn.Parameter(stored, requires_grad=module.weight.requires_grad)


def _least_bytes(weight: Tensor, precision: str | None, block_shapes: Sequence[tuple[int, int]]) -> float:
    """Of the forms that keep all neurons."""
    costs = stored_bytes(weight, block_shapes, precision=precision)
    return min([dense_bytes(weight, precision), *(cost for form, cost in costs.items() if form.structure != NARROW)])
