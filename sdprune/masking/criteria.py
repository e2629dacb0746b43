"""Criteria: what a weight is worth. Tensors in, scores out; a higher score is kept longer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """Score every weight by its absolute value (Han et al. 2015, https://arxiv.org/abs/1506.02626)."""
    return weight.detach().abs()


CRITERIA: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": magnitude}
