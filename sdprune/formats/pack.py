"""Packing: a pruned weight to and from the tensors that store it, and whether they are the right ones."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from sdp_kernels import BitMask, BlockSparseMatrix
from sdprune.formats.form import BLOCK, BLOCK_SHAPES, DENSE, INT8, INT8_BLOCK, NARROW, UNSTRUCTURED, Form
from sdprune.formats.record import LayerRecord

WORTHWHILE = 0.9  # of the dense bytes: less is not worth another layer

Tensors = dict[str, Tensor]


def pack(weight: Tensor, form: Form, *, removed: str | None = None, rows: Tensor | None = None) -> Tensors:
    """Return the tensors that store a weight in a form; what is zero throughout is left out.

    What int8 tensors stand for packs into the very same tensors again: see `quantize_rows`.

    Args:
        weight: (out, in).
        form: any but dense, unless in int8.
        removed: of "narrow", the only side that is narrowed: "rows" or "columns"; None: both.
        rows: with removed="rows", those that stay, whether or not they hold anything.

    Raises:
        ValueError: NaN among the weights of blocks, or a value that is not finite in int8.
    """
    form = form.stored
    if form.precision == INT8:
        integers, scales = quantize_rows(weight)  # first: what becomes 0 is left out
        tensors = pack(integers.float(), replace(form, precision=None), removed=removed, rows=rows)
        scales = scales[tensors["rows"].long()] if form.structure == NARROW else scales
        return tensors | {"weight": tensors["weight"].to(torch.int8), "scales": scales}
    if form.block_shape is not None:
        matrix = BlockSparseMatrix.from_dense(weight, form.block_shape)
        return {"weight": matrix.values, "crow_indices": matrix.crow_indices, "col_indices": matrix.col_indices}
    kept = weight != 0
    if form.structure == NARROW:
        if rows is None:
            rows = (kept.any(1) | (removed == "columns")).nonzero()[:, 0]
        columns = (kept.any(0) | (removed == "rows")).nonzero()[:, 0]
        return {"weight": weight[rows.long()][:, columns], "rows": rows.int(), "columns": columns.int()}
    return {"weight": weight[kept], "mask": BitMask.from_bool(kept).words}


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight (out, in) in int8 and the scales of its rows, as `BlockSparseMatrix.quantize` makes them.

    The scale of a row that becomes 0 throughout is 1. Then integers * scales in float32, quantized again, are the same
    integers and scales to the bit: the largest L of a row has the scale s = L / 127, so that 127 * s is less than 64
    units in the last place of s away from L. Floats near L lie 128 of them apart, so that it rounds to L; or 64 just
    above a power of two, where it is at most 32 away from what it rounds to, a quarter of a unit of s.

    Raises:
        ValueError: a value is not finite.
    """
    sides = (weight.shape[0], weight.shape[1])
    matrix = BlockSparseMatrix.from_dense(weight, sides, torch.ones_like(weight, dtype=torch.bool)).quantize()
    assert matrix.scales is not None
    integers = matrix.values[0]
    return integers, torch.where((integers != 0).any(1), matrix.scales, 1.0)


def quantize_grid(weight: Tensor) -> BlockSparseMatrix:
    """Return a weight (out, in) as an int8 matrix in blocks of `INT8_BLOCK`, of which all are kept."""
    return grid_of(*quantize_rows(weight))


def grid_of(integers: Tensor, scales: Tensor) -> BlockSparseMatrix:
    """Return an int8 matrix (out, in) with the scales of its rows, in blocks of `INT8_BLOCK` that are all kept."""
    blocks = BlockSparseMatrix.from_dense(integers.float(), INT8_BLOCK, torch.ones_like(integers, dtype=torch.bool))
    indices = blocks.crow_indices, blocks.col_indices
    return BlockSparseMatrix(blocks.values.to(torch.int8), *indices, blocks.shape, INT8_BLOCK, scales=scales)


def unpack(tensors: Mapping[str, Tensor], record: LayerRecord) -> Tensor:
    """Return the dense weight (out, in) that was packed; float32 where it was packed in int8."""
    values, scales = tensors["weight"].detach(), tensors.get("scales")
    if record.block_shape is not None:
        crow, col = tensors["crow_indices"], tensors["col_indices"]
        matrix = BlockSparseMatrix(values, crow, col, record.shape, record.block_shape, scales=scales)
        return matrix.to_dense().contiguous()
    if record.structure == NARROW:
        values = values if scales is None else values * scales[:, None]
        dense = values.new_zeros(record.shape)
        dense[tensors["rows"].long()[:, None], tensors["columns"].long()] = values
        return dense
    dense = scatter(tensors, record.shape)
    return dense if scales is None else dense * scales[:, None]


