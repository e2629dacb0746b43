"""From one form of a layer to another: dense to pruned, stored tensors to what computes with them, and back."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sdp_kernels import BlockSparseMatrix
from sdprune.formats.form import BLOCK, NARROW, Form
from sdprune.formats.pack import unpack
from sdprune.formats.record import LayerRecord
from sdprune.layers.block_sparse import BlockSparseLinear
from sdprune.layers.dense import Model, dense_layer, is_plain_linear, pruned_weight, sharing_copy
from sdprune.layers.narrow import NarrowLinear, RemovedLinear
from sdprune.layers.pruned import PrunedLinear
from sdprune.masking.linears import is_conv1d, put_layer


def in_form(linear: nn.Module, form: Form) -> PrunedLinear:
    """Return a dense or masked linear layer in another form.

    Raises:
        ValueError: the form is neither narrow nor blocks.
    """
    if form.block_shape is not None:
        return BlockSparseLinear.from_linear(linear, form.block_shape)
    if form.structure != NARROW:
        raise ValueError(f"form must be 'narrow' or blocks such as '32x32', got {str(form)!r}")
    return NarrowLinear.from_linear(linear)


def make_layer(tensors: Mapping[str, Tensor], bias: nn.Parameter | None, record: LayerRecord) -> nn.Module:
    """Return the layer that computes with stored tensors: sparse, narrower, or dense where zeros are scattered.

    Args:
        tensors: checked by `sdprune.formats.pack.verify`.
        bias: (out,) or None.
        record: what they are.
    """
    if record.structure not in (BLOCK, NARROW):
        return dense_layer(unpack(tensors, record), bias, record.transposed)
    layer: PrunedLinear
    weight = nn.Parameter(tensors["weight"].detach())
    if record.block_shape is not None:
        crow, col = tensors["crow_indices"], tensors["col_indices"]
        matrix = BlockSparseMatrix(weight.detach(), crow, col, record.shape, record.block_shape)
        layer = BlockSparseLinear.from_matrix(matrix, bias)
    elif record.removed is not None:
        layer = RemovedLinear(weight, bias, tensors["rows"], tensors["columns"], record.shape)
    else:
        layer = NarrowLinear.from_parts(weight, bias, tensors, record.shape)
    layer.transposed = record.transposed
    return layer


def dense_copy(model: Model, *, keep: tuple[type[PrunedLinear], ...] = ()) -> Model:
    """Return a copy around the same tensors in which every sparse or masked layer is dense, its zeros in place.

    Args:
        model: stays as it is.
        keep: layers that stay pruned in the copy too.
    """
    copy = sharing_copy(model)
    for name, module in list(copy.named_modules()):
        masked = is_plain_linear(module) and getattr(module, "bit_mask", None) is not None
        if masked or (isinstance(module, PrunedLinear) and not isinstance(module, keep)):
            put_layer(copy, name, _dense_of(module))
    return copy


def plain_copy(model: Any) -> Any:
    """Return a model around the same tensors whose layers are all dense, zeros in place, without any tag.

    What it computes equals what `model` does, up to rounding; for tools that know only dense layers.
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


def _dense_of(module: Any) -> nn.Module:
    """The dense layer of a sparse or masked one, the bias shared; Conv1D where it was one."""
    if isinstance(module, PrunedLinear):
        return module.to_dense()
    return dense_layer(pruned_weight(module), module.bias, is_conv1d(module), module.weight.requires_grad)
