"""What tests and benchmarks need to know about the block-sparse linear map."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdp_kernels.block_sparse_linear.matrix import BlockSparseMatrix
from sdp_kernels.block_sparse_linear.op import block_sparse_linear
from sdp_kernels.block_sparse_linear.reference import block_sparse_linear_reference
from sdp_kernels.spec import Inputs, OpSpec, Shape

DENSITY = 0.3


def _from_values(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op as a function of its tensors, because gradients are asked for by name."""

    def wrapper(input: Tensor, values: Tensor, pattern: BlockSparseMatrix, bias: Tensor, **options: Any) -> Tensor:
        return call(input, replace(pattern, values=values), bias, **options)

    return wrapper


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Shape is (tokens, in, out, block rows, block columns); about three blocks in ten are kept."""
    tokens, columns, outputs, height, width = shape
    kept = torch.rand(-(-outputs // height), -(-columns // width)) < DENSITY
    mask = kept.repeat_interleave(height, 0).repeat_interleave(width, 1)[:outputs, :columns]
    weight = torch.randn(outputs, columns)
    pattern = BlockSparseMatrix.from_dense(weight, (height, width), mask).to(device, dtype)
    return {
        "input": torch.randn(tokens, columns).to(device, dtype),
        "values": pattern.values,
        "pattern": pattern,
        "bias": torch.randn(outputs).to(device, dtype),
    }


def _kept(shape: Shape) -> int:
    return int(DENSITY * shape[1] * shape[2])


SPEC = OpSpec(
    name="block_sparse_linear",
    op=_from_values(block_sparse_linear),
    reference=_from_values(block_sparse_linear_reference),
    inputs=_inputs,
    shapes=(
        (1, 32, 48, 16, 16),
        (5, 70, 65, 16, 32),
        (3, 33, 40, 32, 16),
        (19, 128, 256, 128, 32),
        (130, 96, 100, 32, 32),
        (33, 130, 192, 64, 64),
    ),
    bench_shapes=tuple(
        (tokens, columns, outputs, *block)
        for tokens in (16, 4096)
        for columns, outputs in ((768, 3072), (3072, 768))
        for block in ((32, 32), (64, 64), (128, 32), (128, 128))
    ),
    flops=lambda shape: 6 * shape[0] * _kept(shape),
    bytes=lambda shape, itemsize: itemsize * (3 * _kept(shape) + 2 * shape[0] * (shape[1] + shape[2])),
    grad_args=("input", "values", "bias"),
    variants={"default": {}, "gelu": {"activation": "gelu"}},
    kernel_module="sdp_kernels.block_sparse_linear.kernel",
)