def scatter(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Return the dense matrix of values that were stored under a bit mask, without their scales."""
    values = tensors["weight"].detach()
    return values.new_zeros(shape).masked_scatter_(BitMask(tensors["mask"], shape).to_bool(), values)


def make_record(
    tensors: Mapping[str, Tensor],
    form: Form,
    shape: tuple[int, int],
    *,
    transposed: bool = False,
    removed: str | None = None,
    consumer: str | None = None,
) -> LayerRecord:
    """Describe packed tensors."""
    form = form.stored
    kept = tuple(tensors["weight"].shape[: 1 if form.structure == BLOCK else 2])
    return LayerRecord(
        form.structure, shape, kept, digest(tensors), form.block_shape, transposed, removed, consumer, form.precision
    )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of tensors: names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def verify(tensors: Mapping[str, Tensor], record: LayerRecord, layer: str, file: str) -> None:
    """Check stored tensors against their record: shapes, dtypes, order of the indices, content.

    Raises:
        ValueError: they differ; the message names the file and the tensor.
    """
    for name, shape in record.shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            text = f"{file}: {layer}.{name} must have shape {shape} as config.json tells, got {tuple(tensor.shape)}"
            raise ValueError(text)
        kind = _kind(name, record)
        floats = kind == "floating-point"
        if not tensor.is_floating_point() if floats else str(tensor.dtype) != f"torch.{kind}":
            raise ValueError(f"{file}: {layer}.{name} must be {kind}, got {tensor.dtype}")
    try:
        if "scales" in record.shapes:
            _check_scales(tensors["scales"])
        _check_indices(tensors, record)
    except ValueError as error:
        raise ValueError(f"{file}: {layer}.{error}") from None
    if digest(tensors) != record.sha256:
        raise ValueError(
            f"{file}: {layer} is not what config.json describes (sha256 of {', '.join(sorted(record.shapes))} differs)"
            ": the file is damaged, or belongs to another checkpoint"
        )


def choose(
    weight: Tensor,
    block_shapes: Sequence[tuple[int, int]] = BLOCK_SHAPES,
    *,
    narrow: bool = True,
    precision: str | None = None,
) -> Form:
    """Return the form that stores a weight (out, in) in the fewest bytes, in the precision that is asked for.

    The zeros decide: blocks win where whole blocks of one of the shapes are empty, narrower matrices where rows or
    columns are, the bit mask where the zeros are scattered. Dense if none saves a tenth of the dense bytes.
    """
    costs = {Form(DENSE, precision=precision): WORTHWHILE * dense_bytes(weight, precision)}
    costs |= stored_bytes(weight, block_shapes, precision=precision)
    if not narrow:
        del costs[Form(NARROW, precision=precision)]
    return min(costs, key=lambda form: costs[form])


def dense_bytes(weight: Tensor, precision: str | None = None) -> int:
    """Return the bytes of the values of a dense weight."""
    return weight.numel() * (1 if precision == INT8 else weight.element_size())


def stored_bytes(
    weight: Tensor, block_shapes: Sequence[tuple[int, int]] = BLOCK_SHAPES, *, precision: str | None = None
) -> dict[Form, float]:
    """Return the bytes that a weight (out, in) takes in each form but the dense one."""
    kept = weight != 0
    size, (rows, columns) = 1 if precision == INT8 else weight.element_size(), weight.shape
    costs: dict[Form, float] = {
        Form(BLOCK, shape, precision): count_blocks(kept, shape) * (math.prod(shape) * size + 4)
        for shape in block_shapes
    }
    # One index or scale a row or column counts for nothing in a matrix of a size that matters.
    costs[Form(NARROW, precision=precision)] = int(kept.any(1).sum()) * int(kept.any(0).sum()) * size
    costs[Form(UNSTRUCTURED, precision=precision)] = int(kept.sum()) * size + 4 * rows * -(-columns // 32)
    return costs


def count_blocks(kept: Tensor, block_shape: tuple[int, int]) -> int:
    """Return how many blocks hold anything kept; those at the edges may stick out."""
    (rows, columns), (height, width) = kept.shape, block_shape
    padded = functional.pad(kept, (0, -columns % width, 0, -rows % height))
    grid = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    return int(grid.any(3).any(1).sum())


def _kind(name: str, record: LayerRecord) -> str:
    """The dtype of a stored tensor, in words."""
    if name == "weight":
        return "floating-point" if record.precision is None else record.precision
    return "float32" if name == "scales" else "int32"


def _check_scales(scales: Tensor) -> None:
    wrong = ~((scales > 0) & scales.isfinite())
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"scales must be finite and above 0, got {float(scales[row])} at {row}")


def kept_share(kept: Tensor, form: Form) -> float:
    """Return the fraction of the multiplications with a weight (out, in) that a form leaves, by what is not zero."""
    if form.structure == NARROW:
        return int(kept.any(1).sum()) * int(kept.any(0).sum()) / max(kept.numel(), 1)
    if form.block_shape is None:
        return 1.0
    blocks = math.prod(-(-size // side) for size, side in zip(kept.shape, form.block_shape, strict=True))
    return count_blocks(kept, form.block_shape) / max(blocks, 1)


def _check_indices(tensors: Mapping[str, Tensor], record: LayerRecord) -> None:
    """What would let a product read outside of its tensors, named without the layer."""
    if record.block_shape is not None:
        crow, col = tensors["crow_indices"], tensors["col_indices"]
        BlockSparseMatrix(tensors["weight"], crow, col, record.shape, record.block_shape, scales=tensors.get("scales"))
    elif record.structure == NARROW:
        for name, size in zip(("rows", "columns"), record.shape, strict=True):
            index = tensors[name]
            if index.numel() and (int(index[0]) < 0 or int(index[-1]) >= size or bool((index.diff() <= 0).any())):
                raise ValueError(f"{name} must rise from 0 to at most {size - 1}")
    else:
        mask = BitMask(tensors["mask"], record.shape)
        kept = mask.to_bool()
        if not mask.equal(BitMask.from_bool(kept)):
            raise ValueError("mask must be zero past the last column")
        if int(kept.sum()) != record.kept[0]:
            raise ValueError(f"mask must keep {record.kept[0]} weights, got {int(kept.sum())}")
