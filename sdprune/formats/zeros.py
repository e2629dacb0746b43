"""Which structure the zeros of a matrix have."""

import torch
from torch import Tensor

SIDES = (1, 4, 8, 16, 32, 64, 128)
LEAST = 16  # weights of a block: smaller ones are full or empty by chance
GROUPS = (4, 8, 16)
SLACK = 1e-3  # of the kept blocks' weights may be zero by chance, as small values are in half precision
INT8_SLACK = 0.05  # in int8: what is below 1/254 of the largest value of its row


def structure_of(kept: Tensor, slack: float = SLACK) -> str:
    """Name the structure of a mask, True where a weight is kept; `slack` of what is kept may be missing.

    Returns:
        "dense" without zeros; "empty" without anything else; "rows", "columns" or "rows and columns" if the zeros are
        whole rows and columns; "32x32" and the like for the largest blocks that are each empty or full; "2:4" and the
        like if every group of 4, 8 or 16 neighbours in a row keeps as many; otherwise "unstructured".
    """
    count = int(kept.sum())
    if count == kept.numel():
        return "dense"
    if count == 0:
        return "empty"
    rows, columns = kept.any(1), kept.any(0)
    if _full(count, int(rows.sum()) * int(columns.sum()), slack):
        sides = [name for name, alive in (("rows", rows), ("columns", columns)) if not bool(alive.all())]
        return " and ".join(sides) or "dense"
    shapes = list(_full_blocks(kept, count, slack))
    if shapes:
        height, width = max(shapes, key=lambda shape: (shape[0] * shape[1], shape[0]))
        return f"{height}x{width}"
    for size in GROUPS:
        if kept.shape[1] % size == 0:
            groups = kept.view(kept.shape[0], -1, size).sum(2)
            if torch.equal(groups, groups[:1, :1].expand_as(groups)):
                return f"{int(groups[0, 0])}:{size}"
    return "unstructured"


def _full(count: int, covered: int, slack: float) -> bool:
    return count >= (1.0 - slack) * covered


def _full_blocks(kept: Tensor, count: int, slack: float) -> list[tuple[int, int]]:
    """Return the shapes of blocks that divide the matrix and are each empty or full."""
    found = []
    for height in SIDES:
        if kept.shape[0] % height:
            break
        tall = kept.view(-1, height, kept.shape[1]).any(1)
        for width in SIDES:
            if kept.shape[1] % width:
                break
            blocks = tall.view(tall.shape[0], -1, width).any(2)
            if not _full(count, int(blocks.sum()) * height * width, slack):
                break  # wider blocks cover more zeros still
            if height * width >= LEAST:
                found.append((height, width))
    return found
