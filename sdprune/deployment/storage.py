"""How a checkpoint stores a pruned weight: its kept blocks, its kept rows and columns, or kept values and a bit mask.

Each structure is a set of plain tensors. The one that holds the values is always called `weight` and never has the
shape of the dense weight, so that a loader that does not know the structure stops at the mismatch.

============ ======================== =========================================================
structure    weight                   beside it, int32
============ ======================== =========================================================
block        (blocks, out, in of one) crow_indices (block rows + 1,), col_indices (blocks,)
narrow       (kept rows, kept cols)   rows (kept rows,), columns (kept cols,)
unstructured (kept values,)           mask (out, ceil(in / 32)), the words of a `sdp_kernels.BitMask`
============ ======================== =========================================================
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from sdp_kernels import BitMask, BlockSparseMatrix
from sdprune.deployment.plan import BLOCK_SHAPES

BLOCK, NARROW, UNSTRUCTURED = "block", "narrow", "unstructured"
INDICES: Mapping[str, tuple[str, ...]] = {
    BLOCK: ("crow_indices", "col_indices"),
    NARROW: ("rows", "columns"),
    UNSTRUCTURED: ("mask",),
}
WORTHWHILE = 0.9  # of the dense bytes: less is not worth another layer
_KEPT_SIZES = {BLOCK: 1, NARROW: 2, UNSTRUCTURED: 1}

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LayerRecord:
    """What config.json tells of one stored layer, enough to find out whether the tensors beside it are its own.

    Args:
        structure: "block", "narrow" or "unstructured".
        shape: (out, in) of the dense weight.
        kept: how much is left: (blocks,), (rows, columns) or (values,).
        sha256: hexadecimal digest of the stored tensors, in the dtype of the file.
        block_shape: (out, in) of one block; None for other structures.
        transposed: whether the dense weight is stored as (in, out), as the Conv1D layers of transformers do.
        removed: of a narrow layer, whether "rows" are gone from its output or "columns" from its input, because the
            layers it is joined with do without them too; None: it takes and returns rows of full size.
        consumer: of a layer without its "rows", the layer whose columns they feed; both keep the same ones.
    """

    structure: str
    shape: tuple[int, int]
    kept: tuple[int, ...]
    sha256: str
    block_shape: tuple[int, int] | None = None
    transposed: bool = False
    removed: str | None = None
    consumer: str | None = None

    @property
    def density(self) -> float:
        """The fraction of values that are stored."""
        return math.prod(self.weight_shape) / max(math.prod(self.shape), 1)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stored values."""
        return (*self.kept, *self.block_shape) if self.block_shape is not None else self.kept

    @property
    def index_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the int32 tensors beside the values."""
        if self.block_shape is not None:
            return {"crow_indices": (-(-self.shape[0] // self.block_shape[0]) + 1,), "col_indices": self.kept}
        if self.structure == NARROW:
            return {"rows": self.kept[:1], "columns": self.kept[1:]}
        return {"mask": (self.shape[0], -(-self.shape[1] // 32))}

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads: values of JSON."""
        values: dict[str, Any] = {"structure": self.structure, "shape": list(self.shape), "kept": list(self.kept)}
        values |= {"density": round(self.density, 6), "sha256": self.sha256}
        if self.block_shape is not None:
            values["block_shape"] = list(self.block_shape)
        if self.transposed:
            values["transposed"] = True
        if self.removed is not None:
            values["removed"] = self.removed
        if self.consumer is not None:
            values["consumer"] = self.consumer
        return values

    @classmethod
    def from_dict(cls, values: Any, field: str) -> Self:
        """Check and read a record; `field` names it in errors.

        Raises:
            ValueError: a part is missing, unknown, malformed or contradicts another; the message names it.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{field} must be an object, got {values!r}")
        known = {"structure", "shape", "kept", "density", "sha256", "block_shape", "transposed"}
        known |= {"removed", "consumer"}
        for name in values.keys() - known:
            raise ValueError(f"{field} has an unknown part {name!r}; known are {', '.join(sorted(known))}")
        structure = values.get("structure")
        if structure not in _KEPT_SIZES:
            raise ValueError(f"{field}.structure must be one of {', '.join(_KEPT_SIZES)}, got {structure!r}")
        shape = _sizes(values, "shape", field, 2, 1)
        kept = _sizes(values, "kept", field, _KEPT_SIZES[structure], 0)
        block_shape = _sizes(values, "block_shape", field, 2, 1) if structure == BLOCK else None
        if structure != BLOCK and "block_shape" in values:
            raise ValueError(f"{field}.block_shape belongs to blocks only, got {values['block_shape']!r}")
        sha256 = values.get("sha256")
        if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ValueError(f"{field}.sha256 must be 64 hexadecimal digits, got {sha256!r}")
        transposed, removed = values.get("transposed", False), values.get("removed")
        if not isinstance(transposed, bool):
            raise ValueError(f"{field}.transposed must be true or false, got {transposed!r}")
        if removed not in (None, "rows", "columns") or (removed is not None and structure != NARROW):
            raise ValueError(f"{field}.removed must be 'rows' or 'columns' of a narrow layer, got {removed!r}")
        consumer = values.get("consumer")
        if (removed == "rows") != isinstance(consumer, str):
            raise ValueError(f"{field}.consumer must name a layer if and only if rows are removed, got {consumer!r}")
        sides = None if block_shape is None else (block_shape[0], block_shape[1])
        record = cls(structure, (shape[0], shape[1]), kept, sha256, sides, transposed, removed, consumer)
        if any(most < size for most, size in zip(_most(record), kept, strict=True)):
            raise ValueError(f"{field}.kept must be at most {list(_most(record))}, got {list(kept)}")
        density = values.get("density")
        if not isinstance(density, int | float) or not math.isclose(density, record.density, abs_tol=2e-6):
            raise ValueError(
                f"{field}.density must be {record.density:.6f}, as its other parts have it, got {density!r}"
            )
        return record


class StoredLinear(nn.Module):
    """A linear layer as a checkpoint stores it: to be loaded and saved, not to be called.

    Args:
        tensors: what `pack` returns; may be on the meta device.
        bias: (out,) or None.
    """

    def __init__(self, tensors: Mapping[str, Tensor], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensors["weight"])
        self.bias = bias
        self.index_names = tuple(name for name in tensors if name != "weight")
        for name in self.index_names:
            self.register_buffer(name, tensors[name])

    def tensors(self) -> Tensors:
        """Return the stored tensors."""
        return {"weight": self.weight.detach()} | {name: self.get_buffer(name) for name in self.index_names}


def pack(
    weight: Tensor,
    structure: str,
    block_shape: tuple[int, int] | None = None,
    *,
    removed: str | None = None,
    rows: Tensor | None = None,
) -> Tensors:
    """Return the tensors that store a weight in a structure; what is zero throughout is left out.

    Args:
        weight: (out, in).
        structure: "block", "narrow" or "unstructured".
        block_shape: of "block".
        removed: of "narrow", the only side that is narrowed: "rows" or "columns"; None: both.
        rows: with removed="rows", those that stay, whether or not they hold anything.
    """
    if structure == BLOCK:
        assert block_shape is not None
        matrix = BlockSparseMatrix.from_dense(weight, block_shape)
        return {"weight": matrix.values, "crow_indices": matrix.crow_indices, "col_indices": matrix.col_indices}
    kept = weight != 0
    if structure == NARROW:
        if rows is None:
            rows = (kept.any(1) | (removed == "columns")).nonzero()[:, 0]
        columns = (kept.any(0) | (removed == "rows")).nonzero()[:, 0]
        return {"weight": weight[rows.long()][:, columns], "rows": rows.int(), "columns": columns.int()}
    return {"weight": weight[kept], "mask": BitMask.from_bool(kept).words}


def unpack(tensors: Mapping[str, Tensor], record: LayerRecord) -> Tensor:
    """Return the dense weight (out, in) that was packed."""
    values = tensors["weight"].detach()
    if record.block_shape is not None:
        crow, col = tensors["crow_indices"], tensors["col_indices"]
        return BlockSparseMatrix(values, crow, col, record.shape, record.block_shape).to_dense().contiguous()
    dense = values.new_zeros(record.shape)
    if record.structure == NARROW:
        dense[tensors["rows"].long()[:, None], tensors["columns"].long()] = values
        return dense
    return dense.masked_scatter_(BitMask(tensors["mask"], record.shape).to_bool(), values)


def make_record(
    tensors: Mapping[str, Tensor],
    structure: str,
    shape: tuple[int, int],
    *,
    transposed: bool = False,
    removed: str | None = None,
    consumer: str | None = None,
) -> LayerRecord:
    """Describe packed tensors."""
    values = tensors["weight"]
    kept = tuple(values.shape[:1] if structure == BLOCK else values.shape)
    sides = (values.shape[1], values.shape[2]) if structure == BLOCK else None
    return LayerRecord(structure, shape, kept, digest(tensors), sides, transposed, removed, consumer)


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
    shapes = {"weight": record.weight_shape} | record.index_shapes
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            text = f"{file}: {layer}.{name} must have shape {shape} as config.json tells, got {tuple(tensor.shape)}"
            raise ValueError(text)
        if tensor.dtype != torch.int32 if name != "weight" else not tensor.is_floating_point():
            kind = "floating-point" if name == "weight" else "int32"
            raise ValueError(f"{file}: {layer}.{name} must be {kind}, got {tensor.dtype}")
    try:
        _check_indices(tensors, record)
    except ValueError as error:
        raise ValueError(f"{file}: {layer}.{error}") from None
    if digest(tensors) != record.sha256:
        raise ValueError(
            f"{file}: {layer} is not what config.json describes (sha256 of {', '.join(sorted(shapes))} differs): "
            "the file is damaged, or belongs to another checkpoint"
        )


def choose(
    weight: Tensor, block_shapes: Sequence[tuple[int, int]] = BLOCK_SHAPES, *, narrow: bool = True
) -> tuple[str, tuple[int, int] | None]:
    """Return the structure, and block shape, that stores a weight (out, in) in the fewest bytes.

    The zeros decide: blocks win where whole blocks of one of the shapes are empty, narrower matrices where rows or
    columns are, the bit mask where the zeros are scattered. ("", None) if none saves a tenth of the dense bytes.
    """
    costs: dict[tuple[str, tuple[int, int] | None], float] = {("", None): WORTHWHILE * weight.nbytes}
    costs |= stored_bytes(weight, block_shapes)
    if not narrow:
        del costs[NARROW, None]
    return min(costs, key=lambda form: costs[form])


def stored_bytes(
    weight: Tensor, block_shapes: Sequence[tuple[int, int]] = BLOCK_SHAPES
) -> dict[tuple[str, tuple[int, int] | None], int]:
    """Return the bytes that a weight (out, in) takes in each structure and block shape."""
    kept = weight != 0
    size, (rows, columns) = weight.element_size(), weight.shape
    costs: dict[tuple[str, tuple[int, int] | None], int] = {}
    for shape in block_shapes:
        costs[BLOCK, shape] = count_blocks(kept, shape) * (math.prod(shape) * size + 4)
    # One index a row or column counts for nothing in a matrix of a size that matters.
    costs[NARROW, None] = int(kept.any(1).sum()) * int(kept.any(0).sum()) * size
    costs[UNSTRUCTURED, None] = int(kept.sum()) * size + 4 * rows * -(-columns // 32)
    return costs


def count_blocks(kept: Tensor, block_shape: tuple[int, int]) -> int:
    """Return how many blocks hold anything kept; those at the edges may stick out."""
    (rows, columns), (height, width) = kept.shape, block_shape
    padded = nn.functional.pad(kept, (0, -columns % width, 0, -rows % height))
    grid = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    return int(grid.any(3).any(1).sum())


def _check_indices(tensors: Mapping[str, Tensor], record: LayerRecord) -> None:
    """What would let a product read outside of its tensors, named without the layer."""
    if record.block_shape is not None:
        crow, col = tensors["crow_indices"], tensors["col_indices"]
        BlockSparseMatrix(tensors["weight"], crow, col, record.shape, record.block_shape)
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


def _sizes(values: Mapping[str, Any], name: str, field: str, count: int, least: int) -> tuple[int, ...]:
    sizes = values.get(name)
    if (
        not isinstance(sizes, list | tuple)
        or len(sizes) != count
        or not all(type(size) is int and size >= least for size in sizes)
    ):
        raise ValueError(f"{field}.{name} must be {count} whole numbers of at least {least}, got {sizes!r}")
    return tuple(sizes)


def _most(record: LayerRecord) -> tuple[int, ...]:
    if record.block_shape is not None:
        return (math.prod(-(-size // side) for size, side in zip(record.shape, record.block_shape, strict=True)),)
    return record.shape if record.structure == NARROW else (math.prod(record.shape),)
