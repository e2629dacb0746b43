"""Layers of a model to and from what a checkpoint stores: dense ones with zeros, sparse and narrower ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sdp_kernels import BlockSparseMatrix
from sdprune.deployment.plan import is_plain_linear, sharing_copy
from sdprune.deployment.sparse_linear import BlockSparseLinear, NarrowLinear, pruned_weight
from sdprune.deployment.storage import (
    BLOCK,
    NARROW,
    LayerRecord,
    StoredLinear,
    Tensors,
    choose,
    make_record,
    pack,
    unpack,
)
from sdprune.masking.linears import is_conv1d

Model = TypeVar("Model", bound=nn.Module)
Records = dict[str, LayerRecord]


class RemovedLinear(nn.Linear):
    """An ordinary, smaller `nn.Linear` that remembers which rows or columns it lost, to be saved in full again.

    Args:
        weight: (kept rows, kept columns).
        bias: (out,), also of the lost rows, or None.
        rows: (kept rows,) int32, out of all outputs.
        columns: (kept columns,) int32, out of all inputs.
        shape: (out, in) of the weight before.
    """

    rows: Tensor
    columns: Tensor
    full_bias: Tensor | None

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, rows: Tensor, columns: Tensor, shape: tuple[int, int]
    ) -> None:
        super().__init__(1, 1, bias is not None, device="meta")  # torch warns of layers without inputs or outputs
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.shape, self.transposed = shape, False
        kept = None if bias is None else nn.Parameter(bias.detach()[rows.long()], requires_grad=bias.requires_grad)
        self.bias = kept  # type: ignore[assignment]  # None where there is none, as nn.Linear has it
        self.register_buffer("full_bias", None if bias is None else bias.detach().clone(), persistent=False)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def to_linear(self) -> nn.Linear:
        """Return an `nn.Linear` of full size; what was lost is zero."""
        linear = nn.Linear(self.shape[1], self.shape[0], self.bias is not None, device="meta")
        weight = self.weight.new_zeros(self.shape)
        weight[self.rows.long()[:, None], self.columns.long()] = self.weight.detach()
        linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if self.full_bias is not None:
            bias = self.full_bias.clone()
            bias[self.rows.long()] = self.bias.detach()
            linear.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        return linear.train(self.training)


SPARSE = (BlockSparseLinear, NarrowLinear, RemovedLinear)


def dense_layer(module: Any) -> nn.Module:
    """Return the dense layer of a sparse or masked one, the bias shared; Conv1D where it was one."""
    if isinstance(module, SPARSE):
        linear = module.to_linear()
        return _linear(linear.weight.detach(), linear.bias, module.transposed, linear.weight.requires_grad)
    return _linear(pruned_weight(module), module.bias, is_conv1d(module), module.weight.requires_grad)


def dense_copy(model: Model) -> Model:
    """Return a copy around the same tensors in which every sparse or masked layer is dense, its zeros in place."""
    copy = sharing_copy(model)
    for name, module in list(copy.named_modules()):
        masked = is_plain_linear(module) and getattr(module, "bit_mask", None) is not None
        if masked or isinstance(module, SPARSE):
            copy.set_submodule(name, dense_layer(module))
    return copy


def dense_names(model: nn.Module) -> list[str]:
    """Return the names of the dense layers whose weight belongs to them alone."""
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return [
        name
        for name, module in model.named_modules()
        if name and is_plain_linear(module) and owners[id(module.weight)] == 1
    ]


def find_records(
    dense: nn.Module,
    *,
    block_shapes: tuple[tuple[int, int], ...],
    choices: Mapping[str, str] | None = None,
) -> Records:
    """Describe how the layers with zeros of a dense model are stored.

    Args:
        dense: a model with zeros in its dense layers.
        block_shapes: (out, in) of the blocks to look for.
        choices: what a plan converts, "narrow" or "32x32" by layer; layers that it leaves dense are stored under a bit
            mask where that saves bytes. None: the zeros decide, see `choose`.
    """
    records: Records = {}
    for name in dense_names(dense):
        module = dense.get_submodule(name)
        weight = pruned_weight(module)
        if choices is None:
            structure, block_shape = choose(weight, block_shapes)
        elif name in choices:
            structure, block_shape = _planned(choices[name])
        else:
            structure, block_shape = choose(weight, (), narrow=False)
        if structure:
            if bool(weight.isnan().any()):
                raise ValueError(f"layer {name!r} has NaN among its weights; a training that diverged left them")
            tensors = pack(weight, structure, block_shape)
            shape = (weight.shape[0], weight.shape[1])
            records[name] = make_record(tensors, structure, shape, transposed=is_conv1d(module))
    return records


def pack_layer(dense: nn.Module, name: str, record: LayerRecord, records: Mapping[str, LayerRecord]) -> Tensors:
    """Pack the weight of a dense layer in the form that a record has."""
    rows = None
    if record.consumer is not None:
        consumer = records[record.consumer]
        weight = pruned_weight(dense.get_submodule(record.consumer))
        rows = pack(weight, NARROW, removed=consumer.removed)["columns"]
    weight = pruned_weight(dense.get_submodule(name))
    return pack(weight, record.structure, record.block_shape, removed=record.removed, rows=rows)


def renewed(dense: nn.Module, records: Mapping[str, LayerRecord]) -> Records:
    """Describe the same layers in the same structures again, as their weights are now."""
    return {
        name: make_record(
            pack_layer(dense, name, record, records),
            record.structure,
            record.shape,
            transposed=record.transposed,
            removed=record.removed,
            consumer=record.consumer,
        )
        for name, record in records.items()
    }


def make_layer(tensors: Mapping[str, Tensor], bias: nn.Parameter | None, record: LayerRecord) -> nn.Module:
    """Return the layer that computes with stored tensors: sparse, narrower, or dense where zeros are scattered.

    Args:
        tensors: checked by `verify`.
        bias: (out,) or None.
        record: what they are.
    """
    if record.structure not in (BLOCK, NARROW):
        return _linear(unpack(tensors, record), bias, record.transposed)
    layer: BlockSparseLinear | NarrowLinear | RemovedLinear
    out_features, in_features = record.shape
    weight = nn.Parameter(tensors["weight"].detach())
    if record.block_shape is not None:
        layer = BlockSparseLinear(
            in_features, out_features, record.block_shape, record.kept[0], bias=False, device="meta"
        )
        layer.values, layer.bias = weight, bias
        layer.crow_indices, layer.col_indices = tensors["crow_indices"], tensors["col_indices"]
        layer.prepare()
    elif record.removed is not None:
        rows, columns = tensors["rows"], tensors["columns"]
        layer = RemovedLinear(weight, bias, rows, columns, record.shape)
    else:
        kept_rows, kept_columns = record.kept
        rows_or_all = tensors["rows"].long() if kept_rows < out_features else None
        columns_or_all = tensors["columns"].long() if kept_columns < in_features else None
        layer = NarrowLinear(weight, bias, columns_or_all, rows_or_all, in_features, out_features)
    layer.transposed = record.transposed
    layer.register_load_state_dict_pre_hook(partial(_take_dense, record))  # type: ignore[no-untyped-call]
    return layer


def store(dense: nn.Module, records: Mapping[str, LayerRecord]) -> None:
    """Replace the dense layers of a model by their stored forms, in place, so that saving it writes these."""
    packed = {name: pack_layer(dense, name, record, records) for name, record in records.items()}
    for name, tensors in packed.items():
        dense.set_submodule(name, StoredLinear(tensors, dense.get_submodule(name).bias))  # type: ignore[arg-type]


def _take_dense(
    record: LayerRecord,
    module: BlockSparseLinear | NarrowLinear | RemovedLinear,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Let `load_state_dict` take a dense weight, as `save_pretrained` writes it: a Trainer resumes with it."""
    weight = state_dict.get(f"{prefix}weight")
    full = record.shape[::-1] if record.transposed else record.shape
    if weight is None or tuple(weight.shape) != full:
        return
    weight = weight.T if record.transposed else weight
    if isinstance(module, BlockSparseLinear):
        matrix = BlockSparseMatrix.from_dense(weight, module.block_shape)
        same = torch.equal(matrix.crow_indices, module.crow_indices.cpu()) and torch.equal(
            matrix.col_indices, module.col_indices.cpu()
        )
        if not same:
            error_msgs.append(f"{prefix}weight has other empty blocks than this layer")
            return
        del state_dict[f"{prefix}weight"]
        state_dict |= {f"{prefix}values": matrix.values}
        state_dict |= {f"{prefix}crow_indices": matrix.crow_indices, f"{prefix}col_indices": matrix.col_indices}
        return
    rows = torch.arange(record.shape[0]) if module.rows is None else module.rows.long().cpu()
    columns = torch.arange(record.shape[1]) if module.columns is None else module.columns.long().cpu()
    narrow = weight[rows][:, columns]
    if int(narrow.count_nonzero()) != int(weight.count_nonzero()):
        error_msgs.append(f"{prefix}weight has other empty rows or columns than this layer")
        return
    state_dict[f"{prefix}weight"] = narrow
    if isinstance(module, RemovedLinear):
        if module.full_bias is not None:
            module.full_bias.copy_(state_dict[f"{prefix}bias"])
            state_dict[f"{prefix}bias"] = state_dict[f"{prefix}bias"][rows]
        return
    for name in ("rows", "columns"):
        if getattr(module, name) is not None:
            state_dict[f"{prefix}{name}"] = getattr(module, name)


def _linear(weight: Tensor, bias: nn.Parameter | None, transposed: bool, requires_grad: bool = True) -> nn.Module:
    """An `nn.Linear`, or a Conv1D, around a weight (out, in)."""
    layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    if transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            layer = Conv1D(*weight.shape)  # type: ignore[no-untyped-call]
        weight = weight.T
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=requires_grad)
    layer.bias = bias
    return layer  # type: ignore[no-any-return]


def _planned(choice: str) -> tuple[str, tuple[int, int] | None]:
    if choice == "narrow":
        return NARROW, None
    height, width = choice.split("x")
    return BLOCK, (int(height), int(width))
