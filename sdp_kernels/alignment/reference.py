"""The aligned weight loss in plain torch; also what runs on a CPU, since autograd needs nothing else here."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sdp_kernels.checks import compute_dtype
from sdp_kernels.masks import BitMask, as_bool


def aligned_weight_loss_reference(
    weights: Sequence[Tensor],
    references: Sequence[Tensor],
    *,
    kind: Literal["cosine", "frobenius"] = "cosine",
    masks: Sequence[Tensor | BitMask] | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """Mean over layers of the distance of each weight from its reference; see `aligned_weight_loss`."""
    distance = _cosine if kind == "cosine" else _frobenius
    dtype = compute_dtype(*weights, *references)
    distances = []
    for index, (weight, reference) in enumerate(zip(weights, references, strict=True)):
        if masks is not None:
            weight = torch.where(as_bool(masks[index]), weight, 0)
        distances.append(distance(weight.to(dtype), reference.to(dtype), eps).to(weights[0].device))
    return torch.stack(distances).mean()


def _cosine(weight: Tensor, reference: Tensor, eps: float) -> Tensor:
    """Mean over rows of 1 - cos; `eps` is added to the squared norms, so a row of zeros has cosine 0."""
    norms = ((weight.square().sum(1) + eps) * (reference.square().sum(1) + eps)).sqrt()
    return (1 - (weight * reference).sum(1) / norms).mean()


def _frobenius(weight: Tensor, reference: Tensor, eps: float) -> Tensor:
    return (weight - reference).square().sum() / (reference.square().sum() + eps)
