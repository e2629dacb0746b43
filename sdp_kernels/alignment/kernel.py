"""The loss of all layers in two launches and their gradients in one, however many layers there are.

A table on the device holds the address, strides and shape of every layer, and a map tells each program which layer is
its own. Both are kept for the next call: while a model stays where it is, nothing is moved from the host.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdp_kernels.dispatch import is_captured, on_its_device
from sdp_kernels.masks import WORD_BITS
from sdp_kernels.spec import KernelConfig

BLOCK_ROWS, BLOCK_COLUMNS = 4, 256
BLOCK_PARTS = 4096
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# The columns of the table. Tiles are read in vectors of 16 bytes if the first seven are multiples of 16 everywhere.
WEIGHT = tl.constexpr(0)  # address
REFERENCE = tl.constexpr(1)
MASK = tl.constexpr(2)
WEIGHT_STRIDE = tl.constexpr(3)  # entries from one row to the next
REFERENCE_STRIDE = tl.constexpr(4)
MASK_STRIDE = tl.constexpr(5)
COLUMNS = tl.constexpr(6)
ROWS = tl.constexpr(7)
FIRST_ROW = tl.constexpr(8)  # rows of all layers before
FIRST_ENTRY = tl.constexpr(9)  # entries of all layers before
FIRST_PROGRAM = tl.constexpr(10)  # programs of all layers before
PROGRAMS = tl.constexpr(11)
FIELDS = tl.constexpr(12)


class Layers(NamedTuple):
    """Where all layers are, on the device."""

    table: Tensor  # (layers, FIELDS) int64
    layer_of: Tensor  # (programs,) int32
    aligned: bool


@on_its_device
def aligned_weights(
    weights: Sequence[Tensor], references: Sequence[Tensor], masks: Sequence[Tensor], cosine: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """The loss, and what its gradient needs: (rows of all layers, 2) for "cosine", (layers,) for "frobenius"."""
    layers, sizes = _prepare(weights, references, masks, cosine)
    rows = sum(weight.shape[0] for weight in weights)
    programs = layers.layer_of.shape[0]
    parts = weights[0].new_empty((programs, 2), dtype=torch.float32)
    saved = parts.new_empty((rows, 2) if cosine else (len(weights),))
    distances = parts.new_empty(len(weights))
    _rows_kernel[(programs,)](layers.table, layers.layer_of, parts, saved, eps, **sizes)
    _layers_kernel[(len(weights),)](
        layers.table, parts, saved, distances, eps, COSINE=cosine, BLOCK=BLOCK_PARTS, num_warps=8
    )
    return distances.mean(), saved


@on_its_device
def weight_gradients(
    scale: Tensor,
    weights: Sequence[Tensor],
    references: Sequence[Tensor],
    masks: Sequence[Tensor],
    saved: Tensor,
    cosine: bool,
) -> Tensor:
    """The gradients of all weights, one after the other, in the dtype of the weights; `scale` is that of the loss."""
    layers, sizes = _prepare(weights, references, masks, cosine)
    gradient = weights[0].new_empty(sum(weight.numel() for weight in weights))
    _gradient_kernel[(layers.layer_of.shape[0],)](
        scale, layers.table, layers.layer_of, saved, gradient, len(weights), **sizes
    )
    return gradient


def _prepare(
    weights: Sequence[Tensor], references: Sequence[Tensor], masks: Sequence[Tensor], cosine: bool
) -> tuple[Layers, dict[str, Any]]:
    if weights[0].is_cuda and triton.knobs.runtime.interpret:
        raise NotImplementedError("Triton's interpreter cannot follow the addresses of CUDA tensors")
    if is_captured(weights[0]):
        raise RuntimeError("aligned_weight_loss reads layers by their addresses: no CUDA graph can hold it")
    packed = bool(masks) and masks[0].dtype == torch.int32
    places = []
    for index, (weight, reference) in enumerate(zip(weights, references, strict=True)):
        mask, mask_stride = 0, 0
        if masks:
            mask, mask_stride = masks[index].data_ptr(), masks[index].stride(0) * (WORD_BITS if packed else 1)
        strides = weight.stride(0), reference.stride(0), mask_stride
        rows, columns = weight.shape
        places.append((weight.data_ptr(), reference.data_ptr(), mask, *strides, columns, rows))
    layers = _layers(tuple(places), weights[0].device)
    return layers, {
        "COSINE": cosine,
        "MASKING": "none" if not masks else "bits" if packed else "bool",
        "WEIGHT_TYPE": TYPES[weights[0].dtype],
        "REFERENCE_TYPE": TYPES[references[0].dtype],
        "ALIGNED": layers.aligned,
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_COLUMNS": BLOCK_COLUMNS,
    }


@functools.lru_cache(maxsize=8)
def _layers(places: tuple[tuple[int, ...], ...], device: torch.device) -> Layers:
    """The table of these places. It depends on nothing else, so it stays true when memory is freed and used again."""
    table = []
    first_row = first_entry = first_program = 0
    for place in places:
        columns, rows = place[-2:]
        programs = triton.cdiv(rows, BLOCK_ROWS)
        table.append((*place, first_row, first_entry, first_program, programs))
        first_row += rows
        first_entry += rows * columns
        first_program += programs
    on_host = torch.tensor(table, dtype=torch.int64)
    layer_of = torch.arange(len(places), dtype=torch.int32).repeat_interleave(on_host[:, PROGRAMS.value])
    aligned = bool((on_host[:, : ROWS.value] % 16 == 0).all())
    return Layers(on_host.to(device), layer_of.to(device), aligned)


@triton.jit
def _field(entry, FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    number = tl.load(entry + FIELD)
    if ALIGNED:
        number = tl.multiple_of(number, 16)
    return number


@triton.jit
def _address(entry, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(entry + FIELD).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _own(table, layer_of, BLOCK_ROWS: tl.constexpr):
    """The table's entry for the layer of this program, and the program's rows in it."""
    program = tl.program_id(0)
    entry = table + tl.load(layer_of + program) * FIELDS
    return entry, (program - tl.load(entry + FIRST_PROGRAM)) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)


@triton.jit
def _tile(
    entry,
    row,
    column,
    MASKING: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    REFERENCE_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """(rows, columns) weights, zeros where pruned, their references, and which are kept; zeros outside."""
    inside = (row < tl.load(entry + ROWS))[:, None] & (column < _field(entry, COLUMNS, ALIGNED))[None, :]
    weight = _address(entry, WEIGHT, WEIGHT_TYPE, ALIGNED)
    weight += row[:, None] * _field(entry, WEIGHT_STRIDE, ALIGNED) + column[None, :]
    w = tl.load(weight, mask=inside, other=0.0).to(tl.float32)
    reference = _address(entry, REFERENCE, REFERENCE_TYPE, ALIGNED)
    reference += row[:, None] * _field(entry, REFERENCE_STRIDE, ALIGNED) + column[None, :]
    v = tl.load(reference, mask=inside, other=0.0).to(tl.float32)
    keep = inside
    if MASKING == "bool":
        mask = _address(entry, MASK, tl.int8, ALIGNED)
        mask += row[:, None] * _field(entry, MASK_STRIDE, ALIGNED) + column[None, :]
        keep = tl.load(mask, mask=inside, other=0) != 0
    if MASKING == "bits":
        mask = _address(entry, MASK, tl.int32, ALIGNED)
        mask += row[:, None] * (tl.load(entry + MASK_STRIDE) // 32) + (column // 32)[None, :]
        keep = ((tl.load(mask, mask=inside, other=0) >> (column % 32)[None, :]) & 1) != 0
    if MASKING != "none":
        w = tl.where(keep, w, 0.0)  # a pruned weight may be NaN
    return w, v, keep


@triton.jit
def _rows_kernel(
    table,  # (layers, FIELDS) int64
    layer_of,  # (programs,) int32
    parts,  # (programs, 2) float32: sum of the rows' distances; or of (w - v)^2, of v^2
    saved,  # (rows of all layers, 2) float32 if COSINE: 1 / the product of the norms, cosine / the weight's square
    eps,
    COSINE: tl.constexpr,
    MASKING: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    REFERENCE_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    entry, row = _own(table, layer_of, BLOCK_ROWS)
    part = parts + 2 * tl.program_id(0)
    product = tl.zeros((BLOCK_ROWS,), tl.float32)
    w_square = tl.zeros((BLOCK_ROWS,), tl.float32)
    v_square = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, tl.load(entry + COLUMNS).to(tl.int32), BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        w, v, _ = _tile(entry, row, column, MASKING, WEIGHT_TYPE, REFERENCE_TYPE, ALIGNED)
        if COSINE:
            product += tl.sum(w * v, 1)
            w_square += tl.sum(w * w, 1)
        else:
            product += tl.sum((w - v) * (w - v), 1)
        v_square += tl.sum(v * v, 1)
    if COSINE:
        inside = row < tl.load(entry + ROWS)
        norms = tl.sqrt_rn((w_square + eps) * (v_square + eps))
        cosine = tl.div_rn(product, norms)
        tl.store(part, tl.sum(tl.where(inside, 1.0 - cosine, 0.0)))
        out = saved + 2 * (tl.load(entry + FIRST_ROW) + row)
        tl.store(out, 1.0 / norms, mask=inside)
        tl.store(out + 1, cosine / (w_square + eps), mask=inside)
    else:
        tl.store(part, tl.sum(product))
        tl.store(part + 1, tl.sum(v_square))


@triton.jit
def _layers_kernel(
    table,  # (layers, FIELDS) int64
    parts,  # (programs, 2) float32
    saved,  # (layers,) float32 unless COSINE: 1 / the sum of v^2
    distances,  # (layers,) float32
    eps,
    COSINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0)
    entry = table + layer * FIELDS
    parts += 2 * tl.load(entry + FIRST_PROGRAM)
    programs = tl.load(entry + PROGRAMS).to(tl.int32)
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        index = start + tl.arange(0, BLOCK)
        first += tl.load(parts + 2 * index, mask=index < programs, other=0.0)
        if not COSINE:
            second += tl.load(parts + 2 * index + 1, mask=index < programs, other=0.0)
    if COSINE:
        tl.store(distances + layer, tl.sum(first) / tl.load(entry + ROWS).to(tl.float32))
    else:
        inverse = 1.0 / (tl.sum(second) + eps)
        tl.store(distances + layer, tl.sum(first) * inverse)
        tl.store(saved + layer, inverse)


@triton.jit(do_not_specialize=["layers"])
def _gradient_kernel(
    scale,  # one float32: gradient of the loss
    table,  # (layers, FIELDS) int64
    layer_of,  # (programs,) int32
    saved,  # float32, as the forward left it
    gradient,  # (entries of all layers,)
    layers,
    COSINE: tl.constexpr,
    MASKING: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    REFERENCE_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    entry, row = _own(table, layer_of, BLOCK_ROWS)
    rows = tl.load(entry + ROWS)
    columns = _field(entry, COLUMNS, ALIGNED)
    gradient += _field(entry, FIRST_ENTRY, ALIGNED)
    factor = tl.load(scale) / layers
    if COSINE:
        factor = factor / rows.to(tl.float32)
        numbers = saved + 2 * (tl.load(entry + FIRST_ROW) + row)
        across = -factor * tl.load(numbers, mask=row < rows, other=0.0)[:, None]
        along = factor * tl.load(numbers + 1, mask=row < rows, other=0.0)[:, None]
    else:
        factor = 2.0 * factor * tl.load(saved + tl.load(layer_of + tl.program_id(0)))
    for start in range(0, columns.to(tl.int32), BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        w, v, keep = _tile(entry, row, column, MASKING, WEIGHT_TYPE, REFERENCE_TYPE, ALIGNED)
        slope = along * w + across * v if COSINE else factor * (w - v)
        if MASKING != "none":
            slope = tl.where(keep, slope, 0.0)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        out = gradient + row[:, None] * columns + column[None, :]
        tl.store(out, slope.to(gradient.dtype.element_ty), mask=inside)


def configurations() -> Iterator[KernelConfig]:
    """Every kernel for each pair of dtypes and kind of mask."""
    types = {"table": "*i64", "layer_of": "*i32", "eps": "fp32", "layers": "i32"}
    types |= dict.fromkeys(("parts", "saved", "distances", "scale"), "*fp32")
    pairs = (tl.float32, tl.float32), (tl.float32, tl.bfloat16), (tl.bfloat16, tl.bfloat16), (tl.float16, tl.float16)
    for cosine in (True, False):
        yield KernelConfig(_layers_kernel, types, {"COSINE": cosine, "BLOCK": BLOCK_PARTS}, num_warps=8)
        for (weight, reference), masking in itertools.product(pairs, ("none", "bool", "bits")):
            for aligned in (True, False):
                constants = {"COSINE": cosine, "MASKING": masking, "WEIGHT_TYPE": weight, "REFERENCE_TYPE": reference}
                constants |= {"ALIGNED": aligned, "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
                yield KernelConfig(_rows_kernel, types, constants)
                yield KernelConfig(_gradient_kernel, types | {"gradient": f"*{weight}"}, constants)
