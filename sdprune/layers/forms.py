"""From one form of a layer to another: dense to pruned, stored tensors to what computes with them, and back."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sdp_kernels import BlockSparseMatrix
from sdprune.formats.form import BLOCK, INT8, NARROW, UNSTRUCTURED, Form
from sdprune.formats.pack import grid_of, make_record, pack, scatter, unpack
from sdprune.formats.record import LayerRecord
from sdprune.layers.block_sparse import BlockSparseLinear
from sdprune.layers.dense import Model, dense_layer, is_plain_linear, pruned_weight, sharing_copy
from sdprune.layers.narrow import NarrowInt8Linear, NarrowLinear, RemovedInt8Linear, RemovedLinear, SmallerInt8
from sdprune.layers.pruned import PrunedLinear
from sdprune.layers.stacked import StackedPart
from sdprune.masking.linears import is_conv1d, put_layer


def in_form(linear: nn.Module, form: Form) -> PrunedLinear:
    """Return a dense or masked linear layer in another form; int8 blocks are 4 wide where the form's can be split.

    Raises:
        ValueError: the form is none of blocks, narrow or dense in int8, or the weight cannot be quantized.
    """
    if form == Form(NARROW, precision=INT8):
        return NarrowLinear.from_linear(linear).quantize()
    if form.precision == INT8 and form.structure != UNSTRUCTURED:
        weight = pruned_weight(linear)
        tensors, shape = pack(weight, form), (weight.shape[0], weight.shape[1])
        record = make_record(tensors, form, shape, transposed=is_conv1d(linear))
        return make_layer(tensors, linear.bias, record).train(linear.training)  # type: ignore[arg-type, return-value]
    if form.block_shape is not None:
        return BlockSparseLinear.from_linear(linear, form.block_shape).pack()
    if form.structure != NARROW or form.precision is not None:
        raise ValueError(f"form must be 'narrow' or blocks such as '32x32', or in int8, got {str(form)!r}")
    return NarrowLinear.from_linear(linear)


def make_layer(tensors: Mapping[str, Tensor], bias: nn.Parameter | None, record: LayerRecord) -> nn.Module:
    """Return the layer that computes with stored tensors: sparse, narrower, int8, or dense where zeros are scattered.

    Args:
        tensors: checked by `sdprune.formats.pack.verify`.
        bias: (out,) or None.
        record: what they are.
    """
    if record.structure not in (BLOCK, NARROW) and record.precision is None:
        return dense_layer(unpack(tensors, record), bias, record.transposed)
    layer = _narrow(tensors, bias, record) if record.structure == NARROW else _sparse(tensors, bias, record)
    layer.transposed = record.transposed
    return layer


def _sparse(tensors: Mapping[str, Tensor], bias: nn.Parameter | None, record: LayerRecord) -> PrunedLinear:
    """Blocks as products read them; int8 values under a mask are blocks of which all are kept."""
    if record.block_shape is None:
        return BlockSparseLinear.from_matrix(grid_of(scatter(tensors, record.shape), tensors["scales"]), bias)
    crow, col, scales = tensors["crow_indices"], tensors["col_indices"], tensors.get("scales")
    values = tensors["weight"].detach()
    matrix = BlockSparseMatrix(values, crow, col, record.shape, record.block_shape, scales=scales)
    return BlockSparseLinear.from_matrix(matrix, bias).pack()


def _narrow(tensors: Mapping[str, Tensor], bias: nn.Parameter | None, record: LayerRecord) -> PrunedLinear:
    """A layer without some rows and columns; with nothing else either, it has nothing to hold in int8."""
    weight = tensors["weight"].detach()
    quantized = record.precision is not None and weight.numel() > 0
    if quantized:
        held: Any = grid_of(weight, tensors["scales"])
    else:
        held = nn.Parameter(weight if weight.is_floating_point() else weight.float())
    if record.removed is not None:
        kind = RemovedInt8Linear if quantized else RemovedLinear
        return kind(held, bias, tensors["rows"], tensors["columns"], record.shape)
    return (NarrowInt8Linear if quantized else NarrowLinear).from_parts(held, bias, tensors, record.shape)


def dense_copy(model: Model, *, keep: tuple[type[PrunedLinear], ...] = (), keep_names: Collection[str] = ()) -> Model:
    """Return a copy around the same tensors in which every sparse or masked layer is dense, its zeros in place.

    Args:
        model: stays as it is.
        keep: layers that stay pruned in the copy too, in floating point.
        keep_names: names of others that stay as they are.

    Raises:
        ValueError: the model comes from `speed_up`: in it layers do more than linear ones.
    """
    copy = sharing_copy(model)
    for name, module in list(_whole_layers(copy)):
        if isinstance(module, StackedPart) or (isinstance(module, BlockSparseLinear) and module.activation is not None):
            raise ValueError(
                f"model: layer {name!r} is computed in one step with others, as speed_up does for inference; pass the "
                "model that it was made from"
            )
        if name in keep_names:
            continue
        layer = module.dequantize() if isinstance(module, SmallerInt8) else module
        masked = is_plain_linear(layer) and getattr(layer, "bit_mask", None) is not None
        if masked or (isinstance(layer, PrunedLinear) and not isinstance(layer, keep)):
            layer = _dense_of(layer)
        if layer is not module:
            put_layer(copy, name, layer)
    return copy


def int8_names(model: nn.Module) -> list[str]:
    """Return the names of the int8 layers."""
    layers = ((name, module) for name, module in _whole_layers(model) if isinstance(module, PrunedLinear))
    return [name for name, layer in layers if not layer.weight.is_floating_point()]


def plain_copy(model: Any) -> Any:
    """Return a model around the same tensors whose layers are all dense, zeros in place, without any tag.

    What it computes equals what `model` does, up to rounding; for tools that know only dense layers. Of int8 layers the
    weights are float32, integers times scales, and inputs are no longer rounded to 8 bits.
    """
    tag = getattr(model.config, "quantization_config", None)
    dense = dense_copy(model)
    if hasattr(tag, "records"):
        del dense.config.quantization_config
        for name in ("hf_quantizer", "quantization_method"):
            if hasattr(dense, name):
                delattr(dense, name)
        dense.is_quantized = False
        for module in dense.modules():
            module_config: Any = getattr(module, "config", None)
            if hasattr(module_config, "_is_quantized"):
                del module_config._is_quantized
    return dense


def _whole_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by name, but for what pruned layers are made of."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name.startswith(inside):
            inside += (f"{name}.",) if isinstance(module, PrunedLinear) else ()
            yield name, module


def _dense_of(module: Any) -> nn.Module:
    """The dense layer of a sparse or masked one, the bias shared; Conv1D where it was one."""
    if isinstance(module, PrunedLinear):
        return module.to_dense()
    return dense_layer(pruned_weight(module), module.bias, is_conv1d(module), module.weight.requires_grad)
