"""What an op declares about itself, once, for the contract tests and the benchmarks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, Any]
Shape = tuple[int, ...]

DEFAULT_FLOORS: Mapping[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}


@dataclass(frozen=True)
class OpSpec:
    """An op, its definition, and the inputs to judge one by the other.

    A result is right if `max|op - ref| <= 2 * max|eager - ref| + floor * max|ref|`, where `ref` is the
    reference in float64 and `eager` the reference in the dtype of the inputs.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[Shape, torch.dtype, torch.device], Inputs]  # keyword arguments, seeded by the caller
    shapes: tuple[Shape, ...]  # small and awkward: the tests
    bench_shapes: tuple[Shape, ...]
    flops: Callable[[Shape], int]  # forward and backward, of the best algorithm
    bytes: Callable[[Shape, int], int]  # (shape, bytes an element): least memory traffic
    grad_args: tuple[str, ...] = ()
    variants: Mapping[str, Inputs] = field(default_factory=lambda: {"default": {}})
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    floors: Mapping[torch.dtype, float] = field(default_factory=lambda: DEFAULT_FLOORS)
    has_kernel: bool = False  # a Triton kernel, which the tests run in the interpreter
