"""Aligned weight regularizer: keep the rows of pruned weights pointing where the unpruned ones do."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sdp_kernels.alignment.reference import aligned_weight_loss_reference
from sdp_kernels.checks import check_above, check_choice, check_dims, check_pair
from sdp_kernels.dispatch import choose_backend
from sdp_kernels.masked_linear.bitmask import BitMask
from sdp_kernels.masked_linear.op import check_mask

OFFERS = ("reference",)


def aligned_weight_loss(
    weights: Sequence[Tensor],
    references: Sequence[Tensor],
    *,
    kind: Literal["cosine", "frobenius"] = "cosine",
    masks: Sequence[Tensor | BitMask] | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """Distance of pruned weights from the unpruned ones, averaged over layers.

    "cosine" is the mean over the rows of a layer of 1 - <w, v> / (|w| |v|); "frobenius" is the sum of
    (w - v)^2 divided by the sum of v^2. The paper, Findings of ACL 2022,
    https://aclanthology.org/2022.findings-acl.267, names both regularizers; these formulas are our
    reconstruction of them.

    Args:
        weights: matrices (out, in), one a layer, any float dtype.
        references: the unpruned weights, of the same shapes; get a gradient if they ask for one.
        kind: "cosine" or "frobenius".
        masks: one mask a layer, a weight-shaped bool tensor (True where kept) or a `BitMask`: pruned weights
            count as 0 and get no gradient. None if the weights hold their zeros already.
        eps: above 0; added to the sums of squares that are divided by. A row of zeros has cosine 0.

    Returns:
        A scalar, float32 (float64 if an input is), also under autocast.

    Raises:
        ValueError: no layers, lists of different lengths, shapes or devices that differ, eps <= 0.
        TypeError: a weight is not floating-point, or a mask is neither bool nor `BitMask`.
    """
    check_choice("kind", kind, ("cosine", "frobenius"))
    check_above("eps", eps, 0)
    if len(weights) == 0:
        raise ValueError("weights must have at least one layer, got none")
    for name, others in (("references", references), ("masks", masks)):
        if others is not None and len(others) != len(weights):
            raise ValueError(f"{name} must be as many as weights, {len(weights)}, got {len(others)}")
    for index, (weight, reference) in enumerate(zip(weights, references, strict=True)):
        check_pair(weight, reference, f"weights[{index}]", f"references[{index}]")
        check_dims(f"weights[{index}]", weight, 2)
        if weight.numel() == 0:
            raise ValueError(f"weights[{index}] must have entries, got shape {tuple(weight.shape)}")
        if masks is not None:
            check_mask(f"masks[{index}]", masks[index], weight)
    choose_backend("aligned_weight_loss", [*weights, *references], OFFERS)
    with torch.autocast(weights[0].device.type, enabled=False):
        return aligned_weight_loss_reference(weights, references, kind=kind, masks=masks, eps=eps)
