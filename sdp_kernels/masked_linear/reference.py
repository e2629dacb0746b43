"""The masked linear map as it is defined; its gradients are those of autograd."""

from typing import Literal

import torch
from torch import Tensor

from sdp_kernels.masks import BitMask, as_bool


def masked_linear_reference(
    input: Tensor,
    weight: Tensor,
    mask: Tensor | BitMask,
    bias: Tensor | None = None,
    *,
    gradient: Literal["masked", "dense"] = "masked",
    block_gate: Tensor | None = None,
) -> Tensor:
    """F.linear with the pruned weights replaced by 0; see `masked_linear`."""
    used = torch.where(as_bool(mask), weight, 0)
    if gradient == "dense":
        used = used.detach() + (weight - weight.detach())
    if block_gate is not None:
        rows, columns = (size // blocks for size, blocks in zip(weight.shape, block_gate.shape, strict=True))
        gate = block_gate.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        used = used + weight.detach() * (gate - gate.detach())
    return torch.nn.functional.linear(input, used, bias)


def zero_reference(weight: Tensor, mask: Tensor | BitMask) -> Tensor:
    """A copy of the weight with +0.0 where it is pruned."""
    return torch.where(as_bool(mask), weight.detach(), 0)
