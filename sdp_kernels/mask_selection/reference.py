"""Mask selection as it is defined: sort every unit."""

import torch
from torch import Tensor


def select_mask_reference(
    scores: Tensor,
    sparsity: float | None = None,
    *,
    structure: str = "unstructured",
    block_shape: tuple[int, int] | None = None,
    n: int | None = None,
    m: int | None = None,
) -> Tensor:
    """The mask of one tensor, True where kept; blocks are scored by their sum. See `select_mask`."""
    rows, columns = scores.shape
    if structure == "n:m":
        assert n is not None
        assert m is not None
        groups = scores.reshape(-1, m)
        order = groups.sort(dim=1, descending=True, stable=True).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter(1, order[:, :n], True).view(rows, columns)
    high, wide = {"unstructured": (1, 1), "row": (1, columns)}.get(structure, block_shape or (1, 1))
    units = scores.float().view(rows // high, high, columns // wide, wide).sum((1, 3))
    order = units.flatten().sort(descending=True, stable=True).indices
    kept = units.numel() - round((sparsity or 0.0) * units.numel())
    keep = torch.zeros(units.numel(), dtype=torch.bool, device=scores.device)
    keep[order[:kept]] = True
    return keep.view(units.shape).repeat_interleave(high, 0).repeat_interleave(wide, 1)
