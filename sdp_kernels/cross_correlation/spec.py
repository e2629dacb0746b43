"""What tests and benchmarks need to know about the cross-correlation loss."""

import torch

from sdp_kernels.cross_correlation.forms import choose_form
from sdp_kernels.cross_correlation.op import cross_correlation_loss
from sdp_kernels.cross_correlation.reference import cross_correlation_loss_reference
from sdp_kernels.spec import Inputs, OpSpec, Shape


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """A student near its teacher, with means of either sign: batches as they are in training."""
    teacher = torch.randn(shape) + torch.randn(shape[1])
    student = 0.7 * teacher + 0.5 * torch.randn(shape)
    return {"student": student.to(device, dtype), "teacher": teacher.to(device, dtype)}


def _flops(shape: Shape) -> int:
    batch, dim = shape
    inner = batch if choose_form(batch, dim) == "gram" else dim
    return 4 * batch * dim * inner


SPEC = OpSpec(
    name="cross_correlation",
    op=cross_correlation_loss,
    reference=cross_correlation_loss_reference,
    inputs=_inputs,
    shapes=((3, 1), (3, 5), (7, 33), (16, 31), (33, 17), (65, 40)),
    bench_shapes=((32, 768), (128, 8192), (512, 4096), (2048, 768), (2048, 2048)),
    flops=_flops,
    bytes=lambda shape, itemsize: 3 * shape[0] * shape[1] * itemsize,
    grad_args=("student", "teacher"),
    variants={
        "default": {},
        "uncentred": {"center": False, "eps": 1e-5},
        "teacher target": {"target": "teacher", "off_diagonal_weight": 0.3},
    },
    kernel_module="sdp_kernels.cross_correlation.kernel",
)
