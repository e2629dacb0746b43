"""Zero pruned weights in place: after it, the plain dense product is the masked one, at no cost."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sdp_kernels.checks import check_floating
from sdp_kernels.dispatch import OFFERS, choose_backend
from sdp_kernels.masks import BitMask, as_bool, as_tensor, check_mask, mask_


@torch.no_grad()
def zero_(weights: Tensor | Sequence[Tensor], masks: Tensor | BitMask | Sequence[Tensor | BitMask]) -> None:
    """Set pruned weights to exactly +0.0, in place, whatever they were (NaN and inf included).

    Args:
        weights: a matrix or a sequence of matrices; parameters may require grad, no graph is made.
        masks: one mask a weight, a weight-shaped bool tensor (True where kept) or a `BitMask`.

    Raises:
        ValueError: not as many masks as weights, or shapes or devices differ.
        TypeError: a weight is not floating-point, or a mask is neither bool nor `BitMask`.
        RuntimeError: inside the capture of a CUDA graph, with weights and masks that it was not called with before.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[2.0, float("nan")]]))
        >>> zero_(weight, torch.tensor([[True, False]]))
        >>> weight.tolist()
        [[2.0, 0.0]]
    """
    weight_list = [weights] if isinstance(weights, Tensor) else list(weights)
    mask_list = [masks] if isinstance(masks, Tensor | BitMask) else list(masks)
    if len(weight_list) != len(mask_list):
        raise ValueError(f"masks must be as many as weights, {len(weight_list)}, got {len(mask_list)}")
    for index, (weight, mask) in enumerate(zip(weight_list, mask_list, strict=True)):
        check_floating(f"weights[{index}]", weight)
        check_mask(f"masks[{index}]", mask, weight)
    if weight_list and choose_backend("zero_", weight_list, OFFERS) == "triton":
        _zero_tensors_([weight.detach() for weight in weight_list], list(map(as_tensor, mask_list)))
        return
    for weight, mask in zip(weight_list, mask_list, strict=True):
        mask_(weight.detach(), as_bool(mask))


@torch.library.custom_op("sdp_kernels::zero_", mutates_args=("weights",))
def _zero_tensors_(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """All weights in one launch; an operator, so that autograd and compiled code know that they change."""
    from sdp_kernels.masked_linear.kernel_zero import zero_in_place

    zero_in_place(weights, masks)


@_zero_tensors_.register_fake
def _(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    pass
