"""What an op declares about itself, once, for the contract tests and the benchmarks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, Any]
Shape = tuple[int, ...]

# Triton's names of the dtypes that kernels take.
TRITON_NAMES: Mapping[torch.dtype, str] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
DEFAULT_FLOORS: Mapping[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}


@dataclass(frozen=True)
class KernelConfig:
    """One way in which a Triton kernel is launched: what it takes to compile it without a device."""

    kernel: Any  # the function under @triton.jit
    types: Mapping[str, str]  # Triton's type of each argument that is not constant: "*bf16", "i32", "fp32"
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False  # it multiplies matrices and must use the matrix instruction of the device
    exact: bool = False  # its quotients and roots must be rounded as IEEE 754 says


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
    kernel_module: str | None = None  # holds the Triton kernels and `configurations()`, which lists how they launch
