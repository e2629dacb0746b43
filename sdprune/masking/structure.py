"""Structures: which weights are pruned together, as arguments of `sdp_kernels.select_mask`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sdprune.config import SDPruneConfig


def selection_arguments(config: SDPruneConfig) -> dict[str, Any]:
    """Return the keyword arguments that make `select_mask` prune in the structure and scope of `config`."""
    scope = "global" if config.scope == "global" else "tensor"
    if config.structure == "block":
        return {"structure": "block", "block_shape": config.block_shape, "scope": scope}
    return {"structure": "unstructured", "scope": scope}


def check_structure(weights: Mapping[str, Tensor], config: SDPruneConfig) -> None:
    """Check that the structure fits every layer.

    Raises:
        ValueError: the block does not divide a layer, which is named.
    """
    if config.structure != "block":
        return
    for name, weight in weights.items():
        if weight.shape[0] % config.block_shape[0] or weight.shape[1] % config.block_shape[1]:
            raise ValueError(
                f"block_shape {config.block_shape} (out, in) does not divide layer {name!r} of shape "
                f"{tuple(weight.shape)}; choose another block_shape or name the layer in exclude_modules"
            )
