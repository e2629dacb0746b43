"""A training step, forward, backward and update, of a stack of linear layers, as density falls.

The activation is smooth: at a kink, rounding would decide which of two gradients is right.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.grid import Contender, Grid, Work
from sdp_kernels import BitMask, masked_linear, zero_
from sdp_kernels.spec import Inputs, Shape

RATE = 1e-4
Layer = Callable[[Tensor, Tensor, Any, Tensor], Tensor]

# A shape is (tokens, dim, hidden, pairs of layers, density in percent, side of the blocks).
STACKS = ((1024, 768, 3072, 2), (4096, 1024, 4096, 2), (8192, 4096, 14336, 1))
TELLING = tuple((*stack, density, side) for density, side in ((10, 32), (10, 64), (50, 32)) for stack in STACKS)
ALL = tuple((*stack, density, side) for side in (32, 64, 128) for density in (100, 50, 25, 10, 5) for stack in STACKS)
SHAPES = tuple(dict.fromkeys(TELLING + ALL))


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Weights and biases of feed-forward pairs; the pruned weights are zero."""
    tokens, dim, hidden, pairs, density, side = shape
    sizes = [dim, *([hidden, dim] * pairs)]
    masks, weights = [], []
    for columns, rows in pairwise(sizes):
        keep = torch.rand(rows // side, columns // side, device=device) < density / 100
        masks.append(BitMask.from_blocks(keep, (side, side), (rows, columns), density=density / 100))
        scale = (columns * density / 200) ** -0.5
        weights.append((scale * torch.randn(rows, columns, device=device) * masks[-1].to_bool()).to(dtype))
    return {
        "input": torch.randn(tokens, dim, device=device).to(dtype),
        "weights": weights,
        "biases": [torch.zeros(rows, device=device, dtype=dtype) for rows in sizes[1:]],
        "masks": masks,
    }


def loss_of(layer: Layer, input: Tensor, weights: list[Tensor], biases: list[Tensor], masks: list[Any]) -> Tensor:
    """The mean square of what comes out of the stack."""
    output = input
    for weight, bias, mask in zip(weights, biases, masks, strict=True):
        output = F.gelu(layer(output, weight, mask, bias))
    return output.float().square().mean()


def multiplied(input: Tensor, weight: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    """What everyone writes."""
    return F.linear(input, weight * mask, bias)


def reference(input: Tensor, weights: list[Tensor], biases: list[Tensor], masks: list[BitMask]) -> Tensor:
    """The gradient of the first bias: everything that is computed takes part in it, and no mask stands on it."""
    first = biases[0].detach().requires_grad_()
    dense = [mask.to_bool().to(weight.dtype) for mask, weight in zip(masks, weights, strict=True)]
    output = input
    for weight, bias, mask in zip(weights, [first, *biases[1:]], dense, strict=True):
        output = F.gelu(multiplied(output, weight, mask, bias))
    return torch.autograd.grad(output.square().mean(), first)[0]


def steps(layer: Layer, *, dense_masks: bool, zeros: bool = False, compiled: bool = False) -> Contender:
    """Steps of gradient descent on weights of one's own."""

    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        weights, biases = ([tensor.detach().clone() for tensor in inputs[name]] for name in ("weights", "biases"))
        leaves = [tensor.requires_grad_() for tensor in (*weights, *biases)]
        masks = inputs["masks"]
        if dense_masks:
            masks = [mask.to_bool().to(weight.dtype) for mask, weight in zip(masks, weights, strict=True)]
        forward = torch.compile(loss_of, fullgraph=True, dynamic=False) if compiled else loss_of

        def step() -> Tensor:
            gradients = torch.autograd.grad(forward(layer, inputs["input"], weights, biases, masks), leaves)
            with torch.no_grad():
                torch._foreach_add_(leaves, gradients, alpha=-RATE)
                if zeros:
                    zero_(weights, masks)
            return gradients[len(weights)]

        return step

    return Contender(prepare)


def contenders() -> Mapping[str, Contender]:
    """Ours, the product with a mask, the same compiled, and dense layers whose zeros are restored after each step."""
    return {
        "ours": steps(masked_linear, dense_masks=False),
        "eager": steps(multiplied, dense_masks=True),
        "zeroed": steps(lambda input, weight, mask, bias: F.linear(input, weight, bias), dense_masks=False, zeros=True),
        "compile": steps(multiplied, dense_masks=True, compiled=True),
    }


def _numbers(shape: Shape) -> tuple[int, int]:
    """Weights, and activations."""
    tokens, dim, hidden, pairs = shape[:4]
    return 2 * pairs * dim * hidden, pairs * tokens * (dim + hidden)


def _bound(shape: Shape, itemsize: int) -> Work:
    weights, activations = _numbers(shape)
    kept = weights * shape[4] // 100
    return Work(6 * shape[0] * kept, itemsize * (5 * kept + 4 * activations), 0)


def _heaviest(shape: Shape) -> Work:
    weights, activations = _numbers(shape)
    memory = 8 * (6 * weights + 4 * activations)
    return Work(6 * shape[0] * weights, 3 * memory, memory)


GRID = Grid(
    name="training_step",
    shapes=SHAPES,
    inputs=inputs,
    reference=reference,
    contenders=contenders,
    bound=_bound,
    heaviest=_heaviest,
    telling=len(TELLING),
    launching=("ours", "zeroed"),
)
