"""`LayerRecord`: what config.json tells of one stored layer.

Each structure is a set of plain tensors. The one that holds the values is always called `weight` and never has the
shape of the dense weight, so that a loader that does not know the structure stops at the mismatch.

============ ======================== =========================================================
structure    weight                   beside it, int32
============ ======================== =========================================================
block        (blocks, out, in of one) crow_indices (block rows + 1,), col_indices (blocks,)
narrow       (kept rows, kept cols)   rows (kept rows,), columns (kept cols,)
unstructured (kept values,)           mask (out, ceil(in / 32)), the words of a `sdp_kernels.BitMask`
============ ======================== =========================================================

In int8 the values are int8, and `scales` lies beside them, float32: one for each output, of narrow layers for each kept
one. The dense weight is values * scales, computed and stored in float32 whatever the dtype of the model; packing it
again gives the same integers and scales, so that the digest is right for either file.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from sdprune.formats.form import BLOCK, INT8, NARROW, UNSTRUCTURED, Form

_KEPT_SIZES = {BLOCK: 1, NARROW: 2, UNSTRUCTURED: 1}


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
        precision: "int8", or None where the values have the dtype of the model.
    """

    structure: str
    shape: tuple[int, int]
    kept: tuple[int, ...]
    sha256: str
    block_shape: tuple[int, int] | None = None
    transposed: bool = False
    removed: str | None = None
    consumer: str | None = None
    precision: str | None = None

    @property
    def form(self) -> Form:
        """Structure, block shape and precision."""
        return Form(self.structure, self.block_shape, self.precision)

    @property
    def density(self) -> float:
        """The fraction of values that are stored."""
        return math.prod(self.weight_shape) / max(math.prod(self.shape), 1)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stored values."""
        return (*self.kept, *self.block_shape) if self.block_shape is not None else self.kept

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all stored tensors."""
        shapes = {"weight": self.weight_shape} | self.index_shapes
        if self.precision == INT8:
            shapes["scales"] = self.kept[:1] if self.structure == NARROW else self.shape[:1]
        return shapes

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
        if self.precision is not None:
            values["precision"] = self.precision
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
        known |= {"removed", "consumer", "precision"}
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
        precision = values.get("precision")
        if precision not in (None, INT8):
            raise ValueError(f"{field}.precision must be {INT8!r} where it is given, got {precision!r}")
        sides = None if block_shape is None else (block_shape[0], block_shape[1])
        record = cls(structure, (shape[0], shape[1]), kept, sha256, sides, transposed, removed, consumer, precision)
        if any(most < size for most, size in zip(_most(record), kept, strict=True)):
            raise ValueError(f"{field}.kept must be at most {list(_most(record))}, got {list(kept)}")
        density = values.get("density")
        if not isinstance(density, int | float) or not math.isclose(density, record.density, abs_tol=2e-6):
            raise ValueError(
                f"{field}.density must be {record.density:.6f}, as its other parts have it, got {density!r}"
            )
        return record


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
