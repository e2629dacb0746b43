"""What a benchmark is: a grid of shapes and dtypes, and the contenders that compute the same on them."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdp_kernels.spec import DEFAULT_FLOORS, Inputs, OpSpec, Shape

Call = Callable[[], Any]

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
MATMUL_PRECISIONS = {"fp32": "highest", "tf32": "high", "bf16": "highest"}


@dataclass(frozen=True)
class Contender:
    """One way to compute what a grid asks for."""

    prepare: Callable[[Inputs], Call]  # does what is not timed and returns the call that is
    # Whether a CUDA graph can hold the call: not one that waits for the device or reads what only the host knows. It is
    # declared, because a capture that fails harms the process (https://github.com/pytorch/pytorch/pull/180395).
    captured: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    own: Callable[[Inputs], Inputs] | None = None  # other values of the same sizes, where it cannot take any

    def __call__(self, inputs: Inputs) -> Call:
        """What `prepare` returns."""
        return self.prepare(inputs)


class Work(NamedTuple):
    """What one forward and backward costs."""

    flops: int
    bytes: int  # moved
    memory: int  # bytes held at once


class Case(NamedTuple):
    """One point of a grid."""

    shape: Shape
    dtype: str
    priority: int  # 0 is the most telling


def _gate_floors() -> Mapping[str, float]:
    """TF32 keeps as many bits as fp16; the sums of fp32 products are longer than those of the contract tests."""
    return {"fp32": 1e-5, "tf32": DEFAULT_FLOORS[torch.float16], "bf16": DEFAULT_FLOORS[torch.bfloat16]}


@dataclass(frozen=True)
class Grid:
    """An op, the inputs it is tried on and who it is compared with.

    A result of ours is right if it errs, relative to the largest value, at most twice as much as `reference` does in
    the dtype of the case, plus a floor. A baseline must only be near enough to compute the same thing.
    """

    name: str
    shapes: tuple[Shape, ...]  # the most telling first
    inputs: Callable[[Shape, torch.dtype, torch.device], Inputs]
    reference: Callable[..., Any]  # judges the others; called with float64 inputs for the truth
    contenders: Callable[[], Mapping[str, Contender]]  # "ours" is one of them
    bound: Callable[[Shape, int], Work]  # (shape, bytes an element): what any implementation needs
    heaviest: Callable[[Shape], Work]  # of the reference in float64: what a case needs
    grad_args: tuple[str, ...] = ()  # inputs that get a gradient
    telling: int | None = None  # how many shapes, from the first, are tried in every dtype; the others in the first one
    # The same inputs on the meta device, where `inputs` cannot make them there because it looks at values.
    outlines: Callable[[Shape, torch.dtype], Inputs] | None = None
    launching: tuple[str, ...] = ("ours",)  # contenders that launch kernels of sdp_kernels
    dtypes: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"cpu": ("fp32",), "cuda": ("bf16", "fp32", "tf32")}
    )
    floors: Mapping[str, float] = field(default_factory=_gate_floors)

    def cases(self, device_type: str) -> Iterator[Case]:
        """Every shape in the first dtype and the telling ones in every one, with their priorities."""
        for rank, shape in enumerate(self.shapes):
            in_all = self.telling is None or rank < self.telling
            dtypes = self.dtypes[device_type]
            for offset, dtype in enumerate(dtypes if in_all else dtypes[:1]):
                yield Case(shape, dtype, rank + offset)

    def smallest(self, device_type: str) -> Case:
        """The case that needs least memory, in the first dtype."""
        return min(self.cases(device_type), key=lambda case: self.heaviest(case.shape).memory)


def direct(function: Callable[..., Any], *, captured: bool = True, **options: Any) -> Contender:
    """The function as it is."""
    return Contender(lambda inputs: partial(function, **inputs, **options), captured)


def compiled(function: Callable[..., Any], **options: Any) -> Contender:
    """The function under torch.compile; a graph break is an error, so that it is never slow by accident."""

    def prepare(inputs: Inputs) -> Call:
        return partial(torch.compile(function, fullgraph=True, dynamic=False), **inputs, **options)

    return Contender(prepare)


def elementwise_grid(spec: OpSpec, eager: Callable[..., Tensor], *, captured: bool = True) -> Grid:
    """The grid of an op that reads and writes its inputs and little else, in the first variant of its spec.

    Args:
        spec: the op; its first `grad_args` gets a gradient, that of the student.
        eager: what a user would write in torch, called like the op.
        captured: whether a CUDA graph can hold the op.
    """
    options = next(iter(spec.variants.values()))

    def heaviest(shape: Shape) -> Work:
        memory = 12 * 8 * math.prod(shape)
        return Work(spec.flops(shape), 4 * memory, memory)

    return Grid(
        name=spec.name,
        shapes=tuple(sorted(spec.bench_shapes, key=math.prod, reverse=True)),
        inputs=spec.inputs,
        reference=partial(spec.reference, **options),
        contenders=lambda: {
            "ours": direct(spec.op, captured=captured, **options),
            "eager": direct(eager, **options),
            "compile": compiled(eager, **options),
        },
        bound=lambda shape, itemsize: Work(spec.flops(shape), spec.bytes(shape, itemsize), 0),
        heaviest=heaviest,
        grad_args=spec.grad_args[:1],
        dtypes={"cpu": ("fp32",), "cuda": ("bf16", "fp32")},  # TF32 is for products
    )
