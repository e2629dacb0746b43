"""`Form`: how the weight of one layer is kept, in memory and on disk, with the one name that every table shows."""

import re
from dataclasses import dataclass
from typing import Any, Self

DENSE, NARROW, BLOCK, UNSTRUCTURED = "dense", "narrow", "block", "unstructured"
BLOCK_SHAPES = ((16, 16), (32, 32), (64, 32), (64, 64), (128, 32), (128, 128))


@dataclass(frozen=True)
class Form:
    """A form; `str(form)` is its name and `Form.named` reads it back.

    Args:
        structure: "dense"; "narrow", without empty rows and columns; "block", the kept blocks; or "unstructured", the
            kept values under a bit mask.
        block_shape: (out, in) of one block; None for other structures.
    """

    structure: str
    block_shape: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.structure if self.block_shape is None else f"{self.block_shape[0]}x{self.block_shape[1]}"

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
        if name in (DENSE, NARROW, UNSTRUCTURED):
            return cls(name)
        sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
        if sides is None:
            raise ValueError(f"choice must be 'dense', 'narrow' or a block shape such as '32x32', got {name!r}")
        return cls(BLOCK, (int(sides[1]), int(sides[2])))
