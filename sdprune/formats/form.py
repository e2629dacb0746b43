"""`Form`: how the weight of one layer is kept, in memory and on disk, with the one name that every table shows."""

import re
from dataclasses import dataclass
from typing import Any, Self

DENSE, NARROW, BLOCK, UNSTRUCTURED = "dense", "narrow", "block", "unstructured"
INT8 = "int8"
BLOCK_SHAPES = ((16, 16), (32, 32), (64, 32), (64, 64), (128, 32), (128, 128), (16, 4), (32, 4), (32, 1))
INT8_BLOCK = (32, 4)  # which the products of int8 matrices read, dense ones too


@dataclass(frozen=True)
class Form:
    """A form; `str(form)` is its name, such as "32x4" or "32x4-int8", and `Form.named` reads it back.

    Args:
        structure: "dense"; "narrow", without empty rows and columns; "block", the kept blocks; or "unstructured", the
            kept values under a bit mask.
        block_shape: (out, in) of one block; None for other structures.
        precision: "int8" where the values are int8 with a scale for each output row; None: as the model has them.
    """

    structure: str
    block_shape: tuple[int, int] | None = None
    precision: str | None = None

    @property
    def stored(self) -> Self:
        """The form that layers and files have: a dense int8 matrix is kept in blocks."""
        dense = self.structure == DENSE and self.precision == INT8
        return type(self)(BLOCK, INT8_BLOCK, INT8) if dense else self

    def __str__(self) -> str:
        name = self.structure if self.block_shape is None else f"{self.block_shape[0]}x{self.block_shape[1]}"
        return name if self.precision is None else f"{name}-{self.precision}"

    @classmethod
    def blocks(cls, block_shape: Any, name: str = "block_shape") -> Self:
        """Return the form of blocks of a shape; `name` is what messages call it.

        Raises:
            ValueError: not two whole numbers above 0.
        """
        sides = tuple(block_shape) if isinstance(block_shape, tuple | list) else ()
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise ValueError(f"{name} must be two whole numbers of at least 1, got {block_shape!r}")
        return cls(BLOCK, (sides[0], sides[1]))

    @classmethod
    def named(cls, name: str) -> Self:
        """Return the form of a name such as "narrow" or "32x32".

        Raises:
            ValueError: there is no such form.
        """
        structure, precision = (name.removesuffix(f"-{INT8}"), INT8) if name.endswith(f"-{INT8}") else (name, None)
        if structure in (DENSE, NARROW, UNSTRUCTURED):
            return cls(structure, precision=precision)
        sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", structure)
        if sides is None:
            raise ValueError(
                f"choice must be 'dense', 'narrow' or a block shape such as '32x32', got {name!r}; "
                f"'-{INT8}' may stand behind each"
            )
        return cls(BLOCK, (int(sides[1]), int(sides[2])), precision)
