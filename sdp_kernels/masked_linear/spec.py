"""What tests and benchmarks need to know about the masked linear map."""

import torch

from sdp_kernels.masked_linear.op import masked_linear
from sdp_kernels.masked_linear.reference import masked_linear_reference
from sdp_kernels.spec import Inputs, OpSpec, Shape


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Shape is (rows, in, out); one weight in four is kept."""
    rows, columns, outputs = shape
    return {
        "input": torch.randn(rows, columns).to(device, dtype),
        "weight": torch.randn(outputs, columns).to(device, dtype),
        "mask": (torch.rand(outputs, columns) < 0.25).to(device),
        "bias": torch.randn(outputs).to(device, dtype),
    }


SPEC = OpSpec(
    name="masked_linear",
    op=masked_linear,
    reference=masked_linear_reference,
    inputs=_inputs,
    shapes=((1, 1, 1), (3, 5, 7), (2, 32, 31), (17, 33, 65)),
    bench_shapes=((32, 768, 768), (4096, 768, 3072), (4096, 3072, 768)),
    flops=lambda shape: 6 * shape[0] * shape[1] * shape[2],
    bytes=lambda shape, itemsize: (
        itemsize * (3 * shape[1] * shape[2] + 2 * shape[0] * (shape[1] + shape[2])) + shape[1] * shape[2] // 4
    ),
    grad_args=("input", "weight", "bias"),
    variants={"default": {}, "dense gradient": {"gradient": "dense"}},
    kernel_module="sdp_kernels.masked_linear.kernel",
)
