"""What tests and benchmarks need to know about the distillation losses."""

import math

import torch

from sdp_kernels.distillation.op import cosine_distance_loss, kl_divergence_loss
from sdp_kernels.distillation.reference import cosine_distance_loss_reference, kl_divergence_loss_reference
from sdp_kernels.spec import DEFAULT_FLOORS, Inputs, OpSpec, Shape

SHAPES = ((1, 1), (1, 2), (3, 5), (2, 3, 7), (33, 130))
BENCH_SHAPES = ((32, 3), (32, 128, 768), (512, 32000))


def _logits(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    teacher = 3 * torch.randn(shape)
    student = teacher + torch.randn(shape)
    return {"student_logits": student.to(device, dtype), "teacher_logits": teacher.to(device, dtype)}


def _features(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    teacher = torch.randn(shape)
    student = teacher + torch.randn(shape)
    return {"student": student.to(device, dtype), "teacher": teacher.to(device, dtype)}


KL_SPEC = OpSpec(
    name="kl_divergence",
    op=kl_divergence_loss,
    reference=kl_divergence_loss_reference,
    inputs=_logits,
    shapes=SHAPES,
    bench_shapes=BENCH_SHAPES,
    flops=lambda shape: 20 * math.prod(shape),
    bytes=lambda shape, itemsize: 3 * math.prod(shape) * itemsize,
    grad_args=("student_logits", "teacher_logits"),
    variants={"default": {}, "warm": {"temperature": 4.0}},
    # A small divergence is what remains of terms of order 1, so its error is relative to them and not to itself. On a
    # few rows eager torch, which errs as much on average, may hit the value by luck.
    floors={**DEFAULT_FLOORS, torch.float32: 1e-5},
    kernel_module="sdp_kernels.distillation.kernel",
)

COSINE_SPEC = OpSpec(
    name="cosine_distance",
    op=cosine_distance_loss,
    reference=cosine_distance_loss_reference,
    inputs=_features,
    shapes=SHAPES,
    bench_shapes=BENCH_SHAPES,
    flops=lambda shape: 12 * math.prod(shape),
    bytes=lambda shape, itemsize: 3 * math.prod(shape) * itemsize,
    grad_args=("student", "teacher"),
    kernel_module="sdp_kernels.distillation.kernel",
)
