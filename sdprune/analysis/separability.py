"""Class separability: how far apart the classes stand in a representation."""

import torch
from torch import Tensor


def class_separability(features: Tensor, labels: Tensor) -> float:
    """Return trace(S_between) / trace(S_within), a diagnostic of self-distilled pruning (our reconstruction).

    S_between is the scatter of the class means around the mean of all rows, each class weighted by its count;
    S_within that of the rows around the mean of their class. https://arxiv.org/abs/2109.15014

    Args:
        features: (rows, dim), any float dtype; computed in float64.
        labels: (rows,), the class of every row.

    Returns:
        0 where the class means coincide, infinity where every class is a single point apart from the others, NaN
        where all rows are the same point.

    Raises:
        ValueError: the shapes do not fit, or there are fewer than two classes.
    """
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            "features must be (rows, dim) and labels (rows,), got shapes "
            f"{tuple(features.shape)} and {tuple(labels.shape)}"
        )
    classes, index = torch.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"labels must hold at least two classes, got {classes.tolist()}")
    rows = features.to(torch.float64)
    counts = index.bincount(minlength=len(classes)).to(rows.dtype)
    means = rows.new_zeros(len(classes), rows.shape[1]).index_add_(0, index, rows) / counts.unsqueeze(1)
    within = (rows - means[index]).square().sum()
    between = (counts.unsqueeze(1) * (means - rows.mean(0)).square()).sum()
    return float(between / within)
