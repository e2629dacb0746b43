"""Aligned weight regularizer: keep the rows of pruned weights pointing where the unpruned ones do.

Public function, checks, autograd, registration. One operator takes all layers: two launches make the loss and one its
gradients, however many there are. The kernels find each layer by its address, in a table that is kept while the model
stays where it is, which is why no CUDA graph can hold them. On a CPU, and where one launch cannot read all layers in
the same way, the definition in plain torch runs: autograd needs nothing else here.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sdp_kernels.alignment.reference import aligned_weight_loss_reference
from sdp_kernels.checks import check_above, check_choice, check_dims, check_pair
from sdp_kernels.dispatch import choose_backend, without_autocast
from sdp_kernels.masks import BitMask, as_bool, check_mask

OFFERS = ("triton", "reference")


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
        RuntimeError: on double backward on a GPU; while a CUDA graph is captured, whose replay would read the layers
            where they no longer are.
        ValueError: no layers, lists of different lengths, shapes or devices that differ, eps <= 0.
        TypeError: a weight is not floating-point, or a mask is neither bool nor `BitMask`.

    Example:
        >>> reference = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> mask = torch.tensor([[True, False], [True, True]])  # the first row loses its larger weight
        >>> loss = aligned_weight_loss([reference.clone().requires_grad_()], [reference], masks=[mask])
        >>> round(loss.item(), 4), loss.requires_grad
        (0.2, True)
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
    keep = _as_tensors(masks)
    against_triton = _against_triton(weights, references, keep)
    backend = choose_backend("aligned_weight_loss", [*weights, *references], OFFERS, against_triton)
    if backend == "triton":
        loss: Tensor = _aligned_weights(weights, references, keep, kind == "cosine", float(eps))[0]
        return loss
    with without_autocast(weights[0]):
        return aligned_weight_loss_reference(weights, references, kind=kind, masks=masks, eps=eps)


def _as_tensors(masks: Sequence[Tensor | BitMask] | None) -> list[Tensor]:
    """The words of packed masks, or bool tensors if the list is mixed; empty without masks."""
    if masks is None:
        return []
    if all(isinstance(mask, BitMask) for mask in masks):
        return [mask.words for mask in masks if isinstance(mask, BitMask)]
    return [as_bool(mask) for mask in masks]


def _against_triton(weights: Sequence[Tensor], references: Sequence[Tensor], masks: Sequence[Tensor]) -> list[str]:
    """What the kernels do not do: one launch reads all layers in the same way and gives gradients to weights only."""
    reasons = []
    if torch.is_grad_enabled() and any(reference.requires_grad for reference in references):
        reasons.append("a reference asks for a gradient")
    if len({weight.device for weight in weights}) > 1:
        reasons.append("the layers are on several devices")
    for name, tensors in (("weights", weights), ("references", references), ("masks", masks)):
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1:
            reasons.append(f"{name} have several dtypes, {sorted(map(str, dtypes))}")
        if any(tensor.shape[1] > 1 and tensor.stride(1) != 1 for tensor in tensors):
            reasons.append(f"{name} have rows whose entries lie apart")
    return reasons


@torch.library.custom_op("sdp_kernels::aligned_weights", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _aligned_weights(
    weights: Sequence[Tensor], references: Sequence[Tensor], masks: Sequence[Tensor], cosine: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """The loss, and what its gradient is made from; `masks` is empty, all bool, or all words of a `BitMask`."""
    from sdp_kernels.alignment.kernel import aligned_weights

    return aligned_weights(weights, references, masks, cosine, eps)


@_aligned_weights.register_fake
def _(
    weights: Sequence[Tensor], references: Sequence[Tensor], masks: Sequence[Tensor], cosine: bool, eps: float
) -> tuple[Tensor, Tensor]:
    saved = (sum(weight.shape[0] for weight in weights), 2) if cosine else (len(weights),)
    return weights[0].new_empty((), dtype=torch.float32), weights[0].new_empty(saved, dtype=torch.float32)


@torch.library.custom_op("sdp_kernels::aligned_weights_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _aligned_weights_backward(
    scale: Tensor,
    weights: Sequence[Tensor],
    references: Sequence[Tensor],
    masks: Sequence[Tensor],
    saved: Tensor,
    cosine: bool,
) -> Tensor:
    """The gradients of all weights, one after the other, in the dtype of the weights."""
    from sdp_kernels.alignment.kernel import weight_gradients

    return weight_gradients(scale, weights, references, masks, saved, cosine)


@_aligned_weights_backward.register_fake
def _(scale: Tensor, weights: Sequence[Tensor], *others: Any) -> Tensor:
    return weights[0].new_empty(sum(weight.numel() for weight in weights))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weights, references, masks, ctx.cosine, _ = inputs
    saved = (*weights, *references, *masks, output[1])  # references may come from inference mode
    ctx.save_for_backward(*(each.clone() if each.is_inference() else each for each in saved))
    ctx.layers = len(weights)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, scale: Tensor | None, _: None) -> tuple[list[Tensor] | list[None] | None, ...]:
    *layers, saved = ctx.saved_tensors
    weights, references, masks = layers[: ctx.layers], layers[ctx.layers : 2 * ctx.layers], layers[2 * ctx.layers :]
    none = [None] * len(references), [None] * len(masks), None, None
    if scale is None:  # the loss reaches nothing that is differentiated
        return [None] * len(weights), *none
    flat = _aligned_weights_backward(scale, weights, references, masks, saved, ctx.cosine)
    parts = flat.split([weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)], *none


_aligned_weights.register_autograd(_gradients, setup_context=_save)
