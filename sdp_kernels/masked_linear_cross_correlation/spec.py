"""What tests and benchmarks need to know about the cross-correlation loss of a masked linear map."""

import torch

from sdp_kernels.cross_correlation import choose_form
from sdp_kernels.masked_linear_cross_correlation.op import masked_linear_cross_correlation_loss
from sdp_kernels.masked_linear_cross_correlation.reference import masked_linear_cross_correlation_loss_reference
from sdp_kernels.spec import Inputs, OpSpec, Shape


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Shape is (batch, in, out); half of the weights are kept, and the teacher's are the dense ones."""
    batch, columns, outputs = shape
    input, weight, bias = torch.randn(batch, columns), torch.randn(outputs, columns), torch.randn(outputs)
    teacher = torch.nn.functional.linear(input, weight, bias) + 0.1 * torch.randn(batch, outputs)
    return {
        "input": input.to(device, dtype),
        "weight": weight.to(device, dtype),
        "mask": (torch.rand(outputs, columns) < 0.5).to(device),
        "teacher": teacher.to(device, dtype),
        "bias": bias.to(device, dtype),
    }


def _flops(shape: Shape) -> int:
    batch, columns, outputs = shape
    inner = batch if choose_form(batch, outputs) == "gram" else outputs
    return 6 * batch * columns * outputs + 4 * batch * outputs * inner


SPEC = OpSpec(
    name="masked_linear_cross_correlation",
    op=masked_linear_cross_correlation_loss,
    reference=masked_linear_cross_correlation_loss_reference,
    inputs=_inputs,
    shapes=((5, 4, 3), (7, 33, 20), (6, 16, 31), (33, 40, 17)),
    bench_shapes=((32, 768, 768), (2048, 768, 3072)),
    flops=_flops,
    bytes=lambda shape, itemsize: (
        itemsize * (3 * shape[1] * shape[2] + 2 * shape[0] * (shape[1] + 2 * shape[2])) + shape[1] * shape[2] // 4
    ),
    grad_args=("input", "weight", "teacher"),
    variants={
        "default": {},
        "dense gradient": {"gradient": "dense"},
        "teacher target": {"target": "teacher", "off_diagonal_weight": 0.3},
    },
    kernel_module="sdp_kernels.masked_linear.kernel",
)
