"""The layers of a model as a checkpoint stores them: described, packed, put in the place of the dense ones."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sdprune.formats.form import DENSE, INT8, NARROW, Form
from sdprune.formats.pack import Tensors, choose, digest, make_record, pack
from sdprune.formats.record import LayerRecord
from sdprune.layers.dense import dense_names, pruned_weight
from sdprune.layers.forms import make_layer
from sdprune.masking.linears import is_conv1d, put_layer

Records = dict[str, LayerRecord]


class StoredLinear(nn.Module):
    """A linear layer as a checkpoint stores it: to be loaded and saved, not to be called.

    Args:
        tensors: what `pack` returns; may be on the meta device.
        bias: (out,) or None.
    """

    def __init__(self, tensors: Mapping[str, Tensor], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensors["weight"], requires_grad=tensors["weight"].is_floating_point())
        self.bias = bias
        self.buffer_names = tuple(name for name in tensors if name != "weight")
        for name in self.buffer_names:
            self.register_buffer(name, tensors[name])

    def tensors(self) -> Tensors:
        """Return the stored tensors."""
        return {"weight": self.weight.detach()} | {name: self.get_buffer(name) for name in self.buffer_names}


def find_records(
    dense: nn.Module,
    *,
    block_shapes: tuple[tuple[int, int], ...],
    choices: Mapping[str, Form] | None = None,
    int8: Collection[str] = (),
) -> Records:
    """Describe how the layers with zeros, and those in int8, of a dense model are stored.

    Args:
        dense: a model with zeros in its dense layers.
        block_shapes: (out, in) of the blocks to look for.
        choices: what a plan converts each layer into; layers that it leaves dense are stored under a bit
            mask where that saves bytes. None: the zeros decide, see `choose`.
        int8: layers that are stored in int8, whatever their form.
    """
    records: Records = {}
    for name in dense_names(dense):
        module = dense.get_submodule(name)
        weight, precision = pruned_weight(module), INT8 if name in int8 else None
        if choices is None:
            form = choose(weight, block_shapes, precision=precision)
        elif name in choices:
            form = replace(choices[name], precision=precision)
        else:
            form = choose(weight, (), narrow=False, precision=precision)
        form = form.stored
        if form.structure == DENSE:
            continue
        if bool(weight.isnan().any()):
            raise ValueError(f"layer {name!r} has NaN among its weights; a training that diverged left them")
        shape = (weight.shape[0], weight.shape[1])
        records[name] = make_record(pack(weight, form), form, shape, transposed=is_conv1d(module))
    return records


def pack_layer(dense: nn.Module, name: str, record: LayerRecord, records: Mapping[str, LayerRecord]) -> Tensors:
    """Pack the weight of a dense layer in the form that a record has."""
    rows = None
    if record.consumer is not None:
        consumer = records[record.consumer]
        weight = pruned_weight(dense.get_submodule(record.consumer))
        rows = pack(weight, Form(NARROW), removed=consumer.removed)["columns"]
    return pack(pruned_weight(dense.get_submodule(name)), record.form, removed=record.removed, rows=rows)


def renewed(dense: nn.Module, records: Mapping[str, LayerRecord]) -> Records:
    """Describe the same layers in the same forms again, as their weights are now."""
    found = {}
    for name, record in records.items():
        tensors = pack_layer(dense, name, record, records)
        kept = tuple(tensors["weight"].shape[: len(record.kept)])
        found[name] = replace(record, kept=kept, sha256=digest(tensors))
    return found


def convert_layers(model: nn.Module, dense: nn.Module, records: Mapping[str, LayerRecord]) -> None:
    """Put the layers that records describe into a model, in place, with the weights of its dense copy, or its own."""
    layers = {}
    for name, record in records.items():
        module: Any = dense.get_submodule(name)
        layers[name] = make_layer(pack_layer(dense, name, record, records), module.bias, record).train(module.training)
    for name, layer in layers.items():
        put_layer(model, name, layer)


def store(dense: nn.Module, records: Mapping[str, LayerRecord]) -> None:
    """Replace the dense layers of a model by their stored forms, in place, so that saving it writes these."""
    packed = {name: pack_layer(dense, name, record, records) for name, record in records.items()}
    for name, tensors in packed.items():
        put_layer(dense, name, StoredLinear(tensors, dense.get_submodule(name).bias))  # type: ignore[arg-type]
