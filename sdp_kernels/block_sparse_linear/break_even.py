"""Where a dense product of the same weight wins: estimates, as data, and the reasons that follow from them.

The dense weight is made from the blocks for one product and thrown away. A copy that is kept would double the memory
of a layer whose point is to be small, and would go stale when the values are trained or loaded. Making it costs two
passes over the weight, which many tokens pay back and few never do; the densities below include it. A layer that
always loses is better left dense, as `sdprune.plan` leaves it.

Up to a break-even density the blocks win. The numbers:

* "compiled": float32 by the compiled CPU engine. Two cores with AVX-512, weights of 3072 x 768, of the time of the
  dense product: 0.8 to 1.0 with all blocks kept at 1024 and 4096 tokens, 0.8 to 0.9 with 80 % kept at 128, if the
  blocks are taller than 16; with fewer tokens making the dense weight costs more than the product. So no edge.
* "compiled bfloat16": the same engine, which computes in float32, on a CPU that multiplies bfloat16 itself: dense
  products are two to three times faster there.
* "gathered": plain torch, one product for each row of blocks. Each costs some microseconds, so small blocks lose.
* "triton": not measured, but arithmetic on published rates: a kept multiplication costs 1.7 (blocks of 128), 2.5
  (64), 3.3 and 6 times a dense one, and the dense weight as much as the products of 500 tokens.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from sdp_kernels.block_sparse_linear.matrix import BlockSparseMatrix
from sdp_kernels.cpu_engine import availability


class Edge(NamedTuple):
    """The break-even densities from a number of tokens on."""

    tokens: int
    densities: Mapping[int, float]  # by the output side of a block; other sides take the entry before them

    def density(self, height: int) -> float:
        """The break-even density of blocks with `height` output features."""
        known = [side for side in self.densities if side <= height]
        return self.densities[max(known) if known else min(self.densities)]


BREAK_EVEN: Mapping[str, tuple[Edge, ...]] = {
    "triton": (
        Edge(1024, {16: 0.25, 32: 0.45, 64: 0.6, 128: 0.88}),
        Edge(4096, {16: 0.18, 32: 0.34, 64: 0.45, 128: 0.66}),
    ),
    "compiled": (),
    "compiled bfloat16": (Edge(16, {16: 0.45}),),
    "gathered": (
        Edge(1, {16: 0.0, 64: 0.1, 128: 0.35}),
        Edge(128, {16: 0.05, 32: 0.2, 64: 0.3, 128: 0.45}),
        Edge(1024, {16: 0.17, 32: 0.28, 64: 0.5, 128: 0.6}),
    ),
}


def reasons_for_dense(weight: BlockSparseMatrix, tokens: int, dtype: torch.dtype, backend: str) -> list[str]:
    """Why a product is estimated to be faster with the dense weight; empty where the blocks win.

    Args:
        weight: what is multiplied with.
        tokens: rows of the input.
        dtype: in which is multiplied.
        backend: "triton" or "cpu".
    """
    edge = edge_passed(weight, tokens, dtype, backend)
    if edge is None:
        return []
    height, width = weight.block_shape
    return [
        f"density {weight.density:.2f} is above {edge.density(height):.2f}, the break-even of the "
        f"{_path(dtype, backend)} product of blocks of {height} x {width} from {edge.tokens} tokens on"
    ]


def edge_passed(weight: BlockSparseMatrix, tokens: int, dtype: torch.dtype, backend: str) -> Edge | None:
    """The edge above which this product lies, None where the blocks win; arguments as above.

    Reads sizes only, so it waits for no device and is decided once for each compiled graph. A graph that is exported
    for any number of tokens keeps the blocks, and so does one compiled for a CPU: while a graph is traced nobody can
    ask which instructions and packages there are.
    """
    if weight.scales is not None:
        return None  # a dense product of integers is none of torch's
    if torch.compiler.is_exporting() or (backend == "cpu" and torch.compiler.is_compiling()):
        return None
    edges, height, density = BREAK_EVEN[_path(dtype, backend)], weight.block_shape[0], weight.density
    # Most matrices need no look at the tokens, which would tie a compiled graph to a range of them.
    if not edges or density <= min([edge.density(height) for edge in edges]):
        return None
    for edge in reversed(edges):
        if tokens >= edge.tokens:
            return edge if density > edge.density(height) else None
    return None


def _path(dtype: torch.dtype, backend: str) -> str:
    """The key of `BREAK_EVEN`."""
    if backend == "triton":
        return "triton"
    if not availability.is_compiled(dtype):
        return "gathered"
    return "compiled bfloat16" if dtype == torch.bfloat16 and availability.multiplies_bfloat16() else "compiled"
