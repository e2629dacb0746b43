"""What tests and benchmarks need to know about the aligned weight loss."""

from typing import Any

import torch
from torch import Tensor

from sdp_kernels.alignment.op import aligned_weight_loss
from sdp_kernels.alignment.reference import aligned_weight_loss_reference
from sdp_kernels.spec import Inputs, OpSpec, Shape


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    reference = torch.randn(shape)
    weight = reference + 0.3 * torch.randn(shape)
    mask = torch.rand(shape) < 0.5
    return {
        "weight": weight.to(device, dtype),
        "reference": reference.to(device, dtype),
        "mask": mask.to(device),
    }


def _layers(weight: Tensor, reference: Tensor, mask: Tensor) -> tuple[list[Tensor], ...]:
    """Two layers out of one: the matrix and its first row."""
    return [weight, weight[:1]], [reference, reference[:1]], [mask, mask[:1]]


def _op(weight: Tensor, reference: Tensor, mask: Tensor, **options: Any) -> Tensor:
    weights, references, masks = _layers(weight, reference, mask)
    return aligned_weight_loss(weights, references, masks=masks, **options)


def _reference(weight: Tensor, reference: Tensor, mask: Tensor, **options: Any) -> Tensor:
    weights, references, masks = _layers(weight, reference, mask)
    return aligned_weight_loss_reference(weights, references, masks=masks, **options)


SPEC = OpSpec(
    name="alignment",
    op=_op,
    reference=_reference,
    inputs=_inputs,
    shapes=((2, 2), (3, 5), (7, 33), (33, 70)),
    bench_shapes=((768, 768), (3072, 768)),
    flops=lambda shape: 18 * shape[0] * shape[1],
    bytes=lambda shape, itemsize: 5 * shape[0] * shape[1] * itemsize,
    grad_args=("weight",),
    variants={"cosine": {"kind": "cosine"}, "frobenius": {"kind": "frobenius"}},
    kernel_module="sdp_kernels.alignment.kernel",
)
