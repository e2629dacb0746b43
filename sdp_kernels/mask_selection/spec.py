"""What tests and benchmarks need to know about mask selection."""

import torch

from sdp_kernels.mask_selection.op import select_mask
from sdp_kernels.mask_selection.reference import select_mask_reference
from sdp_kernels.spec import Inputs, OpSpec, Shape


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Scores of either sign with many ties."""
    scores = torch.randn(shape)
    return {"scores": torch.where(torch.rand(shape) < 0.5, scores, scores.round()).to(device, dtype)}


SPEC = OpSpec(
    name="mask_selection",
    op=select_mask,
    reference=select_mask_reference,
    inputs=_inputs,
    shapes=((8, 4), (8, 36), (40, 68)),
    bench_shapes=((768, 768), (3072, 768), (4096, 14336)),
    flops=lambda shape: 12 * shape[0] * shape[1],
    bytes=lambda shape, itemsize: 4 * shape[0] * shape[1] * itemsize,
    variants={
        "default": {"sparsity": 0.7},
        "nothing pruned": {"sparsity": 0.0},
        "blocks": {"sparsity": 0.5, "structure": "block", "block_shape": (4, 2)},
        "rows": {"sparsity": 0.3, "structure": "row"},
        "2:4": {"structure": "n:m", "n": 2, "m": 4},
    },
    kernel_module="sdp_kernels.mask_selection.kernel",
)
