"""The masked linear map, against what everyone writes and against a weight whose pruned values are zero already."""

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.grid import Contender, Grid, Work, direct
from sdp_kernels import BitMask, masked_linear
from sdp_kernels.masked_linear import masked_linear_reference
from sdp_kernels.spec import Inputs, Shape

# A shape is (tokens, in, out, density in percent, side of the blocks or 0 for no structure), or ends with height and
# width of the blocks.
WEIGHTS = ((768, 3072), (3072, 768), (1024, 4096), (4096, 4096), (4096, 14336))  # BERT-base, ViT-L, Llama-3-8B
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
DENSITIES = (50, 25, 10, 5)
BLOCKS = (0, 16, 32, 64, 128)
NARROW = tuple(  # the feed-forward layers of MiniLM
    (900, *weight, density, *block_shape)
    for weight in ((384, 1536), (1536, 384))
    for density in (20, 100)
    for block_shape in ((16, 4), (32, 1))
)
TELLING = ((1024, 768, 3072, 10, 32), (64, 4096, 4096, 50, 0), (8192, 4096, 4096, 25, 64), (8192, 4096, 4096, 50, 0))


def shapes() -> tuple[Shape, ...]:
    """All tokens at one density, all densities and blocks at few and at many tokens, and a full mask."""
    found = dict.fromkeys(TELLING + NARROW)
    for weight in WEIGHTS:
        found |= dict.fromkeys((tokens, *weight, 10, side) for tokens, side in product(TOKENS, (0, 32, 64)))
        many = product((64, 4096), DENSITIES, BLOCKS)
        found |= dict.fromkeys((tokens, *weight, density, side) for tokens, density, side in many)
        found |= dict.fromkeys((4096, *weight, 100, side) for side in (0, 64))
    return tuple(found)


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The pruned weights are zero, so that all contenders compute the same."""
    tokens, columns, outputs, density, height = shape[:5]
    width = shape[-1]
    grid = (outputs // height, columns // width) if width else (outputs, columns)
    keep = torch.rand(grid, device=device) < density / 100
    mask = (
        BitMask.from_blocks(keep, (height, width), (outputs, columns), density=density / 100)
        if width
        else BitMask.from_bool(keep)
    )
    weight = torch.randn(outputs, columns, device=device) * mask.to_bool()
    return {
        "input": torch.randn(tokens, columns, device=device).to(dtype),
        "weight": weight.to(dtype),
        "mask": mask,
        "bias": torch.randn(outputs, device=device).to(dtype),
    }


class _MaskGradient(torch.autograd.Function):
    """The weight itself, with the gradient of a masked one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.mask = mask
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.mul_(ctx.mask), None


def multiplied(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    """What everyone writes."""
    return F.linear(input, weight * mask, bias)


def zeroed(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    """A dense product with the zeros in place; what is masked is the gradient, where `zero_` would mask the weight."""
    return F.linear(input, _MaskGradient.apply(weight, mask), bias)  # type: ignore[no-untyped-call]


def contenders() -> Mapping[str, Contender]:
    """Ours, the product with a mask of the weight's dtype, the same compiled, and the dense product."""

    def with_dense_mask(function: Any) -> Contender:
        def prepare(inputs: Inputs) -> Any:
            mask = inputs["mask"].to_bool().to(inputs["weight"].dtype)
            return partial(function, inputs["input"], inputs["weight"], mask, inputs["bias"])

        return Contender(prepare)

    def compile_it(inputs: Inputs) -> Any:
        return with_dense_mask(torch.compile(multiplied, fullgraph=True, dynamic=False))(inputs)

    return {
        "ours": direct(masked_linear),
        "eager": with_dense_mask(multiplied),
        "zeroed": with_dense_mask(zeroed),
        "compile": Contender(compile_it),
    }


def _bound(shape: Shape, itemsize: int) -> Work:
    """Blocks need only their share of the products; without structure no machine has a use for the zeros."""
    tokens, columns, outputs, density, side = shape[:5]
    share = density / 100 if side else 1.0
    moved = itemsize * (3 * share * columns * outputs + 2 * tokens * (columns + outputs))
    return Work(int(share * 6 * tokens * columns * outputs), int(moved), 0)


def _heaviest(shape: Shape) -> Work:
    tokens, columns, outputs = shape[:3]
    memory = 8 * (5 * columns * outputs + 3 * tokens * (columns + outputs))
    return Work(6 * tokens * columns * outputs, 3 * memory, memory)


GRID = Grid(
    name="masked_linear",
    shapes=shapes(),
    inputs=inputs,
    reference=masked_linear_reference,
    contenders=contenders,
    bound=_bound,
    heaviest=_heaviest,
    grad_args=("input", "weight", "bias"),
    telling=len(TELLING),
)
